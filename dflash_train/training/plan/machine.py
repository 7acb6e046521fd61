"""How fast this machine is: rates of products and passes of the sizes that a plan has.

A second or two of timing on tensors of the planned micro-batch, so that caches and threads behave
as they will in training.
"""

import statistics
import time
from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from dflash_train.config import LaunchConfig
from dflash_train.drafter.config import DrafterConfig
from dflash_train.training.accelerator import cpu_products, threads_per_process
from dflash_train.training.plan.devices import Device
from dflash_train.training.plan.load import Load

REPEATS = 5
MOST_ROWS = 8192
"""Rows of a timed tensor: more would only take longer."""
OUT_OF_CACHE = 256 * 2**20
"""Bytes of all tensors of the timed passes."""
LOCAL_LINK = 10e9
"""Bytes per second between two processes of one machine; not measured."""


def measure_machine(drafter: DrafterConfig, load: Load, launch: LaunchConfig) -> Device:
    """Time the products of the MLP and of attention, and a pass over the MLP's rows.

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
    """Add a product of two tensors to a third, as norms and gates do, on rows of the MLP.

    Each call takes other tensors, enough of them to fall out of every cache, and new memory for its
    result, as a step does.
    """
    shape = (_rows(drafter, load), drafter.intermediate_size)
    num_sets = max(2, -(-OUT_OF_CACHE // (3 * 4 * shape[0] * shape[1])))
    sets = [tuple(torch.randn(shape) for _ in range(3)) for _ in range(num_sets)]

    def passes() -> None:
        for total, a, b in sets:
            torch.addcmul(total, a, b)

    return num_sets * 4 * 4 * shape[0] * shape[1] / _seconds(passes)


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
