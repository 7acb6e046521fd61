"""A window of steps under `torch.profiler`: `training.profile_steps=[10,12]`.

Each rank writes `profile/steps-10-12-rank0.json` below the run folder; Perfetto (ui.perfetto.dev)
and chrome://tracing open it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

FOLDER = "profile"


class ProfileWindow:
    """Profiles some neighbouring steps, used as a `with` block around all of them."""

    def __init__(self, steps: Sequence[int] | None, *, run_dir: Path, rank: int) -> None:
        """Remember the window.

        Args:
            steps: First and last step, counted from 1; None profiles nothing.
            run_dir: Folder of the run.
            rank: Of this process.
        """
        self._steps = None if steps is None else (steps[0], steps[-1])
        self._folder, self._rank = run_dir / FOLDER, rank
        self._running: profile | None = None

    def step(self, number: int) -> None:
        """Say that step `number` begins, counted from 1."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._running is None and first <= number <= last:
            self._running = _profiler()
            self._running.start()
        elif number > last:
            self._finish()

    def record(self, name: str) -> AbstractContextManager[object]:
        """Name a block of work in the trace."""
        return nullcontext() if self._running is None else torch.profiler.record_function(name)

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, *raised: object) -> None:
        self._finish()

    def _finish(self) -> None:
        """Stop and write the trace, if there is one."""
        running, self._running = self._running, None
        if running is None or self._steps is None:
            return
        running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        first, last = self._steps
        path = self._folder / f"steps-{first}-{last}-rank{self._rank}.json"
        running.export_chrome_trace(str(path))


def _profiler() -> profile:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities, profile_memory=True)
