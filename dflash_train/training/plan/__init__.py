"""What training would take, before it starts: `dflash-train train recipe=qwen3 --dry-run`.

Nothing is loaded and nothing is asked of a network: parameters are counted on a device that holds
none, memory and work follow from the drafter's own formulas, and the hardware is a row of a table
or this machine, timed for a moment.
"""

from dflash_train.training.plan.devices import Device, device_named, local_gpu
from dflash_train.training.plan.load import Load, Loads, loads_of_features, loads_of_recipe
from dflash_train.training.plan.machine import measure_machine, resident_bytes
from dflash_train.training.plan.memory import Memory, Setting, plan_memory
from dflash_train.training.plan.parameters import Parameters, count_parameters
from dflash_train.training.plan.plan import (
    Plan,
    TargetFacts,
    is_bf16,
    make_plan,
    peak_flops_of_run,
    run_flops_per_block,
)
from dflash_train.training.plan.work import Part, link_of, step_parts

__all__ = [
    "Device",
    "Load",
    "Loads",
    "Memory",
    "Parameters",
    "Part",
    "Plan",
    "Setting",
    "TargetFacts",
    "count_parameters",
    "device_named",
    "is_bf16",
    "link_of",
    "loads_of_features",
    "loads_of_recipe",
    "local_gpu",
    "make_plan",
    "measure_machine",
    "peak_flops_of_run",
    "plan_memory",
    "resident_bytes",
    "run_flops_per_block",
    "step_parts",
]
