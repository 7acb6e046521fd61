"""The DFlash drafter: a block of masks becomes a block of hidden states in one pass.

Definition: arXiv 2602.06036 as realised by the PyPI package `dflash` 0.1.0. Parameter names are
the ones its checkpoints use. Legend: A blocks, K slots, T context rows, L taps, E hidden size,
D head dim, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dflash_train.drafter.attention import Blocks, ContextKV, InjectedAttention
from dflash_train.drafter.config import DrafterConfig
from dflash_train.features.target import FrozenHead

INITIALIZER_RANGE = 0.02


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, as in Qwen3."""

    def __init__(self, config: DrafterConfig) -> None:
        """Build the three projections."""
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., E]` to `[..., E]`."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DrafterLayer(nn.Module):
    """One pre-norm transformer layer; only block rows flow through it."""

    def __init__(self, config: DrafterConfig) -> None:
        """Build attention, MLP and their norms."""
        super().__init__()
        self.self_attn = InjectedAttention(config)
        self.mlp = GatedMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, x_AKE: Tensor, context: ContextKV, blocks: Blocks, *, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Map block rows `[A, K, E]` to `[A, K, E]`."""
        normed = self.input_layernorm(x_AKE)
        x_AKE = x_AKE + self.self_attn(normed, context, blocks, cos=cos, sin=sin)
        return x_AKE + self.mlp(self.post_attention_layernorm(x_AKE))


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


class ContextCache:
    """The context keys and values of one request, all drafter layers; block rows never enter.

    The decoder owns it and only appends; nothing is ever removed, because only features of
    committed tokens are fed.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.layers: list[ContextKV] = []

    @property
    def length(self) -> int:
        """Context rows held, which is also the position of the next anchor."""
        return self.layers[0].k.shape[0] if self.layers else 0

    def append(self, rows: list[ContextKV]) -> None:
        """Add new context rows, one entry per layer."""
        if not self.layers:
            self.layers = rows
            return
        self.layers = [
            ContextKV(torch.cat([held.k, new.k]), torch.cat([held.v, new.v]))
            for held, new in zip(self.layers, rows, strict=True)
        ]


class Drafter(nn.Module):
    """Target features and a block of masks in, the block's hidden states out.

    Embedding and head are the target's and stay outside (`FrozenHead`).
    """

    def __init__(self, config: DrafterConfig) -> None:
        """Build a randomly initialised drafter: normal weights (0.02), norms of ones."""
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.fc = nn.Linear(config.num_taps * width, width, bias=False)
        self.hidden_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(DrafterLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.rotary_emb = ExactRotary(config.to_qwen3())
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INITIALIZER_RANGE)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, block_embeddings: Tensor, target_features: Tensor, blocks: Blocks) -> Tensor:
        """Run many blocks of packed documents, as in training and replay.

        Args:
            block_embeddings: `[A, K, E]` from `block_embeddings()`.
            target_features: `[T, L*E]`, documents laid end to end.
            blocks: Where documents and anchors stand.

        Returns:
            `[A, K, E]` hidden states after the final norm.
        """
        contexts = self._project_context(target_features, blocks.context_positions())
        return self._denoise(block_embeddings, contexts, blocks)

    def new_cache(self) -> ContextCache:
        """Give the empty context cache of one request."""
        return ContextCache()

    def draft_step(
        self, block_embeddings: Tensor, new_features: Tensor, cache: ContextCache
    ) -> Tensor:
        """Run the block of one request whose context is cached, as in serving.

        Args:
            block_embeddings: `[m, E]`: the anchor's row, then m - 1 mask rows.
            new_features: `[n, L*E]`, features committed since the last call; they join the cache.
            cache: The request's context; after the call its length is the anchor's position.

        Returns:
            `[m, E]` hidden states after the final norm.
        """
        start = cache.length
        positions = torch.arange(start, start + new_features.shape[0], device=new_features.device)
        cache.append(self._project_context(new_features, positions))
        blocks = Blocks(
            context_offsets=[0, cache.length],
            block_offsets=[0, 1],
            anchor_positions=torch.tensor([cache.length], device=new_features.device),
        )
        return self._denoise(block_embeddings[None], cache.layers, blocks)[0]

    def logits(self, hidden: Tensor, head: FrozenHead) -> Tensor:
        """Give `[..., V]` logits of hidden states `[..., E]`, multiplier and soft cap applied."""
        return self.shape_logits(head.logits(hidden))

    def shape_logits(self, logits: Tensor) -> Tensor:
        """Apply the output multiplier and the soft cap to raw head logits."""
        logits = logits * self.config.output_multiplier
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _project_context(self, target_features: Tensor, positions: Tensor) -> list[ContextKV]:
        fused = self.hidden_norm(self.fc(target_features))  # [T, E]
        cos, sin = self._rotation(fused, positions)
        return [layer.self_attn.keys_values(fused, cos, sin) for layer in self._typed_layers()]

    def _denoise(self, x_AKE: Tensor, contexts: list[ContextKV], blocks: Blocks) -> Tensor:
        cos, sin = self._rotation(x_AKE, blocks.slot_positions(x_AKE.shape[1]))
        for layer, context in zip(self._typed_layers(), contexts, strict=True):
            x_AKE = layer(x_AKE, context, blocks, cos=cos, sin=sin)
        return self.norm(x_AKE)

    def _rotation(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary_emb(like, positions.reshape(1, -1))
        shape = (*positions.shape, cos.shape[-1])
        return cos.view(shape), sin.view(shape)

    def _typed_layers(self) -> list[DrafterLayer]:
        return [layer for layer in self.layers if isinstance(layer, DrafterLayer)]


def block_embeddings(
    head: FrozenHead, anchor_ids: Tensor, *, num_slots: int, config: DrafterConfig
) -> Tensor:
    """Give the input rows of blocks: the anchor's raw embedding row, then mask rows, scaled.

    Args:
        head: The target's embedding table.
        anchor_ids: `[A]` int64, token at each anchor.
        num_slots: Slots per block, K or fewer.
        config: Mask id and embedding scale.

    Returns:
        `[A, num_slots, E]`.
    """
    ids = anchor_ids.new_full((anchor_ids.shape[0], num_slots), config.mask_token_id)
    ids[:, 0] = anchor_ids
    return head.embed(ids) * config.input_embedding_scale
