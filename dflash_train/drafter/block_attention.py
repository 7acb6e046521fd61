"""Attention of many blocks to their documents' context and to themselves, one softmax over both.

The visibility rule is structure here, not a mask over all pairs. Neighbouring anchors of one
document form a group; a group's queries meet only the context rows that one of its slots can see,
and each block its own K slots, so cost grows with A*K*(T + K). Both parts are computed apart and
merged by their log-sum-exp: the own part is one small product for all blocks at once, and the
context part never leaves the memory layout that products are fastest in. Scores over the context
exist for one group at a time: the backward pass computes them again from the queries and keys,
which is faster than reading them back and leaves nothing of size A*K*T in memory. Anchors may come
in any order, but groups cut the context best when they ascend.

Legend: A blocks, a blocks of one group, K slots of a block, T context rows of all documents laid
end to end, t context rows that a group meets, G kv heads, R query heads per kv head, H = G * R
heads, M = K * R query rows of a block and kv head, N = A * M, n = a * M, D head dim.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dflash_train.drafter.config import Visibility

SCORES_AT_ONCE = {"cpu": 1 << 19}
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
    kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What an operation derives from the rest once for all layers, by its name."""

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
    slots_K = torch.arange(num_slots, device=q_AKHD.device)
    # Laid out once here, so that the rows of a group are views below.
    parts = (
        q_AKGRD.permute(2, 0, 1, 3, 4).flatten(2, 3),
        context.k.transpose(0, 1),
        context.v.transpose(0, 1),
        block_k_AKGD.permute(2, 0, 1, 3),
        block_v_AKGD.permute(2, 0, 1, 3),
    )
    out_GAMD = _GroupedAttention.apply(
        *(part.to(dtype).contiguous() for part in parts),
        _groups(blocks, visibility, num_slots=num_slots, num_heads=num_heads),
        _hidden_slots(visibility, slots_K, blocks.widths),
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


def _groups(
    blocks: Blocks, visibility: Visibility, *, num_slots: int, num_heads: int
) -> list[_Group]:
    """Cut each document's blocks into groups of at most `SCORES_AT_ONCE` scores.

    Blocks that see no context row at all are in no group.
    """
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
                if stop > begin and (stop + 1 - begin) * seen > limit:
                    break
                stop += 1
            group = _group(blocks, visibility, slice(begin, stop), document, num_slots=num_slots)
            if group.rows.start < group.rows.stop:
                groups.append(group)
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
    if visibility.window is not None:
        slots_K = torch.arange(num_slots, device=anchors_a.device)
        positions_aK = anchors_a[:, None] + slots_K
        hidden_rows = hidden_rows | (positions_aK[:, :, None] - rows_t >= visibility.window)
    return _Group(
        blocks=chosen,
        rows=slice(offset + first, offset + high),
        edge=edge - first,
        hidden_rows=hidden_rows,
    )


def _hidden_slots(
    visibility: Visibility, slots_K: Tensor, widths_A: Tensor | None
) -> Tensor | None:
    """Mark pairs (query slot, key slot) of a block that do not meet.

    Each slot meets itself, also past the block's width: a row without any key would be NaN.

    Returns:
        `[1, K, K]` or `[A, K, K]` bool; None where the slots of a block all see each other.
    """
    ahead_KK = slots_K - slots_K[:, None]  # how far the key stands after the query
    hidden = []
    if visibility.is_causal:
        hidden.append((ahead_KK > 0)[None])
    if visibility.window is not None:
        hidden.append((ahead_KK.abs() >= visibility.window)[None])
    if widths_A is not None:
        hidden.append((slots_K >= widths_A[:, None])[:, None] & (ahead_KK != 0))
    return functools.reduce(torch.logical_or, hidden) if hidden else None


class _GroupedAttention(torch.autograd.Function):
    """Softmax attention, its context part group by group; keeps its inputs, recomputes weights.

    Over the context alone a softmax gives weights whose merged value is theirs times the context's
    share, `exp(lse_context - lse)`; the own weights are `exp(scores - lse)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_GAMD: Tensor,
        k_GTD: Tensor,
        v_GTD: Tensor,
        own_k_GAKD: Tensor,
        own_v_GAKD: Tensor,
        groups: list[_Group],
        hidden_slots: Tensor | None,
    ) -> Tensor:
        """Give `[G, A, M, D]`."""
        out_GAMD = torch.zeros_like(q_GAMD)
        own_scores = _own_scores(q_GAMD, own_k_GAKD, hidden_slots)
        lse = own_scores.logsumexp(dim=-1, keepdim=True)
        share = torch.zeros_like(lse)
        for group in groups:
            scores = _context_scores(_rows(q_GAMD, group), k_GTD[:, group.rows], group)
            weights = scores.softmax(dim=-1)
            # A softmax does not tell its log-sum-exp, but its largest weight is exp(top - lse).
            top = scores.amax(dim=-1, keepdim=True)
            context_lse = top - weights.amax(dim=-1, keepdim=True).log_()
            lse_group, share_group = _rows(lse, group), _rows(share, group)
            lse_group.copy_(torch.logaddexp(lse_group, context_lse))
            share_group.copy_(context_lse.sub_(lse_group).exp_())
            weights = weights.mul_(share_group).to(v_GTD.dtype)
            torch.bmm(weights, v_GTD[:, group.rows], out=_rows(out_GAMD, group))
        own_weights = own_scores.sub_(lse).exp_().to(own_v_GAKD.dtype)
        _add_products(out_GAMD, own_weights, own_v_GAKD)
        ctx.save_for_backward(q_GAMD, k_GTD, v_GTD, own_k_GAKD, own_v_GAKD, lse, share)
        ctx.groups, ctx.hidden_slots = groups, hidden_slots
        return out_GAMD

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] the decorator hides names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Give the gradients of queries, context and own keys and values."""
        q_GAMD, k_GTD, v_GTD, own_k_GAKD, own_v_GAKD, lse, share = ctx.saved_tensors
        d_out, dtype = grads[0].contiguous(), q_GAMD.dtype
        d_q, d_k, d_v = (torch.zeros_like(tensor) for tensor in (q_GAMD, k_GTD, v_GTD))

        own_weights = _own_scores(q_GAMD, own_k_GAKD, ctx.hidden_slots).sub_(lse).exp_()
        d_own_scores = (d_out @ own_v_GAKD.mT).to(lse.dtype).mul_(own_weights)
        mean = d_own_scores.sum(dim=-1, keepdim=True)  # of d_weights, over own slots and context
        for group in ctx.groups:
            q, k, v = _rows(q_GAMD, group), k_GTD[:, group.rows], v_GTD[:, group.rows]
            d_out_group, mean_group = _rows(d_out, group), _rows(mean, group)
            weights = _context_scores(q, k, group).softmax(dim=-1).mul_(_rows(share, group))
            d_v[:, group.rows].baddbmm_(weights.to(dtype).mT, d_out_group)
            d_scores = (d_out_group @ v.mT).to(lse.dtype).mul_(weights)
            mean_group += d_scores.sum(dim=-1, keepdim=True)
            d_scores = d_scores.addcmul_(weights, mean_group, value=-1).to(dtype)
            torch.bmm(d_scores, k, out=_rows(d_q, group))
            d_k[:, group.rows].baddbmm_(d_scores.mT, q)
        d_own_scores = d_own_scores.addcmul_(own_weights, mean, value=-1).to(dtype)
        _add_products(d_q, d_own_scores, own_k_GAKD)
        d_own_k, d_own_v = d_own_scores.mT @ q_GAMD, own_weights.to(dtype).mT @ d_out
        return d_q, d_k, d_v, d_own_k, d_own_v, None, None


def _rows(x_GAMD: Tensor, group: _Group) -> Tensor:
    """Give the rows `[G, n, D]` of a group's blocks, a view."""
    chosen = x_GAMD[:, group.blocks]
    return chosen.view(chosen.shape[0], -1, chosen.shape[-1])


def _context_scores(q_GnD: Tensor, k_GtD: Tensor, group: _Group) -> Tensor:
    """Give the group's scores `[G, n, t]`, at least float32.

    Hidden ones are the lowest finite number, as a block may see none of its group's rows: minus
    infinity would make its softmax NaN, while this makes its share of the merged softmax 0.
    """
    scores = q_GnD @ k_GtD.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    num_blocks, num_slots = group.hidden_rows.shape[:2]
    by_slot = scores.unflatten(1, (num_blocks, num_slots, -1))  # [G, a, K or 1, R or M, t]
    lowest = torch.finfo(scores.dtype).min
    by_slot[..., group.edge :].masked_fill_(group.hidden_rows[:, :, None], lowest)
    return scores


def _own_scores(q_GAMD: Tensor, own_k_GAKD: Tensor, hidden_slots: Tensor | None) -> Tensor:
    """Give `[G, A, M, K]`, scores of each block's slots, at least float32."""
    scores = q_GAMD @ own_k_GAKD.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if hidden_slots is not None:
        by_slot = scores.unflatten(2, (scores.shape[-1], -1))  # [G, A, K, R, K]
        by_slot.masked_fill_(hidden_slots[:, :, None], -torch.inf)
    return scores


def _add_products(out_GAMD: Tensor, weights_GAMK: Tensor, rows_GAKD: Tensor) -> None:
    """Add each block's weighted rows to `out_GAMD`."""
    out_GAMD.flatten(0, 1).baddbmm_(weights_GAMK.flatten(0, 1), rows_GAKD.flatten(0, 1))
