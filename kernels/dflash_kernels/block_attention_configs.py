"""How the kernels of block attention are launched on each GPU, and what a report compiles of them.

The tables were chosen without a GPU: of the tiles that compile without spills those with the most
products for each number loaded, as long as a tile's rows walk few keys that they do not see. The
edge of a walk, where rows differ in what they see, takes smaller steps than its inside.
"""

from dataclasses import dataclass
from typing import Any

import torch

from dflash_kernels._launch import Arch, Config, Specimen
from dflash_kernels.block_attention_backward import (
    context_gradient_kernel,
    own_gradient_kernel,
    query_gradient_kernel,
)
from dflash_kernels.block_attention_forward import forward_kernel
from dflash_kernels.block_tiles import Packing

LARGEST_HEAD_DIM = 256
OWN_KEYS = 16
"""Keys of a step over own blocks: the fewest that products take."""


@dataclass(frozen=True, kw_only=True)
class Configs:
    """How the four kernels are launched."""

    forward: Config
    own_gradient: Config
    query_gradient: Config
    context_gradient: Config


def query_config(
    rows: int, keys: int, edge_keys: int, *, num_warps: int = 8, num_stages: int = 2
) -> Config:
    """Give the configuration of a kernel whose tiles are of rows, and walk keys."""
    tiles = {"ROWS": rows, "KEYS": keys, "EDGE_KEYS": edge_keys, "OWN_KEYS": OWN_KEYS}
    return Config(num_warps=num_warps, num_stages=num_stages, tiles=tiles)


def context_config(rows: int, keys: int, *, num_warps: int = 8, num_stages: int = 2) -> Config:
    """Give the configuration of the kernel whose tiles are of keys, and walk rows."""
    return Config(num_warps=num_warps, num_stages=num_stages, tiles={"ROWS": rows, "KEYS": keys})


def own_config(rows: int, *, num_warps: int = 4) -> Config:
    """Give the configuration of the kernel that goes over the rows of one block."""
    return Config(num_warps=num_warps, num_stages=1, tiles={"ROWS": rows})


HEADS_OF_128 = {
    Arch.sm_80: Configs(
        forward=query_config(128, 64, 32, num_stages=3),
        own_gradient=own_config(64),
        query_gradient=query_config(128, 32, 32),
        context_gradient=context_config(64, 64),
    ),
    Arch.sm_89: Configs(
        forward=query_config(128, 64, 32),
        own_gradient=own_config(64),
        query_gradient=query_config(64, 32, 32, num_warps=4),
        context_gradient=context_config(64, 64),
    ),
    Arch.sm_90: Configs(
        forward=query_config(128, 128, 32),
        own_gradient=own_config(64),
        query_gradient=query_config(128, 64, 32),
        context_gradient=context_config(64, 128),
    ),
    Arch.sm_100: Configs(
        forward=query_config(128, 128, 32),
        own_gradient=own_config(64),
        query_gradient=query_config(128, 64, 32),
        context_gradient=context_config(64, 128),
    ),
    Arch.gfx942: Configs(
        forward=query_config(128, 64, 32),
        own_gradient=own_config(64),
        query_gradient=query_config(128, 32, 32, num_stages=1),
        context_gradient=context_config(32, 128, num_warps=4, num_stages=1),
    ),
}
"""bf16 and fp16, head dims up to 128."""
HEADS_OF_256 = {
    Arch.sm_80: Configs(
        forward=query_config(64, 32, 32),
        own_gradient=own_config(32),
        query_gradient=query_config(64, 32, 32),
        context_gradient=context_config(32, 32),
    ),
    Arch.sm_89: Configs(
        forward=query_config(64, 32, 32),
        own_gradient=own_config(32),
        query_gradient=query_config(64, 32, 32, num_stages=1),
        context_gradient=context_config(32, 32),
    ),
    Arch.sm_90: Configs(
        forward=query_config(128, 32, 32),
        own_gradient=own_config(32),
        query_gradient=query_config(64, 32, 32),
        context_gradient=context_config(32, 64),
    ),
    Arch.sm_100: Configs(
        forward=query_config(64, 64, 32),
        own_gradient=own_config(32),
        query_gradient=query_config(64, 64, 32),
        context_gradient=context_config(64, 64, num_stages=1),
    ),
    Arch.gfx942: Configs(
        forward=query_config(64, 32, 32, num_warps=4, num_stages=1),
        own_gradient=own_config(32),
        query_gradient=query_config(64, 32, 32, num_warps=4, num_stages=1),
        context_gradient=context_config(32, 32, num_warps=4, num_stages=1),
    ),
}
"""bf16 and fp16, head dims up to 256, which targets of Gemma and Qwen 3.5 have."""
FLOAT32 = Configs(
    forward=query_config(32, 32, 32, num_warps=4),
    own_gradient=own_config(32),
    query_gradient=query_config(32, 32, 32, num_warps=4),
    context_gradient=context_config(32, 32, num_stages=1),
)
"""Every GPU; NVIDIA's have no fast products of float32, so this is for checks."""
FLOAT32_HEADS_OF_256 = Configs(
    forward=query_config(16, 16, 16, num_warps=4, num_stages=1),
    own_gradient=own_config(16),
    query_gradient=query_config(16, 16, 16, num_warps=4, num_stages=1),
    context_gradient=context_config(16, 16, num_warps=4, num_stages=1),
)
INTERPRETED = Configs(
    forward=query_config(64, 64, 64),
    own_gradient=own_config(64),
    query_gradient=query_config(64, 64, 64),
    context_gradient=context_config(64, 64),
)
"""Large tiles: the interpreter's time goes by operations, not by numbers."""


def configs_for(arch: Arch, *, dtype: torch.dtype, head_dim: int) -> Configs:
    """Give the tiles of an architecture.

    Raises:
        ValueError: There are none for this head dim.
    """
    if head_dim > LARGEST_HEAD_DIM:
        raise ValueError(
            f"head_dim (={head_dim}) must be at most {LARGEST_HEAD_DIM} for the Triton kernels. "
            "Set launch.kernels=torch."
        )
    if arch is Arch.interpreter:
        return INTERPRETED
    if dtype == torch.float32:
        return FLOAT32 if head_dim <= 128 else FLOAT32_HEADS_OF_256
    return (HEADS_OF_128 if head_dim <= 128 else HEADS_OF_256)[arch]


def table_sizes(config: Config) -> dict[str, int]:
    """Give the tile sizes that a table of `block_tiles.py` depends on."""
    return {name.lower(): size for name, size in config.tiles.items() if name != "OWN_KEYS"}


def block_width(packing: Packing) -> int:
    """Give K, padded to a number of keys that products take."""
    return _padded(packing.num_slots)


def _padded(size: int) -> int:
    """Give the least power of two that products take."""
    return max(16, 1 << (size - 1).bit_length())


def constants(
    kernel: Any,
    packing: Packing,
    *,
    num_kv_heads: int,
    head_dim: int,
    is_causal: bool,
) -> dict[str, Any]:
    """Give the constexpr arguments of a kernel, tiles apart."""
    values = {
        "NUM_SLOTS": packing.num_slots,
        "SHARE": packing.share,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "WIDE_DIM": _padded(head_dim),
        "WINDOW": packing.window,
        "IS_CAUSAL": is_causal,
        "BLOCK_KEYS": block_width(packing),
    }
    return {name: value for name, value in values.items() if name in kernel.arg_names}


KERNELS = {
    "forward": forward_kernel,
    "own_gradient": own_gradient_kernel,
    "query_gradient": query_gradient_kernel,
    "context_gradient": context_gradient_kernel,
}
"""By the names of the fields of `Configs`."""
QWEN3_8B = {"num_kv_heads": 8, "head_dim": 128}
QWEN3_8B_PACKING = Packing(num_slots=16, share=4, window=None)


def kernels_to_compile(arch: Arch) -> list[Specimen]:
    """Give the four kernels in bf16 at the shapes of Qwen3-8B."""
    return [_specimen(stage, arch) for stage in KERNELS]


def _specimen(stage: str, arch: Arch) -> Specimen:
    kernel = KERNELS[stage]
    configs = configs_for(arch, dtype=torch.bfloat16, head_dim=QWEN3_8B["head_dim"])
    config: Config = getattr(configs, stage)
    values = constants(kernel, QWEN3_8B_PACKING, is_causal=False, **QWEN3_8B)
    if "widths" in kernel.arg_names:
        values["widths"] = None
    others = {
        "lse": "*fp32:16", "delta": "*fp32:16", "anchors": "*i64:16", "tiles": "*i32:16",
        "scale": "fp32",
    }  # fmt: skip
    return Specimen(
        name=f"block_attention {stage.replace('_', ' ')}, bf16",
        kernel=kernel,
        signature={
            name: others.get(name, "*bf16:16")
            for name in kernel.arg_names
            if name not in values and name not in config.tiles
        },
        constexprs=values,
        config=config,
    )
