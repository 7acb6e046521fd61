"""Time and memory of one optimiser step, measured from inside its process.

Memory is the growth of peak resident memory during a step over what is resident before it, when
model, batch and optimiser exist and one step has been taken (AdamW allocates its moments in the
first). Linux only: the kernel's own high-water mark is reset before each step, so no sample is
missed.
"""

import ctypes
import gc
import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW

PROCESS = Path("/proc/self")
MIB = 2**20


class TrainingStep(Protocol):
    """What is measured: a loss over some parameters."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters."""
        ...

    def loss(self) -> Tensor:
        """Give the scalar loss with its graph."""
        ...

    def slot_losses(self) -> Tensor:
        """Give `[A, K]`, the cross entropy of the token at every slot's place in the row."""
        ...


class Stepper:
    """Takes optimiser steps of one contender."""

    def __init__(self, step: TrainingStep) -> None:
        """Build the optimiser: fused AdamW, the fastest of torch on a CPU."""
        self.step = step
        self.optimizer = AdamW(step.parameters, lr=1e-5, weight_decay=0.0, fused=True)

    def take(self) -> float:
        """Run forward, loss, backward, clipping and update once and give the loss."""
        loss = self.step.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.step.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def seconds(self) -> float:
        """Give the wall-clock seconds of one step."""
        started = time.perf_counter()
        self.take()
        return time.perf_counter() - started

    def growth_mib(self) -> float:
        """Give the growth of peak resident memory during one step.

        Memory that earlier steps freed is handed back first, so it is neither counted as state nor
        hidden from the peak. That slows the step, which is why time is taken of other steps.
        """
        before = _settle()
        self.take()
        return _resident_mib("VmHWM") - before


def kept_mib(forward: Callable[[], Tensor], parameters: list[nn.Parameter]) -> float:
    """Give the MiB that autograd keeps for the backward pass, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        # A copy without history: the tensor itself would refer to the graph that holds it.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # the graph lives until all storages are counted
    del result
    return sum(kept.values()) / MIB


def describe_machine(threads: int) -> dict[str, object]:
    """Say where, when and with which versions a bench ran."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "machine": f"{found[1] if found else 'unknown'}, {os.cpu_count()} cores",
        "threads": threads,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def _settle() -> float:
    """Return freed memory to the system, reset the peak and give resident MiB."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    (PROCESS / "clear_refs").write_text("5")
    return _resident_mib("VmRSS")


def _resident_mib(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", (PROCESS / "status").read_text())
    assert found is not None
    return int(found[1]) / 1024
