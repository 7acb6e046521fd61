"""From `launch` of a recipe to an Accelerator; the only place that knows its plugins.

`python train.py` and `accelerate launch train.py` must be the same run, to the bit. `accelerate
launch` sets OMP_NUM_THREADS=1, and the number of threads decides how sums are split: so it is set
here, from the recipe or the machine, before anything is computed.

`launch.mixed_precision=bf16` means autocast on CUDA. On a CPU it means `cpu_products`: tensors stay
float32, and products may use bf16 units where the processor has them. Autocast would be many times
slower than float32 on a processor without such units.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
)

from dflash_train.config import LaunchConfig, Precision

PATIENCE = timedelta(days=1)
"""How long a process waits for the others before it gives up.

In `collect` the first process renders and plans the whole log while the others wait; torch's own
10 or 30 minutes end such a run in the middle. A process that dies is not waited for: the launcher
ends the others.
"""


def build_accelerator(config: LaunchConfig) -> Accelerator:
    """Set the threads of this process and give its Accelerator: CUDA if there is one, else CPU."""
    torch.set_num_threads(threads_per_process(config))
    has_cuda = torch.cuda.is_available()
    return Accelerator(
        cpu=not has_cuda,
        mixed_precision=config.mixed_precision.value if has_cuda else "no",
        # The schedule counts optimiser steps; accelerate would advance it once per process.
        step_scheduler_with_optimizer=False,
        # The drafter's only buffers are constants of RoPE.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )


@contextmanager
def cpu_products(config: LaunchConfig) -> Iterator[None]:
    """Let oneDNN run float32 products while the block lasts, if the recipe asks for bf16 on a CPU.

    It takes the processor's bf16 units if it likes; on an AMD EPYC without AMX it stays in float32
    and is 1.8 times as fast as the default. A processor without such units notices nothing.
    """
    if torch.cuda.is_available() or config.mixed_precision is not Precision.bf16:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def threads_per_process(config: LaunchConfig) -> int:
    """Give the recipe's threads, or this machine's usable cores divided among its processes."""
    if config.num_threads is not None:
        return config.num_threads
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, _usable_cores() // num_local_processes)


def _usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
