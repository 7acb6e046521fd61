"""What becomes of logs: sources, privacy, splits, answers, features."""

from dataclasses import dataclass, field

from dflash_train.config.checks import require
from dflash_train.config.models import Dtype


@dataclass(kw_only=True)
class SampleTrafficConfig:
    """The simulated fleet that stands in for logs when `data.logs` is not set."""

    requests: int = 600
    """Usable requests; the dirt of real logs comes on top."""
    seed: int = 0
    """Seed of the fleet: the same seed gives the same log on one machine."""

    def __post_init__(self) -> None:
        require(
            self.requests >= 1,
            f"data.sample.requests (={self.requests}) must be at least 1. Set it to 600.",
        )


@dataclass(kw_only=True)
class DataConfig:
    """From log files to rows of token ids and target features."""

    logs: str | None = None
    """Log file, folder or glob; None plays the simulated fleet of `data.sample`."""
    sample: SampleTrafficConfig = field(default_factory=SampleTrafficConfig)
    """The simulated fleet."""
    hmac_key_file: str | None = None
    """File with the key that hides sessions and tenants; None reads DFLASH_HMAC_KEY, else makes a
    random key for this run folder."""
    validation_share: float = 0.10
    """Share of the time range, before the test window, whose sessions choose the best
    checkpoint."""
    test_share: float = 0.18
    """Share of the time range, the newest, that is held out for the report."""
    max_drop_share: float = 0.5
    """A run that drops more than this share of records for one reason stops and names it."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped as `too_long`."""
    max_new_tokens: int = 64
    """Budget of one regenerated answer, in tokens."""
    batch_size: int = 64
    """Rows that the target processes at once."""
    features_dtype: Dtype = Dtype.bfloat16
    """Number format of stored target features."""
    teacher_top_k: int = 0
    """k, 0 .. V: keep the target's k most probable tokens at each answer token, for losses against
    its distribution, at 8 * k bytes per token; 0 keeps none."""

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"data.{name} (={value}) must be at least 1.")
        require(
            self.teacher_top_k >= 0,
            f"data.teacher_top_k (={self.teacher_top_k}) must not be negative. Set it to 0 to keep "
            "none, or to 8.",
        )
        for name in ("validation_share", "test_share", "max_drop_share"):
            value = getattr(self, name)
            require(0 < value <= 1, f"data.{name} (={value}) must be above 0 and at most 1.")
        require(
            self.validation_share + self.test_share < 1,
            f"data.validation_share (={self.validation_share}) and data.test_share "
            f"(={self.test_share}) leave nothing to train on. Lower them to 0.1 and 0.18.",
        )
