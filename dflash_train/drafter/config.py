"""The shape of a drafter: exactly what its `config.json` holds, no setting of a run."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, Qwen3Config

from dflash_train.config import DrafterSettings, require


def spread_target_layer_ids(num_target_layers: int, num_taps: int) -> list[int]:
    """Spread the tap layers over the target as z-lab 0.1.0 does (half to even).

    Ids are 0-based and mean a layer's output, `hidden_states[id + 1]` in Transformers.
    """
    if num_taps == 1:
        return [num_target_layers // 2]
    stride = (num_target_layers - 4) / (num_taps - 1)
    return [round(1 + tap * stride) for tap in range(num_taps)]


@dataclass(kw_only=True)
class DrafterConfig:
    """A plain DFlash drafter: full bidirectional attention in every layer.

    Letters of the shape legend: E `hidden_size`, H and G attention and kv heads, D `head_dim`,
    K `block_size`, L `len(target_layer_ids)`, V `vocab_size`.
    """

    hidden_size: int
    """E, equal to the target's: embedding and head are shared."""
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the target's embedding table."""
    max_position_embeddings: int
    block_size: int
    mask_token_id: int
    target_layer_ids: list[int]
    """0-based ids of the tap layers; their order is the order of the columns of `fc`."""
    num_target_layers: int
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10_000.0}
    )
    """RoPE of the drafter's own queries and keys: full width, 1-D positions."""
    attention_bias: bool = False
    input_embedding_scale: float = 1.0
    """Factor on the raw embedding rows of the block."""
    output_multiplier: float = 1.0
    """Factor on the logits."""
    final_logit_softcapping: float | None = None
    """Cap of the logits, `cap * tanh(logits / cap)`; None is no cap."""

    def __post_init__(self) -> None:
        require(
            self.block_size >= 2,
            f"drafter.block_size (={self.block_size}) must be at least 2: an anchor and one masked "
            "position. Set it to the checkpoint's.",
        )
        require(
            0 <= self.mask_token_id < self.vocab_size,
            f"drafter.mask_token_id (={self.mask_token_id}) must be below the target's vocabulary "
            f"size {self.vocab_size}. Choose a token that the target never emits.",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"drafter.num_attention_heads (={self.num_attention_heads}) must be a multiple of "
            f"drafter.num_key_value_heads (={self.num_key_value_heads}).",
        )
        ids = self.target_layer_ids
        require(
            len(ids) > 0 and len(set(ids)) == len(ids),
            f"drafter.target_layer_ids (={ids}) must be distinct and not empty.",
        )
        require(
            all(0 <= layer < self.num_target_layers - 1 for layer in ids),
            f"drafter.target_layer_ids (={ids}) must lie in 0..{self.num_target_layers - 2}: the "
            "last "
            "layer is never tapped, since servers capture it before the final norm.",
        )

    @property
    def num_taps(self) -> int:
        """L, the number of tap layers."""
        return len(self.target_layer_ids)

    def to_qwen3(self) -> Qwen3Config:
        """Give the Transformers configuration that servers build this drafter from."""
        return Qwen3Config(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            rms_norm_eps=self.rms_norm_eps,
            rope_parameters=dict(self.rope_parameters),
            attention_bias=self.attention_bias,
            layer_types=["full_attention"] * self.num_hidden_layers,
            max_window_layers=self.num_hidden_layers,
            tie_word_embeddings=False,
        )

    @classmethod
    def for_target(cls, settings: DrafterSettings, target: PreTrainedConfig) -> "DrafterConfig":
        """Complete a recipe's drafter settings with the target's shapes.

        Args:
            settings: The recipe's `drafter` group; None fields copy the target.
            target: The target's text configuration.

        Raises:
            ValueError: The settings do not fit the target.
        """
        num_layers = target.num_hidden_layers
        require(
            settings.target_layer_ids is not None or num_layers >= settings.num_taps + 3,
            f"drafter.num_taps (={settings.num_taps}) is too many for a target of {num_layers} "
            "layers. "
            "Lower it or set drafter.target_layer_ids.",
        )
        num_heads = settings.num_attention_heads or target.num_attention_heads
        own_head_dim = target.to_dict().get("head_dim")
        return cls(
            hidden_size=target.hidden_size,
            intermediate_size=settings.intermediate_size or target.intermediate_size,
            num_hidden_layers=settings.num_hidden_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=settings.num_key_value_heads or target.num_key_value_heads,
            head_dim=settings.head_dim
            or own_head_dim
            or target.hidden_size // target.num_attention_heads,
            vocab_size=target.vocab_size,
            max_position_embeddings=target.max_position_embeddings,
            block_size=settings.block_size,
            mask_token_id=settings.mask_token_id,
            target_layer_ids=settings.target_layer_ids
            or spread_target_layer_ids(num_layers, settings.num_taps),
            num_target_layers=num_layers,
            rms_norm_eps=target.rms_norm_eps,
            rope_parameters=_own_rope(target),
        )


def _own_rope(target: PreTrainedConfig) -> dict[str, Any]:
    """Take the target's theta and scaling, never its partial width or its M-RoPE sections."""
    rope = dict(target.rope_parameters)
    require(
        "rope_theta" in rope,
        f"target.name_or_path: its rope_parameters (={sorted(rope)}) have one entry per layer "
        "type, "
        "which this version cannot copy to a drafter.",
    )
    for key in ("partial_rotary_factor", "mrope_section", "mrope_interleaved"):
        rope.pop(key, None)
    return rope
