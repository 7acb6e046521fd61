"""Where the time of an optimiser step goes: data, target, forward, backward, and so on.

Each moment of a step belongs to exactly one phase, so phases add up to the step; an inner phase
takes its time from the outer one. On a GPU a mark is an event in the stream, which is read when a
line of metrics is written: nothing waits for the device in between. What a wrapper exchanges inside
the backward pass, overlapped with it, counts as backward.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DATA, TARGET, FORWARD, BACKWARD = "data", "target", "forward", "backward"
OPTIMIZER, COMMUNICATION, OTHER = "optimizer", "communication", "other"
PHASES = (DATA, TARGET, FORWARD, BACKWARD, OPTIMIZER, COMMUNICATION, OTHER)


class StepTimers:
    """Seconds by phase since `new_window`, of the steps alone."""

    def __init__(self, device: torch.device) -> None:
        """Stand still until a step begins."""
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._open: list[str] = []
        self._last: float | torch.cuda.Event | None = None
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.new_window()

    def new_window(self) -> None:
        """Count from here on."""
        self._seconds: dict[str, float] = {name: 0.0 for name in PHASES}
        self._events.clear()
        self._num_steps = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure one optimiser step; what is in no phase is `other`."""
        self._last, self._open = self._now(), [OTHER]
        try:
            yield
        finally:
            self._mark()
            self._open, self._last = [], None
        self._num_steps += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Give the time of a block to a phase; outside of a step nothing is measured."""
        if not self._open:
            yield
            return
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Give the mean seconds of a step by phase, and of the whole `step`."""
        self._read_events()
        steps = max(1, self._num_steps)
        by_phase = {name: round(total / steps, 6) for name, total in self._seconds.items()}
        return by_phase | {"step": round(sum(self._seconds.values()) / steps, 6)}

    def _now(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _mark(self) -> None:
        """Give the time since the last mark to the phase that was open."""
        now, last, name = self._now(), self._last, self._open[-1]
        if isinstance(now, torch.cuda.Event):
            assert isinstance(last, torch.cuda.Event)
            self._events.append((name, last, now))
        else:
            assert isinstance(last, float)
            self._seconds[name] += now - last
        self._last = now

    def _read_events(self) -> None:
        if self._events:
            self._events[-1][2].synchronize()
        for name, first, second in self._events:
            self._seconds[name] += first.elapsed_time(second) / 1000
        self._events.clear()
