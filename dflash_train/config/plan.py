"""What `train --dry-run` plans for: `plan.gpu=h100 plan.num_gpus=8`."""

from dataclasses import dataclass
from enum import Enum

from dflash_train.config.checks import require


class Sharding(Enum):
    """What the GPUs divide among themselves; the rest each of them holds whole."""

    none = "none"
    """Nothing (DDP)."""
    zero2 = "zero2"
    """Gradients and optimiser states."""
    zero3 = "zero3"
    """Weights too (ZeRO-3, FSDP2)."""


@dataclass(kw_only=True)
class PlanConfig:
    """The hardware that a plan is for; no run reads it, so no stage grows stale by it."""

    gpu: str | None = None
    """Kind of GPU, such as h100: a row of the table in `training/plan/devices.py`. None plans for
    this machine, whose matrix rate and bandwidth are measured first."""
    num_gpus: int = 1
    """Processes of the run, one per GPU."""
    sharding: Sharding = Sharding.none
    """What the GPUs divide; it follows the accelerate configuration that will launch the run."""
    row_tokens: int | None = None
    """Tokens of a row, prompt and answer; None counts those of collected features, and without any
    takes the longest that the recipe allows."""

    def __post_init__(self) -> None:
        require(
            self.num_gpus >= 1,
            f"plan.num_gpus (={self.num_gpus}) must be at least 1. Set it to 8 for one node.",
        )
        require(
            self.row_tokens is None or self.row_tokens >= 2,
            f"plan.row_tokens (={self.row_tokens}) must be at least 2. Leave it out.",
        )
