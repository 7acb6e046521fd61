"""The parts of a drafter layer: gated MLP, rotary embedding, and the layer that joins them."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dflash_train.drafter.attention import InjectedAttention
from dflash_train.drafter.block_attention import Blocks, ContextKV
from dflash_train.drafter.config import DrafterConfig, Visibility
from dflash_train.drafter.fused import GatedDown, RMSNorm
from dflash_train.drafter.mixers import BlockConvolution, Unmixed
from dflash_train.ops import Ops


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, as in Qwen3."""

    def __init__(self, config: DrafterConfig) -> None:
        """Build the three projections."""
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = GatedDown(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., E]` to `[..., E]`."""
        return self.down_proj(self.gate_proj(x), self.up_proj(x))


class DrafterLayer(nn.Module):
    """One pre-norm transformer layer; only block rows flow through it."""

    def __init__(self, config: DrafterConfig, visibility: Visibility) -> None:
        """Build attention, MLP, their norms, and what mixes the slots around them."""
        super().__init__()
        mixer = BlockConvolution if config.is_dflash2 else Unmixed
        self.self_attn = InjectedAttention(config, visibility)
        self.attention_conv = mixer(config)
        self.mlp = GatedMLP(config)
        self.mlp_conv = mixer(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

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
        """Map block rows `[A, K, E]` to `[A, K, E]`, attending by `ops`."""
        attend = partial(self.self_attn, context=context, blocks=blocks, cos=cos, sin=sin, ops=ops)
        x_AKE = x_AKE + self.attention_conv(self.input_layernorm(x_AKE), attend)
        return x_AKE + self.mlp_conv(self.post_attention_layernorm(x_AKE), self.mlp)


class ExactRotary(Qwen3RotaryEmbedding):
    """RoPE whose frequencies stay float32 when the drafter is cast, as in every server.

    `module.to(bfloat16)` would round them, and far positions would turn by a wrong angle.
    """

    inv_freq: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExactRotary":
        exact = self.inv_freq
        super()._apply(fn, recurse)
        self.inv_freq = exact.to(self.inv_freq.device)
        return self
