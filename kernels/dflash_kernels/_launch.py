"""What launching a kernel takes, as data: where it runs, its tiles, and what the reports ask of it.

Every op picks a `Config` by `Arch`, so that the configuration that a GPU would run can be compiled
and counted on a machine without one. So every op also has two plain functions for the reports:
`kernels_to_compile(arch) -> list[Specimen]`, and `work(...) -> list[Work]`, one for each pass or
launch, whose defaults are Qwen3-8B's shapes.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from triton import knobs

SMALL_CHIPS = (12, 0), (12, 1), (8, 6), (8, 7), (8, 9)
"""Compute capabilities whose blocks have 99 KiB of shared memory (8.7 has more, and fits)."""


class Arch(StrEnum):
    """What a configuration is chosen by; the names are those of the compilers."""

    sm_80 = "sm_80"
    """A100: 163 KiB of shared memory a block."""
    sm_89 = "sm_89"
    """RTX 30, 40 and 50, A10, L4, L40: 99 KiB."""
    sm_90 = "sm_90"
    """H100, H200: 227 KiB, products of a whole warp group."""
    sm_100 = "sm_100"
    """B200: 227 KiB, tensor memory."""
    gfx942 = "gfx942"
    """MI300X: 64 KiB, warps of 64."""
    interpreter = "interpreter"
    """No device: `TRITON_INTERPRET=1` runs the kernels' Python with numpy."""


def is_interpreted() -> bool:
    """Tell whether this process interprets kernels; Triton reads `TRITON_INTERPRET` as it starts
    to define them, so one process never does both."""
    return knobs.runtime.interpret


def arch_of(device: torch.device) -> Arch:
    """Give the architecture whose configurations a device runs.

    Raises:
        RuntimeError: Nothing here runs on it: a CPU without interpreter, or a GPU before Ampere.
    """
    if is_interpreted():
        return Arch.interpreter
    if device.type != "cuda":  # ROCm's devices have this type, too
        raise RuntimeError(
            f"Triton kernels do not run on a {device.type}: use a CUDA or ROCm device, or set "
            "TRITON_INTERPRET=1 to interpret them, slowly."
        )
    if torch.version.hip is not None:
        return Arch.gfx942
    return _arch_of_capability(torch.cuda.get_device_capability(device))


def _arch_of_capability(capability: tuple[int, int]) -> Arch:
    if capability < (8, 0):
        raise RuntimeError(
            f"compute capability {capability[0]}.{capability[1]} is older than 8.0 and has no bf16."
        )
    if capability in SMALL_CHIPS:
        return Arch.sm_89
    known = {8: Arch.sm_80, 9: Arch.sm_90, 10: Arch.sm_100}
    return known.get(capability[0], Arch.sm_89)  # what fits the smallest fits an unknown one


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the tensor's device: Triton takes the current one, which may be another GPU."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


@dataclass(frozen=True, kw_only=True)
class Config:
    """How one kernel is launched."""

    num_warps: int
    num_stages: int
    """Tiles in flight of a pipelined loop."""
    tiles: Mapping[str, int]
    """Tile sizes, by the names of the kernel's constexpr arguments."""

    def arguments(self) -> dict[str, Any]:
        """Give the keyword arguments of the launch: `kernel[grid](..., **config.arguments())`."""
        return {**self.tiles, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """One kernel exactly as a GPU would run it, for a compiler without a GPU."""

    name: str
    """Op, pass and number format: `block_attention forward, bf16`."""
    kernel: Any
    """The `@triton.jit` function."""
    signature: Mapping[str, str | tuple[str, ...]]
    """Type of every argument that is no constexpr, in Triton's words: `*bf16`, `*i64`, `i32`,
    `fp32`. `:16` at the end (`*bf16:16`) says that the address or number is divisible by 16, as a
    launch finds out by itself. A tuple of tensors has a tuple of types."""
    constexprs: Mapping[str, Any]
    """Value of every constexpr argument, and None for each pointer that is not there; the
    configuration's tiles join by themselves."""
    config: Config


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one pass of an op does at given shapes, counted from the schedule that it walks."""

    name: str
    """Op and pass: `block_attention backward`."""
    flops: int
    """Of matrix products, 2 for each multiplication with its addition, padding included."""
    bound_flops: int
    """The fewest that the result takes: of the visible area alone, recomputation apart."""
    num_bytes: int
    """Read and written, each load and store of each program, as if no cache existed."""
    bound_bytes: int
    """Each operand read once and each result written once."""
