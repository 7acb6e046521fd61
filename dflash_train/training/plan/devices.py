"""What GPUs can do, by their makers' data sheets, and which share of it a training step reaches.

Rates are dense: data sheets of NVIDIA print twice as much "with sparsity".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dflash_train.config import require

REACHED_MATRIX = 0.65
"""Share of the data sheet's rate that large products of bf16 reach in training steps."""
REACHED_BATCHED = 0.30
"""Share that many small products reach, as attention's are."""
REACHED_BANDWIDTH = 0.80
"""Share of the memory's bandwidth that passes over large tensors reach."""
GPUS_PER_NODE = 8
NETWORK = 50e9
"""Bytes per second and GPU between nodes: one 400 Gbit/s adapter per GPU."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of GPU, or this machine as it was measured."""

    name: str
    matrix_flops: float
    """Operations per second of large matrix products."""
    batched_flops: float
    """The same of many small ones."""
    bandwidth: float
    """Bytes per second, read and written, of passes over large tensors."""
    memory_bytes: float
    link: float
    """Bytes per second that one device sends to others of its node."""
    peak_flops: float | None = None
    """The data sheet's rate of matrix products, which MFU is a share of; None if unknown."""
    whole_rates: Mapping[str, float] = field(default_factory=dict)
    """Operations per second of parts that were timed as a whole, their passes included."""


@dataclass(frozen=True, kw_only=True)
class _Sheet:
    """One line of the table, in the units of data sheets."""

    bf16: float
    """TFLOP/s, dense, bfloat16 inputs."""
    fp32: float
    """TFLOP/s, float32 without tensor cores: torch leaves TF32 off."""
    memory: float
    """GB."""
    bandwidth: float
    """GB/s."""
    link: float
    """GB/s in one direction."""


SHEETS = {
    # nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet.pdf
    "a100": _Sheet(bf16=312, fp32=19.5, memory=80, bandwidth=2039, link=300),
    "a100-40": _Sheet(bf16=312, fp32=19.5, memory=40, bandwidth=1555, link=300),
    # resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet (H100 SXM)
    "h100": _Sheet(bf16=989, fp32=67, memory=80, bandwidth=3350, link=450),
    # nvidia.com/en-us/data-center/h200 (H200 SXM)
    "h200": _Sheet(bf16=989, fp32=67, memory=141, bandwidth=4800, link=450),
    # nvidia.com/en-us/data-center/hgx: HGX B200, an eighth of each figure
    "b200": _Sheet(bf16=2250, fp32=75, memory=180, bandwidth=7700, link=900),
    # resources.nvidia.com/en-us-l40s/l40s-datasheet-28413; PCIe 4.0 x16
    "l40s": _Sheet(bf16=362, fp32=91.6, memory=48, bandwidth=864, link=32),
    # images.nvidia.com: NVIDIA Ada GPU architecture, appendix A; PCIe 4.0 x16
    "rtx4090": _Sheet(bf16=165.2, fp32=82.6, memory=24, bandwidth=1008, link=32),
    # amd.com: Instinct MI300X data sheet
    "mi300x": _Sheet(bf16=1307, fp32=163.4, memory=192, bandwidth=5300, link=448),
}  # fmt: skip


def device_named(name: str, *, is_bf16: bool) -> Device:
    """Give what steps of a run can expect of one kind of GPU.

    Raises:
        ValueError: The table has no such kind.
    """
    require(
        name in SHEETS,
        f"plan.gpu (={name}) is not in the table. Known: {', '.join(SHEETS)}; null measures this "
        "machine.",
    )
    sheet = SHEETS[name]
    peak = 1e12 * (sheet.bf16 if is_bf16 else sheet.fp32)
    return Device(
        name=name,
        matrix_flops=REACHED_MATRIX * peak,
        batched_flops=REACHED_BATCHED * peak,
        bandwidth=REACHED_BANDWIDTH * 1e9 * sheet.bandwidth,
        memory_bytes=1e9 * sheet.memory,
        link=1e9 * sheet.link,
        peak_flops=peak,
    )


def name_in_table(product_name: str) -> str | None:
    """Give the row of the GPU that its driver calls so, None if the table has none."""
    plain = product_name.lower().replace(" ", "")
    known = [name for name in SHEETS if name in plain]
    return max(known, key=len) if known else None


def local_gpu() -> str | None:
    """Give the row of this machine's first GPU, None if there is none or it is not known."""
    return name_in_table(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None


def peak_flops_of(product_name: str, *, is_bf16: bool) -> float | None:
    """Give the data sheet's rate of the GPU that its driver calls so, None if it is not known."""
    name = name_in_table(product_name)
    if name is None:
        return None
    return 1e12 * (SHEETS[name].bf16 if is_bf16 else SHEETS[name].fp32)
