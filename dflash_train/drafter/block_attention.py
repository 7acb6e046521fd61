"""Attention of many blocks to their documents' context and to themselves, one softmax over both.

The visibility rule is structure here, not a mask over all pairs. Neighbouring anchors of one
document form a group; a group's queries meet only the context rows that one of its slots can see
and each block its own K slots, so cost grows with A*K*(T + K). Scores exist for one group at a
time: the backward pass computes them again from the queries and keys, which is faster than reading
them back and leaves nothing of size A*K*T in memory. Anchors may come in any order, but groups cut
the context best when they ascend.

Legend: A blocks, a blocks of one group, K slots of a block, T context rows of all documents laid
end to end, t context rows that a group meets, G kv heads, R query heads per kv head, H = G * R
heads, M = K * R query rows of a block and kv head, D head dim.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dflash_train.drafter.config import Visibility

SCORES_AT_ONCE = {"cpu": 1 << 17}
"""Scores of one group, by device type: on a CPU they stay in the cache (measured)."""
SCORES_AT_ONCE_ELSEWHERE = 1 << 26


@dataclass(kw_only=True)
class Blocks:
    """Where the blocks of a packed row stand.

    Blocks are grouped by document in the order of the documents. Positions restart at 0 in each
    document.
    """

    context_offsets: list[int]
    """`[documents + 1]` bounds of each document in the context rows."""
    block_offsets: list[int]
    """`[documents + 1]` bounds of each document in the blocks."""
    anchor_positions: Tensor
    """`[A]` int64, position of each block's anchor in its document."""
    widths: Tensor | None = None
    """`[A]` int64, slots that exist in each block; None means all K."""

    def context_positions(self) -> Tensor:
        """Give `[T]` int64, the position of every context row in its document."""
        lengths = torch.tensor(self.context_offsets).diff().tolist()
        device = self.anchor_positions.device
        return torch.cat([torch.arange(length, device=device) for length in lengths])

    def slot_positions(self, num_slots: int) -> Tensor:
        """Give `[A, K]` int64, anchor position + slot."""
        slots = torch.arange(num_slots, device=self.anchor_positions.device)
        return self.anchor_positions[:, None] + slots


@dataclass
class ContextKV:
    """One layer's keys (normed and rotated) and values of the context, `[T, G, D]` each."""

    k: Tensor
    v: Tensor


def block_attention(
    q_AKHD: Tensor,
    context: ContextKV,
    block_k_AKGD: Tensor,
    block_v_AKGD: Tensor,
    *,
    blocks: Blocks,
    visibility: Visibility,
) -> Tensor:
    """Attend from every block to its document's context before the anchor and to itself.

    Returns:
        `[A, K, H, D]`.
    """
    num_blocks, num_slots, num_heads, head_dim = q_AKHD.shape
    num_kv_heads, dtype = context.k.shape[1], block_v_AKGD.dtype
    q_AKGRD = q_AKHD.unflatten(2, (num_kv_heads, -1)) * head_dim**-0.5
    out_GAMD = _GroupedAttention.apply(
        q_AKGRD.permute(2, 0, 1, 3, 4).flatten(2, 3).to(dtype),
        context.k.transpose(0, 1).to(dtype),
        context.v.transpose(0, 1).to(dtype),
        block_k_AKGD.permute(2, 0, 1, 3).to(dtype),
        block_v_AKGD.permute(2, 0, 1, 3),
        _groups(blocks, visibility, num_slots=num_slots, num_heads=num_heads),
    )
    out_GAKRD = out_GAMD.unflatten(2, (num_slots, -1))
    return out_GAKRD.permute(1, 2, 0, 3, 4).reshape(num_blocks, num_slots, num_heads, head_dim)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Blocks of one document and the context rows that at least one of their slots sees."""

    blocks: slice
    rows: slice
    edge: int
    """First of the group's context rows that is hidden from some of its slots."""
    hidden_rows: Tensor
    """`[a, 1, t - edge]` bool, or `[a, K, t - edge]` in a window: rows from `edge` on."""
    hidden_slots: Tensor | None
    """`[1, K, K]` or `[a, K, K]` bool; None where the slots of a block all see each other."""


def _groups(
    blocks: Blocks, visibility: Visibility, *, num_slots: int, num_heads: int
) -> list[_Group]:
    """Cut each document's blocks into groups of at most `SCORES_AT_ONCE` scores."""
    device = blocks.anchor_positions.device
    scores = SCORES_AT_ONCE.get(device.type, SCORES_AT_ONCE_ELSEWHERE)
    limit = scores // (num_heads * num_slots)  # keys, summed over the blocks of a group
    anchors = blocks.anchor_positions.tolist()
    groups = []
    for document in range(len(blocks.block_offsets) - 1):
        begin, end = blocks.block_offsets[document : document + 2]
        while begin < end:
            stop, low, high = begin, anchors[begin], anchors[begin]
            while stop < end:
                low, high = min(low, anchors[stop]), max(high, anchors[stop])
                seen = high - _first_row(low, visibility)
                if stop > begin and (stop + 1 - begin) * (seen + num_slots) > limit:
                    break
                stop += 1
            chosen = slice(begin, stop)
            groups.append(_group(blocks, visibility, chosen, document, num_slots=num_slots))
            begin = stop
    return groups


def _first_row(anchor: int, visibility: Visibility) -> int:
    """Give the first context position that slot 0 of a block sees, the earliest of its slots."""
    return 0 if visibility.window is None else max(0, anchor + 1 - visibility.window)


def _group(
    blocks: Blocks, visibility: Visibility, chosen: slice, document: int, *, num_slots: int
) -> _Group:
    anchors_a = blocks.anchor_positions[chosen]
    low, high = int(anchors_a.min()), int(anchors_a.max())
    first, offset = _first_row(low, visibility), blocks.context_offsets[document]
    edge = first if visibility.window is not None else low
    rows_t = torch.arange(edge, high, device=anchors_a.device)
    hidden_rows = rows_t >= anchors_a[:, None, None]
    slots_K = torch.arange(num_slots, device=anchors_a.device)
    if visibility.window is not None:
        positions_aK = anchors_a[:, None] + slots_K
        hidden_rows = hidden_rows | (positions_aK[:, :, None] - rows_t >= visibility.window)
    widths_a = None if blocks.widths is None else blocks.widths[chosen]
    return _Group(
        blocks=chosen,
        rows=slice(offset + first, offset + high),
        edge=edge - first,
        hidden_rows=hidden_rows,
        hidden_slots=_hidden_slots(visibility, slots_K, widths_a),
    )


def _hidden_slots(
    visibility: Visibility, slots_K: Tensor, widths_a: Tensor | None
) -> Tensor | None:
    """Mark pairs (query slot, key slot) of a block that do not meet.

    Each slot meets itself, also past the block's width: a row without any key would be NaN.
    """
    ahead_KK = slots_K - slots_K[:, None]  # how far the key stands after the query
    hidden = []
    if visibility.is_causal:
        hidden.append((ahead_KK > 0)[None])
    if visibility.window is not None:
        hidden.append((ahead_KK.abs() >= visibility.window)[None])
    if widths_a is not None:
        hidden.append((slots_K >= widths_a[:, None])[:, None] & (ahead_KK != 0))
    return functools.reduce(torch.logical_or, hidden) if hidden else None


class _GroupedAttention(torch.autograd.Function):
    """Softmax attention group by group; keeps its inputs and computes weights again."""

    @staticmethod
    def forward(
        ctx: Any,
        q_GAMD: Tensor,
        k_GTD: Tensor,
        v_GTD: Tensor,
        own_k_GAKD: Tensor,
        own_v_GAKD: Tensor,
        groups: list[_Group],
    ) -> Tensor:
        """Give `[G, A, M, D]`."""
        ctx.save_for_backward(q_GAMD, k_GTD, v_GTD, own_k_GAKD, own_v_GAKD)
        ctx.groups = groups
        out_GAMD = torch.empty_like(q_GAMD)
        for group in groups:
            own_v = own_v_GAKD[:, group.blocks]
            weights = _weights(
                q_GAMD[:, group.blocks],
                k_GTD[:, group.rows],
                own_k_GAKD[:, group.blocks],
                group=group,
            ).to(own_v.dtype)
            over_rows, over_slots = _split(weights, own_v)
            out = over_slots @ own_v
            out.flatten(1, 2).baddbmm_(over_rows.flatten(1, 2), v_GTD[:, group.rows])
            out_GAMD[:, group.blocks] = out
        return out_GAMD

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] the decorator hides names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Give the gradients of queries, context keys and values, own keys and values."""
        q_GAMD, k_GTD, v_GTD, own_k_GAKD, own_v_GAKD = ctx.saved_tensors
        d_q, d_own_k, d_own_v = (torch.empty_like(t) for t in (q_GAMD, own_k_GAKD, own_v_GAKD))
        d_k, d_v = torch.zeros_like(k_GTD), torch.zeros_like(v_GTD)
        for group in ctx.groups:
            blocks, rows = group.blocks, group.rows
            q, d_out = q_GAMD[:, blocks], grads[0][:, blocks].contiguous()
            k, own_k, own_v = k_GTD[:, rows], own_k_GAKD[:, blocks], own_v_GAKD[:, blocks]
            weights = _weights(q, k, own_k, group=group)
            d_weights = _products(d_out, v_GTD[:, rows], own_v)
            d_weights -= torch.linalg.vecdot(weights, d_weights)[..., None]
            d_scores = d_weights.mul_(weights).to(q.dtype)

            over_rows, over_slots = _split(weights.to(q.dtype), own_v)
            d_own_v[:, blocks] = over_slots.mT @ d_out
            d_v[:, rows].baddbmm_(over_rows.flatten(1, 2).mT, d_out.flatten(1, 2))
            over_rows, over_slots = _split(d_scores, own_v)
            d_q_group = over_slots @ own_k
            d_q_group.flatten(1, 2).baddbmm_(over_rows.flatten(1, 2), k)
            d_q[:, blocks] = d_q_group
            d_own_k[:, blocks] = over_slots.mT @ q
            d_k[:, rows].baddbmm_(over_rows.flatten(1, 2).mT, q.flatten(1, 2))
        return d_q, d_k, d_v, d_own_k, d_own_v, None


def _weights(q_GaMD: Tensor, k_GtD: Tensor, own_k_GaKD: Tensor, *, group: _Group) -> Tensor:
    """Give `[G, a, M, t + K]`, the softmax over context rows and own slots together."""
    num_rows, num_slots = k_GtD.shape[1], own_k_GaKD.shape[2]
    scores = _products(q_GaMD, k_GtD, own_k_GaKD)
    by_slot = scores.unflatten(2, (num_slots, -1))  # [G, a, K, R, t + K]
    edge = by_slot[..., group.edge : num_rows]
    edge.masked_fill_(group.hidden_rows[:, :, None], -torch.inf)
    if group.hidden_slots is not None:
        by_slot[..., num_rows:].masked_fill_(group.hidden_slots[:, :, None], -torch.inf)
    return scores.softmax(dim=-1)


def _products(x_GaMD: Tensor, rows_GtD: Tensor, slots_GaKD: Tensor) -> Tensor:
    """Multiply with context rows and own slots, side by side: `[G, a, M, t + K]`, >= float32."""
    num_rows, num_slots = rows_GtD.shape[1], slots_GaKD.shape[2]
    dtype = torch.promote_types(x_GaMD.dtype, torch.float32)
    products = x_GaMD.new_empty(*x_GaMD.shape[:3], num_rows + num_slots, dtype=dtype)
    products.flatten(1, 2)[..., :num_rows] = x_GaMD.flatten(1, 2) @ rows_GtD.mT
    products[..., num_rows:] = x_GaMD @ slots_GaKD.mT
    return products


def _split(both: Tensor, slots_GaKD: Tensor) -> tuple[Tensor, Tensor]:
    """Split `[G, a, M, t + K]` into context rows and own slots."""
    num_slots = slots_GaKD.shape[2]
    return both[..., :-num_slots], both[..., -num_slots:]
