"""Attention with KV injection: a block's queries see the target's context and their own block.

Legend: A blocks, K slots of a block, T context rows of all documents laid end to end, H heads,
G kv heads, R = H / G, D head dim, E hidden size.

The visibility rule (slot i of the block at anchor a): context row t of the same document iff
t < a, strictly, since the anchor's own features do not exist at serving time; every slot of the
same block; nothing else. The two parts are scored apart and share one softmax, so cost grows with
A*K*(T + K) and no mask over all blocks exists. Training packs many documents and anchors into one
call; serving makes the same call with one document and one block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dflash_train.drafter.config import DrafterConfig


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE in the neox layout.

    Args:
        x: `[..., heads, D]`.
        cos: `[..., D]` of the rows' positions.
        sin: `[..., D]`.
    """
    low, high = x.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return x * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)


def block_attention(
    q_AKHD: Tensor,
    context: ContextKV,
    block_k_AKGD: Tensor,
    block_v_AKGD: Tensor,
    *,
    blocks: Blocks,
) -> Tensor:
    """Attend from every block to its document's context before the anchor and to itself.

    Returns:
        `[A, K, H, D]`.
    """
    outputs = []
    for document in range(len(blocks.block_offsets) - 1):
        rows = slice(*blocks.block_offsets[document : document + 2])
        if rows.start == rows.stop:
            continue
        anchors_A = blocks.anchor_positions[rows]
        first = blocks.context_offsets[document]
        seen = slice(first, first + int(anchors_A.max()))
        outputs.append(
            _attend_in_document(
                q_AKHD[rows],
                ContextKV(context.k[seen], context.v[seen]),
                block_k_AKGD[rows],
                block_v_AKGD[rows],
                anchors_A=anchors_A,
                widths_A=None if blocks.widths is None else blocks.widths[rows],
            )
        )
    return torch.cat(outputs) if outputs else torch.zeros_like(q_AKHD)


def _attend_in_document(
    q_AKHD: Tensor,
    context: ContextKV,
    block_k_AKGD: Tensor,
    block_v_AKGD: Tensor,
    *,
    anchors_A: Tensor,
    widths_A: Tensor | None,
) -> Tensor:
    num_blocks, num_slots, num_heads, head_dim = q_AKHD.shape
    num_context, num_kv_heads, _ = context.k.shape
    repeats = num_heads // num_kv_heads
    rows = num_slots * repeats

    q_AKGRD = q_AKHD.unflatten(2, (num_kv_heads, repeats)) * head_dim**-0.5
    q_GAMD = q_AKGRD.permute(2, 0, 1, 3, 4).reshape(num_kv_heads, num_blocks, rows, head_dim)

    context_scores = q_GAMD.flatten(1, 2) @ context.k.permute(1, 2, 0)  # [G, A*M, T]
    context_scores = context_scores.view(num_kv_heads, num_blocks, rows, num_context)
    before_anchor_AT = torch.arange(num_context, device=anchors_A.device) < anchors_A[:, None]
    context_scores = context_scores.masked_fill(~before_anchor_AT[:, None, :], -torch.inf)

    block_scores = q_GAMD @ block_k_AKGD.permute(2, 0, 3, 1)  # [G, A, M, K]
    if widths_A is not None:
        exists_AK = torch.arange(num_slots, device=widths_A.device) < widths_A[:, None]
        block_scores = block_scores.masked_fill(~exists_AK[:, None, :], -torch.inf)

    weights = torch.cat([context_scores, block_scores], dim=-1).softmax(dim=-1)
    context_weights, block_weights = weights.split([num_context, num_slots], dim=-1)
    out = (context_weights.flatten(1, 2) @ context.v.transpose(0, 1)).view_as(q_GAMD)
    out = out + block_weights @ block_v_AKGD.permute(2, 0, 1, 3)
    out_AKGRD = out.view(num_kv_heads, num_blocks, num_slots, repeats, head_dim).permute(
        1, 2, 0, 3, 4
    )
    return out_AKGRD.reshape(num_blocks, num_slots, num_heads, head_dim)


class InjectedAttention(nn.Module):
    """Self-attention of one drafter layer whose keys and values the target's context joins."""

    def __init__(self, config: DrafterConfig) -> None:
        """Build the projections; `fc` and `hidden_norm`, shared by all layers, live in the
        model."""
        super().__init__()
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> ContextKV:
        """Project rows `[..., E]` to keys (normed, rotated) and values, `[..., G, D]` each."""
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return ContextKV(rotate(k, cos, sin), v)

    def forward(
        self, x_AKE: Tensor, context: ContextKV, blocks: Blocks, *, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Attend for normed block rows.

        Args:
            x_AKE: `[A, K, E]`, after the input norm.
            context: This layer's keys and values of the target's features.
            blocks: Where the blocks stand.
            cos: `[A, K, D]` of the slots' positions.
            sin: `[A, K, D]`.

        Returns:
            `[A, K, E]`.
        """
        q = self.q_norm(self.q_proj(x_AKE).unflatten(-1, (-1, self.head_dim)))
        own = self.keys_values(x_AKE, cos, sin)
        out = block_attention(rotate(q, cos, sin), context, own.k, own.v, blocks=blocks)
        return self.o_proj(out.flatten(-2))
