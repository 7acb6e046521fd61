"""Memory of one training process, from what each autograd function of the drafter keeps.

`drafter/fused.py`, `drafter/block_attention.py` and `training/head_sweep.py` say what is kept; the
counts below follow them line by line, and a test compares them with what autograd reports. The peak
is found by walking back through the layers: gradients grow while activations go.

Legend: Q = A*K slots, S labelled slots, T context rows, E hidden size, F MLP width, H heads, G kv
heads, D head dim, K block size, L taps, N layers, V vocabulary.
"""

from dataclasses import dataclass

from dflash_train.config import KernelChoice, Precision, RecipeConfig, Sharding
from dflash_train.drafter.block_attention import SCORES_AT_ONCE, SCORES_AT_ONCE_ELSEWHERE
from dflash_train.drafter.config import DrafterConfig
from dflash_train.training.head_tiles import CPU_TILE, GPU_TILE, KERNEL_LOGIT_BYTES
from dflash_train.training.plan.load import Load
from dflash_train.training.plan.parameters import Parameters

FLOAT = 4
"""Bytes of masters, moments, gradients and sums."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides the bytes of a run beside its shapes."""

    is_cpu: bool
    is_autocast: bool
    """bf16 on a GPU: products in 2 bytes, and each keeps a cast of its own of its input."""
    head_bytes: int
    """Of a number of the frozen embedding and head."""
    stored_bytes: int
    """Of a stored feature."""
    has_kernels: bool = False
    """Triton's kernels run: the head's loss takes rows of the whole vocabulary at once."""
    recomputes_layers: bool = False
    """A layer keeps what enters it, and runs again in the backward pass."""
    ranks: int = 1
    sharding: Sharding = Sharding.none

    @classmethod
    def of(cls, config: RecipeConfig, *, is_cpu: bool) -> "Setting":
        """Read a recipe."""
        narrow = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 2}  # 8 bits are read as bfloat16
        return cls(
            is_cpu=is_cpu,
            is_autocast=not is_cpu and config.launch.mixed_precision is Precision.bf16,
            head_bytes=narrow[config.target.dtype.value],
            stored_bytes=narrow[config.data.features_dtype.value],
            has_kernels=not is_cpu and config.launch.kernels is not KernelChoice.torch,
            recomputes_layers=config.launch.activation_checkpointing,
            ranks=config.plan.num_gpus,
            sharding=config.plan.sharding,
        )

    @property
    def narrow(self) -> int:
        """Bytes of what a product gives."""
        return 2 if self.is_autocast else FLOAT

    def input_bytes(self, num_products: int) -> int:
        """Bytes of a number that several products read."""
        return 2 * num_products if self.is_autocast else FLOAT


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process, by part, and the most of them at one time."""

    weights: float
    """As products read them: bf16 copies under autocast, else the masters themselves."""
    masters: float
    """float32 weights that the optimiser updates, where products read others."""
    gradients: float
    optimizer: float
    average: float
    """The moving average of the weights, if the recipe keeps one."""
    head: float
    """The target's embedding and LM head, and the sample of it that a step trains on."""
    target: float
    """The rest of the target, which the process holds where features are online."""
    features: float
    """Micro-batches of one optimiser step, as loaded."""
    activations: float
    """What autograd keeps of the largest micro-batch."""
    working: float
    """The largest temporary of a step."""
    growth: float
    """The peak during a step, above what lies there before it."""

    @property
    def held(self) -> float:
        """Bytes that are there between two steps."""
        return self.weights + self.masters + self.optimizer + self.average + self.head + self.target

    @property
    def peak(self) -> float:
        """The most at one time; parts that do not meet are not added up."""
        return self.held + self.growth


def plan_memory(
    config: RecipeConfig, drafter: DrafterConfig, *, load: Load, parameters: Parameters,
    setting: Setting, head_rows: float, is_tied: bool, target_parameters: int,
) -> Memory:  # fmt: skip
    """Add the parts up.

    Args:
        config: The recipe.
        drafter: The drafter's shape.
        load: The largest micro-batch.
        parameters: From `count_parameters`.
        setting: Formats and processes.
        head_rows: Rows of the head that one step's softmax runs over.
        is_tied: The target's embedding is its head.
        target_parameters: Of the target, embedding and head apart, that the process holds.
    """
    total, ranks = parameters.total, setting.ranks
    by_ranks = 1 if setting.sharding is Sharding.none else ranks
    weights = (2 if setting.is_autocast else FLOAT) * total
    if setting.sharding is Sharding.zero3:
        weights /= ranks
    buckets = FLOAT * total if ranks > 1 and setting.sharding is Sharding.none else 0
    table = drafter.vocab_size * drafter.hidden_size * setting.head_bytes
    sample = head_rows * drafter.hidden_size * setting.head_bytes
    features = load.context * drafter.num_taps * drafter.hidden_size * setting.stored_bytes
    features *= config.training.accumulation_steps
    walk = _walk_back(
        drafter, load, setting, parameters,
        chunk=config.training.head_chunk, head_rows=head_rows,
        starts_with_gradients=config.training.accumulation_steps > 1, by_ranks=by_ranks,
    )  # fmt: skip
    return Memory(
        weights=weights,
        masters=FLOAT * total / by_ranks if setting.is_autocast else 0.0,
        gradients=FLOAT * total / by_ranks,
        optimizer=FLOAT * parameters.moments / by_ranks + buckets,
        average=FLOAT * total if config.training.ema_decay is not None else 0.0,
        head=table * (1 if is_tied else 2) + (sample if head_rows < drafter.vocab_size else 0.0),
        target=target_parameters * setting.head_bytes,
        features=features,
        activations=walk.kept,
        working=walk.working,
        growth=features + walk.peak,
    )


def kept_by_layer(drafter: DrafterConfig, load: Load, setting: Setting) -> float:
    """Give the bytes that autograd keeps of one layer between its forward and backward."""
    if setting.recomputes_layers:
        entering = load.blocks * drafter.block_size * drafter.hidden_size * FLOAT
        return entering + load.context * _kept_of_context(drafter, setting)
    return kept_inside_layer(drafter, load, setting)


def kept_inside_layer(drafter: DrafterConfig, load: Load, setting: Setting) -> float:
    """Give the bytes that autograd keeps of one layer while it runs."""
    shape, slots = drafter, load.blocks * drafter.block_size
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    stream = 2 * shape.hidden_size * FLOAT  # what the two norms read
    if shape.is_dflash2:
        stream += _kept_by_convolutions(shape, setting)
    else:
        stream += shape.hidden_size * (setting.input_bytes(3) + setting.input_bytes(2))
    products = (3 * queries + 3 * keys + 2 * shape.intermediate_size) * setting.narrow
    # One scale a norm and row; log-sum-exp and the context's share of each head.
    scalars = 2 + shape.num_key_value_heads + 3 * shape.num_attention_heads
    context = _kept_of_context(shape, setting)
    return slots * (stream + products + scalars * FLOAT) + load.context * context


def _kept_of_context(shape: DrafterConfig, setting: Setting) -> float:
    """Give the bytes per context row of one layer's keys and values."""
    keys = shape.num_key_value_heads * shape.head_dim
    kept = 3 * keys * setting.narrow + shape.num_key_value_heads * FLOAT
    return kept + (shape.hidden_size * setting.input_bytes(2) if setting.is_autocast else 0)


def _kept_by_convolutions(shape: DrafterConfig, setting: Setting) -> float:
    """Give the bytes per slot around both sublayers: inputs shifted by each offset, kernels."""
    assert shape.conv_kernel_size is not None
    assert shape.conv_group_size is not None
    offsets = min(shape.conv_kernel_size, shape.block_size)
    shifted = shape.hidden_size * offsets * (FLOAT + setting.narrow)
    kernels = 2 * shape.conv_kernel_size * (shape.hidden_size // shape.conv_group_size)
    inputs = setting.input_bytes(3) + setting.input_bytes(2) + 2 * setting.input_bytes(1)
    return 2 * (shifted + kernels * setting.narrow) + shape.hidden_size * inputs


def kept_by_fusion(drafter: DrafterConfig, load: Load, setting: Setting) -> float:
    """Give the bytes kept of features, `fc`, its norm and the angles of RoPE."""
    shape, slots = drafter, load.blocks * drafter.block_size
    row = shape.num_taps * shape.hidden_size * setting.input_bytes(1)
    row += shape.hidden_size * setting.narrow + FLOAT  # what hidden_norm reads, its scale
    if not setting.is_autocast:
        row += shape.hidden_size * FLOAT  # what every layer's keys and values are made of
    angles = 2 * shape.head_dim * FLOAT
    return load.context * (row + angles) + slots * angles


def kept_by_loss(drafter: DrafterConfig, load: Load) -> float:
    """Give the bytes kept of the final norm and of the loss: a gradient per labelled slot."""
    slots = load.blocks * drafter.block_size
    kept = slots * (drafter.hidden_size + 1) * FLOAT + load.labels * drafter.hidden_size * FLOAT
    if drafter.is_dflash2 or drafter.is_shifted:  # their heads read the hidden states again
        kept += load.labels * drafter.hidden_size * FLOAT
    return kept


@dataclass(frozen=True, kw_only=True)
class _Walk:
    kept: float
    working: float
    peak: float


def _walk_back(
    drafter: DrafterConfig, load: Load, setting: Setting, parameters: Parameters, *, chunk: int,
    head_rows: float, starts_with_gradients: bool, by_ranks: int,
) -> _Walk:  # fmt: skip
    """Follow a micro-batch from its loss back to `fc`."""
    layer = kept_by_layer(drafter, load, setting)
    ends = kept_by_fusion(drafter, load, setting)
    kept = ends + drafter.num_hidden_layers * layer + kept_by_loss(drafter, load)
    in_head = _working_of_head(drafter, load, setting, chunk=chunk, head_rows=head_rows)
    in_layer = _working_of_layer(drafter, load, setting)
    if setting.recomputes_layers:
        in_layer += kept_inside_layer(drafter, load, setting)
    whole = FLOAT * parameters.total / by_ranks
    done = whole if starts_with_gradients else FLOAT * parameters.heads / by_ranks
    left, peak = kept, kept + in_head + (whole if starts_with_gradients else 0.0)
    left -= kept_by_loss(drafter, load)
    for _ in range(drafter.num_hidden_layers):
        if not starts_with_gradients:
            done += FLOAT * parameters.per_layer / by_ranks
        peak = max(peak, left + in_layer + done)
        left -= layer
    fused = 2 * load.context * drafter.hidden_size * FLOAT
    peak = max(peak, left + fused + whole)
    return _Walk(kept=kept, working=max(in_head, in_layer), peak=peak)


def _working_of_head(
    drafter: DrafterConfig, load: Load, setting: Setting, *, chunk: int, head_rows: float
) -> float:
    """Give the bytes of the logits at once, and of hidden states and gradients beside them."""
    if setting.has_kernels and not drafter.is_shifted:  # DSpark's bias is torch's
        logits = logits_of_kernels(load.labels, head_rows=head_rows, head_bytes=setting.head_bytes)
    else:
        logits = _logits_of_tile(drafter, load, setting, chunk=chunk, head_rows=head_rows)
    slots = load.blocks * drafter.block_size
    # Hidden states of all slots and of those with a label; where the gradient of a chunk's is put
    # together, the sum over the head's rows, the labels' rows and a product of either.
    rows = slots + load.labels + 3 * min(chunk, load.labels)
    return logits + rows * drafter.hidden_size * FLOAT


def logits_of_kernels(num_slots: float, *, head_rows: float, head_bytes: int) -> float:
    """Give the bytes of a chunk's logits and gradients, as `dflash_kernels` cuts its chunks.

    Args:
        num_slots: Slots with a label.
        head_rows: Rows of the head.
        head_bytes: Of a number of the head. Gradients of float32 take the place of their logits.
    """
    row = head_rows * (FLOAT + (head_bytes if head_bytes < FLOAT else 0))
    fitting = max(1, int(KERNEL_LOGIT_BYTES // row))
    return row * min(num_slots, 1 << (fitting.bit_length() - 1))


def _logits_of_tile(
    drafter: DrafterConfig, load: Load, setting: Setting, *, chunk: int, head_rows: float
) -> float:
    tile = min(chunk, load.labels) * min(CPU_TILE if setting.is_cpu else GPU_TILE, head_rows)
    number = setting.head_bytes
    if setting.head_bytes < FLOAT:  # sums are float32, products go back
        number += FLOAT + setting.head_bytes
    if drafter.final_logit_softcapping:
        number += 2 * FLOAT
    return tile * number


def _working_of_layer(drafter: DrafterConfig, load: Load, setting: Setting) -> float:
    """Give the bytes of a layer's largest backward function, the MLP's or attention's.

    The MLP comes first: what it kept is gone when attention begins.
    """
    shape, slots = drafter, load.blocks * drafter.block_size
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    stream = 2 * shape.hidden_size * FLOAT
    mlp = slots * (3 * shape.intermediate_size * setting.narrow + stream)
    limit = SCORES_AT_ONCE["cpu"] if setting.is_cpu else SCORES_AT_ONCE_ELSEWHERE
    # A group's blocks are of one document; the mean one stands for the longest.
    scores = min(limit, slots * shape.num_attention_heads * load.context / load.rows)
    own_scores = 3 * shape.num_attention_heads * shape.block_size * FLOAT
    attention = slots * ((3 * queries + 2 * keys) * setting.narrow + own_scores + stream)
    # Weights and their gradient, whose products come out narrow first.
    at_once = 2 * FLOAT + (setting.narrow if setting.is_autocast else 0)
    attention += 2 * load.context * keys * setting.narrow + at_once * scores
    kept_by_mlp = slots * (2 * shape.intermediate_size * setting.narrow + shape.hidden_size * FLOAT)
    return max(mlp, attention - kept_by_mlp)
