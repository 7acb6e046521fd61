"""Attention with KV injection: a block's queries see the target's context and their own block.

The visibility rule of a plain layer (slot i of the block at anchor a): context row t of the same
document iff t < a, strictly, since the anchor's own features do not exist at serving time; every
slot of the same block; nothing else. `Visibility` narrows it by a window or by causality. Training
packs many documents and anchors into one call; serving makes the same call with one document and
one block. Legend: A blocks, K slots of a block, T context rows, H heads, G kv heads, D head dim,
E hidden size.
"""

from torch import Tensor, nn

from dflash_train.drafter.block_attention import Blocks, ContextKV
from dflash_train.drafter.config import DrafterConfig, Visibility
from dflash_train.drafter.context import rotate
from dflash_train.drafter.fused import LentNorm, RMSNorm
from dflash_train.ops import Ops


class InjectedAttention(nn.Module):
    """Self-attention of one drafter layer whose keys and values the target's context joins."""

    def __init__(self, config: DrafterConfig, visibility: Visibility) -> None:
        """Build the projections; `fc` and `hidden_norm`, shared by all layers, live in the
        model."""
        super().__init__()
        self.visibility = visibility
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = LentNorm(self.head_dim, eps=config.rms_norm_eps)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project rows `[..., E]` to keys, neither normed nor rotated, and values:
        `[..., G, D]` each."""
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        return k, self.v_proj(x).unflatten(-1, (-1, self.head_dim))

    def forward(
        self,
        x_AKE: Tensor,
        context: ContextKV,
        blocks: Blocks,
        *,
        cos: Tensor,
        sin: Tensor,
        ops: Ops,
    ) -> Tensor:
        """Attend for normed block rows.

        Args:
            x_AKE: `[A, K, E]`, after the input norm.
            context: This layer's keys and values of the target's features.
            blocks: Where the blocks stand.
            cos: `[A, K, D]` of the slots' positions.
            sin: `[A, K, D]`.
            ops: What attends.

        Returns:
            `[A, K, E]`.
        """
        q = self.q_norm(self.q_proj(x_AKE).unflatten(-1, (-1, self.head_dim)))
        k, v = self.keys_values(x_AKE)
        out = ops.block_attention(
            rotate(q, cos, sin),
            context,
            rotate(self.k_norm(k), cos, sin),
            v,
            blocks=blocks,
            visibility=self.visibility,
        )
        return self.o_proj(out.flatten(-2))
