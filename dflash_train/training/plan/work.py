"""What one optimiser step computes and moves, by part.

A product of `[m, k]` and `[k, n]` counts 2*m*k*n operations; a passing over a tensor counts the
numbers that it reads and writes. The numbers of passes below are read off the functions they name.

Legend: Q = A*K slots, S labelled slots, T context rows, E hidden size, F MLP width, H heads, G kv
heads, D head dim, K block size, L taps, N layers, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dflash_train.config import Sharding
from dflash_train.drafter.config import DrafterConfig
from dflash_train.training.plan.devices import GPUS_PER_NODE, NETWORK, Device
from dflash_train.training.plan.load import Load
from dflash_train.training.plan.memory import FLOAT, Setting
from dflash_train.training.plan.parameters import Parameters

# Numbers read and written per number of the tensor, forward and backward. RMSNorm: its square sum,
# the scaled row, the weight; back, six passes of one to three numbers.
NORM = 5 + 12
ROTATION = 10 + 10
"""`rotate`: two halves swapped, two products, one sum."""
LAYOUT = 2 + 2
"""One copy into another order."""
RESIDUAL = 3 + 3
"""One sum; back, the sum of two gradients."""
GATE = 5 + 14
"""`silu(gate) * up`, computed again in the backward pass."""
CONTEXT_SCORE = 8 + 12
"""Softmax, its largest number and share; back, the weights again and four passes."""
OWN_SCORE = 8 + 10
LOGIT = 7
"""Top, difference, exponential, sum; the gradient comes out of the same tile."""
CANDIDATE_LOGIT = 12
"""`topk` over a tile beside that (DFlash 2)."""
SHIFT = 11 + 16
"""One offset of a convolution: the shifted rows, two products, two sums; back alike."""
TABLE_SUM = 3
"""The gradient of a whole table, added to another one."""
SELECTOR_CHUNK = 256
"""Slots whose candidates are scored at once, `variant_losses`; each chunk gives a gradient of both
codebooks that is as large as they are."""
UPDATE = 10
"""Norm and clipping of gradients, fused AdamW: numbers per parameter."""
AVERAGE = 3
ATTENTION, HEAD = "attention", "head"
"""Parts that this machine times as a whole (`Device.whole_rates`)."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of an optimiser step on one process."""

    name: str
    products: float = 0.0
    """Operations in large matrix products."""
    small_products: float = 0.0
    """Operations in many small ones."""
    repeated: float = 0.0
    """Of both, those that the backward pass computes a second time; no part of MFU."""
    moved: float = 0.0
    """Bytes that passes over tensors read and write."""
    moved_inside: float = 0.0
    """The same between the part's own products, on tiles of them."""
    sent: float = 0.0
    """Bytes that the process sends to others."""

    @property
    def flops(self) -> float:
        """All operations of products."""
        return self.products + self.small_products

    @property
    def all_moved(self) -> float:
        """All bytes of passes."""
        return self.moved + self.moved_inside

    def seconds(self, device: Device, *, link: float) -> float:
        """Give the time, one thing after another."""
        whole = device.whole_rates.get(self.name)
        if whole is not None:
            computing = self.flops / whole
        else:
            computing = self.products / device.matrix_flops
            computing += self.small_products / device.batched_flops
            computing += self.moved_inside / device.bandwidth
        return computing + self.moved / device.bandwidth + self.sent / link

    def repeated_times(self, times: int) -> "Part":
        """Give the part for several micro-batches."""
        return Part(
            name=self.name,
            products=times * self.products,
            small_products=times * self.small_products,
            repeated=times * self.repeated,
            moved=times * self.moved,
            moved_inside=times * self.moved_inside,
            sent=times * self.sent,
        )


def step_parts(
    drafter: DrafterConfig, *, load: Load, parameters: Parameters, setting: Setting,
    head_rows: float, accumulation_steps: int, keeps_average: bool,
) -> list[Part]:  # fmt: skip
    """List the parts of one optimiser step.

    Args:
        drafter: The drafter's shape.
        load: The mean micro-batch.
        parameters: From `count_parameters`.
        setting: Formats and processes.
        head_rows: Rows of the head that the softmax runs over.
        accumulation_steps: Micro-batches of one process in a step.
        keeps_average: The recipe averages weights.
    """
    parts = [
        part.repeated_times(accumulation_steps)
        for part in micro_batch_parts(drafter, load, setting, head_rows=head_rows)
    ]
    return [*parts, *_once(parameters, setting, accumulation_steps, keeps_average)]


def micro_batch_parts(
    shape: DrafterConfig, load: Load, setting: Setting, *, head_rows: float
) -> Iterator[Part]:
    """Yield what a micro-batch takes, forward and backward."""
    yield _data(shape, load, setting)
    yield _context(shape, load, setting)
    for part in _layers(shape, load, setting):
        yield _recomputed(part) if setting.recomputes_layers else part
    yield _head(shape, load, setting, head_rows=head_rows)


def _layers(shape: DrafterConfig, load: Load, setting: Setting) -> Iterator[Part]:
    slots = load.blocks * shape.block_size
    yield _projections(shape, slots, setting)
    yield _attention(shape, load, setting)
    yield _mlp(shape, slots, setting)
    if shape.is_dflash2:
        yield _convolutions(shape, slots, setting)


def _recomputed(part: Part) -> Part:
    """Add a second forward pass: a third of products, two sevenths of attention's."""
    again = part.products / 3 + part.small_products * 2 / 7
    return Part(
        name=part.name,
        products=part.products * 4 / 3,
        small_products=part.small_products * 9 / 7,
        repeated=part.repeated + again,
        moved=part.moved * 4 / 3,
        moved_inside=part.moved_inside * 4 / 3,
    )


def _data(shape: DrafterConfig, load: Load, setting: Setting) -> Part:
    """Read the rows, lay them end to end, convert them."""
    features = load.context * shape.num_taps * shape.hidden_size
    return Part(name="data", moved=features * (3 * setting.stored_bytes + FLOAT))


def _context(shape: DrafterConfig, load: Load, setting: Setting) -> Part:
    """Fuse the features (no gradient goes further); project them to keys and values of layers."""
    rows, width, layers = load.context, shape.hidden_size, shape.num_hidden_layers
    keys = shape.num_key_value_heads * shape.head_dim
    fusion = 2 * 2 * rows * shape.num_taps * width * width
    projection = 3 * 2 * rows * width * 2 * keys * layers
    passes = NORM * width + layers * (keys * (NORM + ROTATION) + 2 * 3 * width)
    return Part(name="context", products=fusion + projection, moved=rows * passes * setting.narrow)


def _projections(shape: DrafterConfig, slots: float, setting: Setting) -> Part:
    """Give q, k, v and o of the slots with their norms, angles and residual sum."""
    width, layers = shape.hidden_size, shape.num_hidden_layers
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    products = 3 * 2 * slots * width * (2 * queries + 2 * keys) * layers
    wide = (NORM + RESIDUAL + 2 * 3) * width * FLOAT
    narrow = queries * (NORM + ROTATION + 2) + keys * (NORM + ROTATION)
    moved = slots * layers * (wide + narrow * setting.narrow)
    return Part(name="projections", products=products, moved=moved)


def _attention(shape: DrafterConfig, load: Load, setting: Setting) -> Part:
    """Give scores and values over context and own block: two products, five in the backward."""
    heads, slots, layers = shape.num_attention_heads, shape.block_size, shape.num_hidden_layers
    pairs = load.pairs * slots
    if shape.sliding_window is not None:
        windowed = load.blocks * slots * shape.sliding_window
        sliding = sum(each.window is not None for each in shape.layer_visibility()) / layers
        pairs = (1 - sliding) * pairs + sliding * min(pairs, windowed)
    own = load.blocks * slots * slots
    one = 2 * (pairs + own) * heads * shape.head_dim * layers
    passes = FLOAT * heads * layers * (CONTEXT_SCORE * pairs + OWN_SCORE * own)
    queries = 3 * load.blocks * slots * heads  # rows that are laid out anew, and of keys
    keys = 2 * (load.blocks * slots + load.context) * shape.num_key_value_heads
    passes += layers * (queries + keys) * shape.head_dim * LAYOUT * setting.narrow
    return Part(name=ATTENTION, small_products=7 * one, repeated=one, moved_inside=passes)


def _mlp(shape: DrafterConfig, slots: float, setting: Setting) -> Part:
    width, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    products = 3 * 2 * slots * 3 * width * inner * layers
    wide = (NORM + RESIDUAL + 3) * width * FLOAT
    moved = slots * layers * (wide + GATE * inner * setting.narrow)
    return Part(name="mlp", products=products, moved=moved)


def _head(shape: DrafterConfig, load: Load, setting: Setting, *, head_rows: float) -> Part:
    """Form logits and their gradient tile by tile; a bias (DSpark) sweeps a second time."""
    width, bias_rank = shape.hidden_size, shape.markov_rank or 0
    logits = load.labels * head_rows
    sweeps = 2 * width if bias_rank == 0 else 3 * width + 4 * bias_rank
    per_logit = LOGIT + (CANDIDATE_LOGIT if shape.is_dflash2 else 0) + (5 if bias_rank else 0)
    gather = 4 * load.labels * width * FLOAT
    norm = load.blocks * shape.block_size * (NORM + 6) * width * FLOAT
    choice = 0.0
    if shape.selector_top_k is not None:  # candidates' rows are read twice, forward and again
        rank = shape.selector_rank or 0
        choice = 4 * load.labels * shape.selector_top_k * (width + rank)
        chunks = math.ceil(load.labels / SELECTOR_CHUNK)
        choice += 2 * shape.vocab_size * rank * (chunks + TABLE_SUM * (chunks - 1))
    return Part(
        name=HEAD,
        products=2 * logits * sweeps,
        repeated=2 * logits * width if bias_rank else 0.0,
        moved=gather + norm + choice * FLOAT,
        moved_inside=logits * per_logit * FLOAT,
    )


def _convolutions(shape: DrafterConfig, slots: float, setting: Setting) -> Part:
    """Mix the slots around both sublayers (DFlash 2)."""
    assert shape.conv_kernel_size is not None
    assert shape.conv_group_size is not None
    width, layers = shape.hidden_size, shape.num_hidden_layers
    kernels = 2 * shape.conv_kernel_size * (width // shape.conv_group_size)
    products = 3 * 2 * slots * width * kernels * 2 * layers
    moved = slots * layers * 4 * shape.conv_kernel_size * SHIFT * width * FLOAT
    return Part(name="convolutions", products=products, moved=moved)


def _once(
    parameters: Parameters, setting: Setting, accumulation_steps: int, keeps_average: bool
) -> Iterator[Part]:
    """Give what happens once a step: sums of gradients, the update, the exchange."""
    total, ranks = parameters.total, setting.ranks
    own = total if setting.sharding is Sharding.none else total / ranks
    numbers = UPDATE * own + (AVERAGE * total if keeps_average else 0.0)
    numbers += 3 * total * (accumulation_steps - 1)
    casts = 12 * total * accumulation_steps if setting.is_autocast else 0.0
    yield Part(name="optimizer", moved=FLOAT * numbers + casts)
    if ranks > 1:
        rounds = 3 if setting.sharding is Sharding.zero3 else 2
        yield Part(name="communication", sent=rounds * (ranks - 1) / ranks * FLOAT * total)


def link_of(device: Device, *, ranks: int) -> float:
    """Give bytes per second between processes: inside a node, or over the slower network."""
    return device.link if ranks <= GPUS_PER_NODE else min(device.link, NETWORK)


def target_part(num_active_parameters: float, *, load: Load, accumulation_steps: int) -> Part:
    """Give the target's pass over the rows of a step, where features are online.

    Args:
        num_active_parameters: Of the target, embedding and head apart, that one token meets.
        load: The mean micro-batch.
        accumulation_steps: Micro-batches of one process in a step.
    """
    products = 2 * num_active_parameters * load.tokens * accumulation_steps
    return Part(name="target", products=products)
