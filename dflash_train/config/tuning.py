"""How a drafter is tuned to new traffic and when the result replaces it: `dflash-train tune`."""

from dataclasses import dataclass, field

from dflash_train.config.checks import require


@dataclass(kw_only=True)
class TuneConfig:
    """Fine-tuning of a serving drafter, and the rule by which its successor is promoted."""

    registry: str = "registry"
    """Folder with the drafter that serves, the one before it and the one on trial: `current`,
    `previous`, `candidate`."""
    replay_from: list[str] = field(default_factory=list)
    """Folders of earlier runs of the same target: some of their training rows are trained on again,
    and on their newest windows nobody may lose more than `tenant_margin`. Empty replays none."""
    replay_share: float = 0.3
    """Share of replayed rows in training, by answer tokens; rows are drawn once, none twice, so few
    older rows give a smaller share."""
    lr_factor: float = 0.3
    """Peak learning rate of a tuning over `optim.lr` and `optim.muon_lr`, which are those of a
    training from the start."""
    patience: int = 3
    """Validations in a row without a better acceptance length after which a tuning stops; it is
    `training.patience` there, and the drafter that it starts from counts as the first."""
    blends: list[float] = field(default_factory=lambda: [place / 10 for place in range(10, 0, -1)])
    """Shares of the tuned weights in the candidate; the rest is what it started from. The largest
    is taken at which, by replay on validation windows here and in earlier runs, nobody loses more
    than half of `tenant_margin`; it is looked for by halves. A single one is taken as it is."""
    blend_rows: int = 48
    """Validation rows of each tenant that are replayed for a blend, at most."""
    min_requests: int = 100
    """Fewest requests of the newest window on which a candidate is promoted."""
    tenant_margin: float = 0.02
    """Share of its acceptance length that no tenant may lose."""

    def __post_init__(self) -> None:
        require(
            bool(self.registry),
            "tune.registry (=) must be a folder. Set it to registry, or to one that all tunings of "
            "this target share.",
        )
        require(
            0 <= self.replay_share < 1,
            f"tune.replay_share (={self.replay_share}) must be at least 0 and below 1. Set it to "
            "0.3.",
        )
        require(
            len(set(self.replay_from)) == len(self.replay_from),
            f"tune.replay_from (={self.replay_from}) names a run twice. Name each once.",
        )
        require(
            self.lr_factor > 0,
            f"tune.lr_factor (={self.lr_factor}) must be above 0. Set it to 0.3.",
        )
        require(
            bool(self.blends)
            and all(0 < share <= 1 for share in self.blends)
            and len(set(self.blends)) == len(self.blends),
            f"tune.blends (={self.blends}) must be shares above 0 up to 1, none twice. Set it to "
            "[1.0] for the tuned weights as they are.",
        )
        for name in ("patience", "min_requests", "blend_rows"):
            value = getattr(self, name)
            require(value >= 1, f"tune.{name} (={value}) must be at least 1.")
        require(
            0 <= self.tenant_margin < 1,
            f"tune.tenant_margin (={self.tenant_margin}) must be at least 0 and below 1. Set it to "
            "0.02 for two per cent.",
        )
