"""Attention of many blocks to their documents' context and to themselves, one softmax over both.

The torch definition is `dflash_train.drafter.block_attention`. Queries see context keys of their
document before their anchor (and within a window), and slots of their own block; what no query of a
tile sees is never loaded or multiplied, so work grows with the visible area. This file launches the
kernels of `block_attention_forward.py` and `_backward.py` over the schedule of `block_tiles.py`;
tile sizes by GPU are in `_configs.py`, and `_work.py` counts what is done.

Legend: A blocks, K slots of a block, T context rows of all documents laid end to end, H heads,
G kv heads, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dflash_kernels._launch import Config, arch_of, on_device_of
from dflash_kernels.block_attention_configs import (
    KERNELS,
    Configs,
    configs_for,
    constants,
    kernels_to_compile,
    table_sizes,
)
from dflash_kernels.block_attention_work import work
from dflash_kernels.block_tiles import BlockLayout, Packing, key_tiles, query_tiles

__all__ = ["BlockLayout", "block_attention", "kernels_to_compile", "work"]


def block_attention(
    q_AKHD: Tensor,
    context_k_TGD: Tensor,
    context_v_TGD: Tensor,
    block_k_AKGD: Tensor,
    block_v_AKGD: Tensor,
    *,
    layout: BlockLayout,
    is_causal: bool,
    window: int | None,
    configs: Configs | None = None,
) -> Tensor:
    """Attend from every block to its document's context before the anchor and to itself.

    Slot i of the block at anchor a sees context row t iff t < a and a + i - t < window, and slot j
    of its block iff it exists (j < width; a slot always meets itself), abs(i - j) < window and, if
    causal, j <= i. Scores are scaled by D**-0.5.

    Args:
        q_AKHD: Queries; the heads of one kv head stand together.
        context_k_TGD: Keys of the context, shared by all blocks.
        context_v_TGD: Values of the context.
        block_k_AKGD: Keys of the blocks' own slots.
        block_v_AKGD: Values of the blocks' own slots. Everything is computed in their dtype, with
            sums in float32.
        layout: Where the blocks stand; one object for all layers, which builds the schedule once.
        is_causal: Slots see no later slot of their block.
        window: W, in tokens; None is no limit.
        configs: Tile sizes; None takes those of the device.

    Returns:
        `[A, K, H, D]`.

    Raises:
        ValueError: The layout is not one of these tensors, or D is too large.
        RuntimeError: No kernel runs on their device.
    """
    dtype, head_dim = block_v_AKGD.dtype, q_AKHD.shape[-1]
    layout.check(num_blocks=len(q_AKHD), num_context=len(context_k_TGD), device=q_AKHD.device)
    call = _Call(
        layout=layout,
        packing=Packing(
            num_slots=q_AKHD.shape[1], share=q_AKHD.shape[2] // block_k_AKGD.shape[2], window=window
        ),
        is_causal=is_causal,
        configs=configs or configs_for(arch_of(q_AKHD.device), dtype=dtype, head_dim=head_dim),
    )
    tensors = (q_AKHD, context_k_TGD, context_v_TGD, block_k_AKGD, block_v_AKGD)
    return _BlockAttention.apply(*(each.to(dtype).contiguous() for each in tensors), call)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What a call has beside tensors."""

    layout: BlockLayout
    packing: Packing
    is_causal: bool
    configs: Configs

    def query_table(self, config: Config) -> Tensor:
        """Give the schedule of a kernel whose tiles are of rows."""
        return self.layout.tiles(query_tiles, self.packing, **table_sizes(config))

    def key_table(self) -> Tensor:
        """Give the schedule of the kernel whose tiles are of context keys."""
        return self.layout.tiles(
            key_tiles, self.packing, **table_sizes(self.configs.context_gradient)
        )

    def launch(self, stage: str, num_tiles: int, shape: torch.Size, arguments: Sequence[Any]):
        """Launch one of `KERNELS` over all tiles and kv heads of keys `[..., G, D]`."""
        *_, num_kv_heads, head_dim = shape
        kernel, config = KERNELS[stage], getattr(self.configs, stage)
        fixed = constants(
            kernel, self.packing, num_kv_heads=num_kv_heads, head_dim=head_dim,
            is_causal=self.is_causal,
        )  # fmt: skip
        kernel[(num_tiles * num_kv_heads,)](
            *arguments, scale=head_dim**-0.5, **fixed, **config.arguments()
        )


class _BlockAttention(torch.autograd.Function):
    """Keeps its inputs, its output and a log-sum-exp per row; computes weights again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        context_k: Tensor,
        context_v: Tensor,
        block_k: Tensor,
        block_v: Tensor,
        call: _Call,
    ) -> Tensor:
        """Give `[A, K, H, D]`."""
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        anchors, widths = call.layout.anchor_positions, call.layout.widths
        table = call.query_table(call.configs.forward)
        with on_device_of(q):
            call.launch("forward", len(table), block_k.shape, (
                q, context_k, context_v, block_k, block_v, out, lse, anchors, widths, table,
            ))  # fmt: skip
        ctx.save_for_backward(q, context_k, context_v, block_k, block_v, out, lse)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] the decorator hides names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Give the gradients of queries, context and own keys and values."""
        q, context_k, context_v, block_k, block_v, out, lse = ctx.saved_tensors
        call: _Call = ctx.call
        anchors, widths, shape = call.layout.anchor_positions, call.layout.widths, block_k.shape
        d_out, delta = grads[0].contiguous(), torch.empty_like(lse)
        d_q, d_context_k, d_context_v, d_block_k, d_block_v = (
            torch.empty_like(tensor) for tensor in (q, context_k, context_v, block_k, block_v)
        )
        query_table, key_table = call.query_table(call.configs.query_gradient), call.key_table()
        with on_device_of(q):
            call.launch("own_gradient", len(q), shape, (  # first: it writes delta
                q, block_k, block_v, out, d_out, lse, delta, d_block_k, d_block_v, widths,
            ))  # fmt: skip
            call.launch("query_gradient", len(query_table), shape, (
                q, context_k, context_v, block_k, block_v, d_out, lse, delta, d_q, anchors, widths,
                query_table,
            ))  # fmt: skip
            call.launch("context_gradient", len(key_table), shape, (
                q, context_k, context_v, d_out, lse, delta, d_context_k, d_context_v, anchors,
                key_table,
            ))  # fmt: skip
        return d_q, d_context_k, d_context_v, d_block_k, d_block_v, None
