"""How fast this machine is: rates of products and passes of the sizes that a plan has.

A few seconds of timing on tensors of the planned micro-batch, so that caches and threads behave as
they will in training. Passes are those of the drafter's norms and gates; attention and the head,
whose tiles stay in the cache, are timed as a whole, on part of the micro-batch.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from dflash_train.config import LaunchConfig, LossConfig
from dflash_train.drafter.block_attention import Blocks, ContextKV, block_attention
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.fused import RMSNorm
from dflash_train.training.accelerator import cpu_products, threads_per_process
from dflash_train.training.head_sweep import sweep_head
from dflash_train.training.head_tiles import CPU_TILE, HeadSettings, SlotTargets
from dflash_train.training.plan.devices import Device
from dflash_train.training.plan.load import Load
from dflash_train.training.plan.work import ATTENTION, GATE, HEAD, NORM

REPEATS = 5
MOST_ROWS = 8192
"""Rows of a timed tensor: more would only take longer."""
OUT_OF_CACHE = 256 * 2**20
"""Bytes of all tensors of the timed passes."""
MOST_SETS = 32
"""Of such tensors: rows so few that more would be wanted stay in a cache in training, too."""
MOST_SCORES = 1 << 21
"""Of the timed attention."""
TIMED_TILES, TIMED_SLOTS = 4, 1024
"""Of the timed head."""
LOCAL_LINK = 10e9
"""Bytes per second between two processes of one machine; not measured."""


def measure_machine(drafter: DrafterConfig, load: Load, launch: LaunchConfig) -> Device:
    """Time the products of the MLP, its passes and those of norms, attention and the head.

    Args:
        drafter: Gives the widths.
        load: Gives the rows.
        launch: Threads and precision, as training uses them.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads_per_process(launch))
    try:
        with torch.no_grad(), cpu_products(launch):
            return Device(
                name=f"this machine ({torch.get_num_threads()} threads)",
                matrix_flops=_matrix_rate(drafter, load),
                batched_flops=_batched_rate(drafter, load),
                bandwidth=_bandwidth(drafter, load),
                whole_rates=_whole_rates(drafter, load),
                memory_bytes=float(psutil.virtual_memory().total),
                link=LOCAL_LINK,
            )
    finally:
        torch.set_num_threads(before)


def _matrix_rate(drafter: DrafterConfig, load: Load) -> float:
    """Multiply slots by an MLP matrix, and back: the products of one linear layer."""
    rows, width, inner = _rows(drafter, load), drafter.hidden_size, drafter.intermediate_size
    x, weight, grad = torch.randn(rows, width), torch.randn(inner, width), torch.randn(rows, inner)

    def products() -> list[Tensor]:
        return [x @ weight.T, grad @ weight, grad.T @ x]

    return 3 * 2 * rows * width * inner / _seconds(products)


def _batched_rate(drafter: DrafterConfig, load: Load) -> float:
    """Multiply queries by keys of a mean context, per kv head, for a few blocks."""
    groups, dim = drafter.num_key_value_heads, drafter.head_dim
    seen = max(16, int(load.pairs / max(load.blocks, 1.0)))
    queries = 4 * drafter.block_size * drafter.num_attention_heads // groups
    q, k = torch.randn(groups, queries, dim), torch.randn(groups, seen, dim)
    times = 8

    def products() -> None:
        for _ in range(times):
            weights = q @ k.mT
            _ = weights @ k

    return times * 2 * 2 * groups * queries * seen * dim / _seconds(products)


def _bandwidth(drafter: DrafterConfig, load: Load) -> float:
    """Norm rows and open gates, forward and backward, on rows of the MLP.

    Each call takes other tensors, enough of them to fall out of every cache, and new memory for its
    results, as a step does.
    """
    rows, width, inner = _rows(drafter, load), drafter.hidden_size, drafter.intermediate_size
    one_set = 4 * rows * (2 * width + 3 * inner)
    norm = RMSNorm(width, eps=1e-6)
    sets = [
        (
            torch.randn(rows, width, requires_grad=True),
            torch.randn(rows, width),
            *(torch.randn(rows, inner) for _ in range(3)),
        )
        for _ in range(max(2, min(MOST_SETS, -(-OUT_OF_CACHE // one_set))))
    ]

    def passes() -> None:
        for x, grad, gate, up, grad_inner in sets:
            with torch.enable_grad():
                torch.autograd.grad(norm(x), (x, norm.weight), grad)
            _open_gates(gate, up, grad_inner)

    return len(sets) * 4 * rows * (NORM * width + GATE * inner) / _seconds(passes)


def _open_gates(gate: Tensor, up: Tensor, grad: Tensor) -> Tensor:
    """Pass over the rows as `GatedDown` does in its forward and backward, products left out."""
    functional.silu(gate).mul_(up)
    opened = functional.silu(gate)
    _ = opened * up
    opened.mul_(grad)
    return torch.ops.aten.silu_backward(grad * up, gate)


def _whole_rates(drafter: DrafterConfig, load: Load) -> dict[str, float]:
    """Time what the plan counts as one: attention, and the head unless a bias sweeps it twice."""
    with torch.enable_grad():
        rates = {ATTENTION: _attention_rate(drafter, load)}
        if drafter.markov_rank is None:
            rates[HEAD] = _head_rate(drafter, load)
    return rates


def _attention_rate(drafter: DrafterConfig, load: Load) -> float:
    """Attend with the blocks of a mean document, forward and backward: seven products."""
    heads, groups, slots = (
        drafter.num_attention_heads, drafter.num_key_value_heads, drafter.block_size,
    )  # fmt: skip
    seen = max(1, round(load.pairs / max(load.blocks, 1.0)))
    context = max(seen, round(load.context / max(load.rows, 1.0)))
    most = max(1, MOST_SCORES // (slots * heads * seen))
    count = max(1, min(round(load.blocks / max(load.rows, 1.0)), most))
    anchors = torch.linspace(max(1, 2 * seen - context), context, count).long()
    blocks = Blocks(
        context_offsets=[0, context], block_offsets=[0, count], anchor_positions=anchors
    )
    q = torch.randn(count, slots, heads, drafter.head_dim, requires_grad=True)
    own = [torch.randn(count, slots, groups, drafter.head_dim, requires_grad=True) for _ in "kv"]
    rows = [torch.randn(context, groups, drafter.head_dim, requires_grad=True) for _ in "kv"]
    visibility = replace(drafter.layer_visibility()[0], window=None)
    grad = torch.randn(q.shape)

    def attend() -> None:
        out = block_attention(
            q, ContextKV(*rows), own[0], own[1], blocks=blocks, visibility=visibility
        )
        torch.autograd.grad(out, (q, *rows, *own), grad)

    pairs = slots * (int(anchors.sum()) + count * slots)
    return 7 * 2 * pairs * heads * drafter.head_dim / _seconds(attend)


def _head_rate(drafter: DrafterConfig, load: Load) -> float:
    """Sweep a chunk of slots over a few tiles: two products, the gradient among them."""
    slots = max(16, min(TIMED_SLOTS, int(load.labels)))
    ids = min(drafter.num_output_ids, TIMED_TILES * CPU_TILE)
    hidden = torch.randn(slots, drafter.hidden_size, requires_grad=True)
    no_teacher = torch.zeros(slots, 0)
    targets = SlotTargets(
        labels=torch.randint(ids, (slots,)), teacher_ids=no_teacher.long(), teacher_p=no_teacher
    )
    head = HeadSettings(
        # Logits near 0, as in training: far ones make numbers too small for fast products.
        weight=torch.empty(ids, drafter.hidden_size).normal_(std=0.02),
        loss=LossConfig(),
        cap=drafter.final_logit_softcapping,
        num_candidates=drafter.selector_top_k or 0,
        chunk=slots,
    )
    products = 2 * 2 * slots * ids * drafter.hidden_size
    return products / _seconds(lambda: sweep_head(hidden, targets, head))


def _rows(drafter: DrafterConfig, load: Load) -> int:
    return max(16, min(MOST_ROWS, int(load.blocks * drafter.block_size)))


def _seconds(action: Callable[[], object]) -> float:
    """Give the median of a few runs after two that warm up."""
    for _ in range(2):
        action()
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        action()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def resident_bytes() -> int:
    """Give what this process holds now."""
    return psutil.Process().memory_info().rss
