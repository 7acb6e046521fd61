"""What a training step holds by torch's own account: bytes of its allocator, not of the process.

A process holds more: what its libraries set up, products that oneDNN has compiled, and free memory
that the allocator keeps. The account counts neither, so it is the figure that formulas can be held
to, and the same on every machine. On a GPU `torch.cuda.max_memory_allocated` gives it; on a CPU
the profiler notes each allocation and each release.
"""

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def live_growth(action: Callable[[], object]) -> int:
    """Give the most bytes that an action holds at one time above what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        action()
    with tempfile.TemporaryDirectory(prefix="dflash-trace-") as folder:
        trace = Path(folder) / "trace.json"
        found.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def storages() -> dict[int, int]:
    """Give the bytes of every storage that a tensor of this process refers to, by its address."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in _TENSORS]
    found = [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


_TENSORS = (Tensor, torch.nn.Parameter)
