"""What a person watches during training: a bar on stderr, and the speed of the run.

tqdm's one line stays readable in a log file and under `accelerate launch`; a live table of Rich
does not, and messages of other stages go through `tqdm.write`.
"""

import resource
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from dflash_train.training.metrics import TrainingCounts

CLOCKED = (
    "blocks_per_second",
    "tokens_per_second",
    "tflops_per_second",
    "mfu",
    "peak_memory_gib",
    "seconds",
)
"""Keys of a line of metrics.jsonl that clock and machine decide; equal runs agree in all others."""
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What a run's speed is measured by."""

    flops_per_block: float
    """Operations of products that one training block takes, those done twice counted once."""
    peak_flops: float | None
    """Operations per second of all devices by their data sheets; None where that is not known."""
    device: torch.device


class Progress:
    """A progress bar with loss, acceptance, speed and time left, used as a `with` block.

    Speeds are those of this process since `new_window`; they never enter a train state.
    """

    def __init__(self, *, total: int, done: int, is_shown: bool, yardstick: Yardstick) -> None:
        """Draw the bar.

        Args:
            total: Optimiser steps of the run.
            done: Steps that an earlier process has finished.
            is_shown: False draws nothing, as on ranks other than 0.
            yardstick: Operations of a block and of the hardware.
        """
        self._bar = tqdm(
            total=total,
            initial=done,
            desc="train",
            unit="step",
            file=sys.stderr,
            mininterval=1.0,
            dynamic_ncols=True,
            disable=not is_shown,
        )
        self._yardstick = yardstick
        self.acceptance: float | None = None
        """Pooled acceptance length of the last validation."""
        self.new_window()

    def new_window(self) -> None:
        """Measure speed from here on."""
        self._seconds = 0.0
        self._num_blocks = 0
        self._num_tokens = 0
        if self._yardstick.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._yardstick.device)

    def advance(self, counts: TrainingCounts, seconds: float) -> None:
        """Count one finished step."""
        self._seconds += seconds
        self._num_blocks += counts.num_blocks
        self._num_tokens += counts.num_tokens
        acceptance = "-" if self.acceptance is None else f"{self.acceptance:.2f}"
        rates = self.rates()
        mfu = rates["mfu"]
        share = "" if mfu is None else f", MFU {mfu:.0%}"
        self._bar.set_postfix_str(
            f"loss {counts.loss:.3f}, acceptance {acceptance}, "
            f"{rates['blocks_per_second']:.0f} blocks/s, {rates['tokens_per_second']:.0f} tokens/s"
            f"{share}, {rates['peak_memory_gib']:.1f} GiB",
            refresh=False,
        )
        self._bar.update()

    def rates(self) -> dict[str, float | None]:
        """Give the speed of training, validations and saves left out, and the peak of memory.

        Blocks, tokens and operations are those of all processes; memory is this one's, on its GPU
        since `new_window`, else in main memory since it started.
        """
        flops = self._num_blocks * self._yardstick.flops_per_block / self._seconds
        peak = self._yardstick.peak_flops
        return {
            "blocks_per_second": round(self._num_blocks / self._seconds, 2),
            "tokens_per_second": round(self._num_tokens / self._seconds, 1),
            "tflops_per_second": round(flops / 1e12, 4),
            "mfu": None if peak is None else round(flops / peak, 4),
            "peak_memory_gib": round(peak_memory_bytes(self._yardstick.device) / _GIB, 3),
        }

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.close()


def peak_memory_bytes(device: torch.device) -> int:
    """Give the most memory that this process has held, of its GPU if it has one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
