"""From `launch` of a recipe to an Accelerator; the only place that knows its plugins.

`python train.py` and `accelerate launch train.py` must be the same run, to the bit. `accelerate
launch` sets OMP_NUM_THREADS=1, and the number of threads decides how sums are split: so it is set
here, from the recipe or the machine, before anything is computed.

`launch.mixed_precision=bf16` means bf16 products with float32 masters: autocast on a GPU or under
DDP, bf16 shards of float32 weights under FSDP2, the engine's own masters under DeepSpeed. On a CPU
it means `cpu_products`: tensors stay float32, and products may use bf16 units where the processor
has them. Autocast would be many times slower than float32 on a processor without such units.

Which plugin runs is `accelerate launch --config_file recipes/launch/NAME.yaml`'s business; the
trainer calls the functions below and never asks.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dflash_train.config import LaunchConfig, Precision, require
from dflash_train.training.optim import MuonWithAdamW

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
    # DeepSpeed has a CPU of its own (DS_ACCELERATOR=cpu), which accelerate's `cpu` would override.
    uses_deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    precision = config.mixed_precision if has_cuda else Precision.no
    accelerator = Accelerator(
        cpu=not has_cuda and not uses_deepspeed,
        mixed_precision=precision.value,
        fsdp_plugin=_fsdp_plugin(precision) if has_cuda else None,
        # The schedule counts optimiser steps; accelerate would advance it once per process.
        step_scheduler_with_optimizer=False,
        # The drafter's only buffers are constants of RoPE.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    if accelerator.deepspeed_plugin is not None:
        # Under ZeRO-3 transformers would cut the target, too, whose frozen head must stay whole.
        unset_hf_deepspeed_config()
    return accelerator


def _fsdp_plugin(precision: Precision) -> FullyShardedDataParallelPlugin | None:
    """Give the launch file's FSDP with gradients summed in float32 and outputs left as they are.

    accelerate's own bf16 policy would round the loss to 8 bits and sum gradients in bf16.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    plugin = FullyShardedDataParallelPlugin(
        mixed_precision_policy=bf16 if precision is Precision.bf16 else None
    )
    require(
        plugin.fsdp_version == 2,
        f"fsdp_version (={plugin.fsdp_version}) of the launch file must be 2: the first version "
        "joins parameters of several modules. Use recipes/launch/fsdp2.yaml.",
    )
    return plugin


def prepare_training(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    max_grad_norm: float,
) -> tuple[Any, Any, Any]:
    """Wrap model, optimiser and schedule for this launch, and give them back.

    Args:
        accelerator: From `build_accelerator`.
        model: Reads all its weights inside its forward pass.
        optimizer: Over the model's parameters.
        schedule: Stepped once after every optimiser step.
        max_grad_norm: DeepSpeed clips inside its engine; all others on `clip_grad_norm_`.

    Raises:
        ValueError: The optimiser cannot work on parts of weights.
    """
    layout = state_layout(accelerator)
    require(
        layout == "whole" or not isinstance(optimizer, MuonWithAdamW),
        f"optim.name (=muon) needs whole matrices, and this launch (={layout}) holds parts. Use "
        "recipes/launch/ddp.yaml or optim.name=adamw.",
    )
    plugin = accelerator.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config.update(
            # Packs have no fixed size, and the loss is divided by its own count.
            train_micro_batch_size_per_gpu=1,
            gradient_clipping=max_grad_norm,
            communication_data_type="fp32",
        )
    return accelerator.prepare(model, optimizer, schedule)


@contextmanager
def micro_batch(
    accelerator: Accelerator, model: nn.Module, *, is_last: bool, launch: LaunchConfig
) -> Iterator[None]:
    """Run one forward and backward pass; gradients meet over ranks on the last one of a step.

    On the last one DeepSpeed also clips and steps, inside `accelerator.backward`.
    """
    accelerator.sync_gradients = is_last  # what DeepSpeed's engine is asked with
    with cpu_products(launch):
        if is_last:
            yield
            return
        with accelerator.no_sync(model):
            yield


def state_layout(accelerator: Accelerator) -> str:
    """Name how this launch stores weights: `whole`, `fsdp2`, `zero2` and so on."""
    plugin = accelerator.deepspeed_plugin
    if plugin is not None:
        return f"zero{plugin.zero_stage}"
    return "fsdp2" if accelerator.distributed_type is DistributedType.FSDP else "whole"


def can_reshard(accelerator: Accelerator) -> bool:
    """Tell whether states of this launch can be read by another number of processes."""
    return accelerator.deepspeed_plugin is None


def whole_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor] | None:
    """Gather the float32 weights of a sharded model on every process, which all call this.

    Returns:
        Parameters by their names in the model as it was before `prepare_training`; None where
        every process has the whole model anyway.
    """
    if accelerator.deepspeed_plugin is not None:
        from deepspeed.utils import (  # pyright: ignore[reportMissingImports] an extra
            safe_get_full_fp32_param,
        )

        named = unwrapped(accelerator, model).named_parameters()
        masters: dict[str, Any] = {name: safe_get_full_fp32_param(each) for name, each in named}
        return masters
    if accelerator.distributed_type is DistributedType.FSDP:
        whole: dict[str, Any] = get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True)
        )
        return whole
    return None


def unwrapped(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Give the module that `prepare_training` has wrapped; its weights may be parts."""
    inner: Any = accelerator.unwrap_model(model)
    assert isinstance(inner, nn.Module)
    return inner


def sum_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Add a tensor up over all processes; the result is on the CPU."""
    if accelerator.num_processes == 1:
        return values
    total = accelerator.reduce(values.to(accelerator.device), reduction="sum")
    assert isinstance(total, Tensor)
    return total.cpu()


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
