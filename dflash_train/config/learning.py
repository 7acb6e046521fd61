"""How a drafter learns: steps, losses, optimiser, processes."""

from dataclasses import dataclass, field
from enum import Enum

from dflash_train.config.checks import require


class Precision(Enum):
    """Mixed precision of training, in accelerate's words."""

    no = "no"
    bf16 = "bf16"


class KernelChoice(Enum):
    """Whose operations run where Triton kernels exist for them."""

    auto = "auto"
    triton = "triton"
    torch = "torch"


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
    patience: int | None = None
    """Validations in a row without a better acceptance length after which training stops; the first
    one is then before the first step. None trains to the last step."""
    save_every: int = 100
    """Steps between train states."""
    keep_states: int = 2
    """Train states kept; older ones are removed."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    head_chunk: int = 1024
    """Slots whose logits exist at once."""
    profile_steps: list[int] | None = None
    """First and last step of a window under torch.profiler, from 1 on, such as [10, 12]: a trace
    goes to `profile/` in the run folder. No result follows from it."""

    def __post_init__(self) -> None:
        for name in (
            "max_steps", "num_anchors", "pack_tokens", "accumulation_steps", "validate_every",
            "validation_rows", "save_every", "keep_states", "log_every", "head_chunk", "patience",
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
        window = self.profile_steps
        require(
            window is None or (len(window) == 2 and 1 <= window[0] <= window[1]),
            f"training.profile_steps (={window}) must be the first and the last step, from 1 on. "
            "Set it to [10, 12].",
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
class LaunchConfig:
    """How processes run. The number of processes is accelerate's business."""

    num_threads: int | None = None
    """Threads per process; None takes the cores of this machine divided among its processes."""
    mixed_precision: Precision = Precision.no
    """`bf16`: bf16 products with float32 masters on GPUs. On a CPU float32 products may then use
    bfloat16 inputs where the processor has units for them, in training steps only; without, they
    are float32 by oneDNN."""
    activation_checkpointing: bool = False
    """Compute the inside of each drafter layer again in the backward pass: for less memory about a
    third more time."""
    compile: bool = False
    """Compile each drafter layer with torch.compile: minutes first, then faster steps on a GPU."""
    kernels: KernelChoice = KernelChoice.auto
    """Of attention, context keys and the head's loss: `auto` takes Triton kernels on a GPU where
    they are installed, else torch; `triton` and `torch` force either. On a CPU `triton` needs
    TRITON_INTERPRET=1, which is for tests: it is thousands of times slower."""
