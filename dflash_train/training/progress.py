"""What a person watches during training: a bar on stderr, and the speed of this process."""

import sys

from tqdm import tqdm

from dflash_train.training.metrics import TrainingCounts


class Progress:
    """A progress bar with loss, acceptance, speed and time left, used as a `with` block.

    Speeds are those of this process since `new_window`; they never enter a train state.
    """

    def __init__(self, *, total: int, done: int, is_shown: bool) -> None:
        """Draw the bar.

        Args:
            total: Optimiser steps of the run.
            done: Steps that an earlier process has finished.
            is_shown: False draws nothing, as on ranks other than 0.
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
        self.acceptance: float | None = None
        """Pooled acceptance length of the last validation."""
        self.new_window()

    def new_window(self) -> None:
        """Measure speed from here on."""
        self._seconds = 0.0
        self._num_blocks = 0
        self._num_tokens = 0

    def advance(self, counts: TrainingCounts, seconds: float) -> None:
        """Count one finished step."""
        self._seconds += seconds
        self._num_blocks += counts.num_blocks
        self._num_tokens += counts.num_tokens
        acceptance = "-" if self.acceptance is None else f"{self.acceptance:.2f}"
        rates = self.rates()
        self._bar.set_postfix_str(
            f"loss {counts.loss:.3f}, acceptance {acceptance}, "
            f"{rates['blocks_per_second']:.0f} blocks/s, {rates['tokens_per_second']:.0f} tokens/s",
            refresh=False,
        )
        self._bar.update()

    def rates(self) -> dict[str, float]:
        """Give blocks and tokens per second of training, validations and saves left out."""
        return {
            "blocks_per_second": round(self._num_blocks / self._seconds, 2),
            "tokens_per_second": round(self._num_tokens / self._seconds, 1),
        }

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.close()
