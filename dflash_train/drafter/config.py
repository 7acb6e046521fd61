"""The shape of a drafter: exactly what its `config.json` holds, no setting of a run."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedConfig, Qwen3Config

from dflash_train.config import DrafterSettings, DrafterVariant, require


def spread_target_layer_ids(num_target_layers: int, num_taps: int) -> list[int]:
    """Spread the tap layers over the target as z-lab 0.1.0 does (half to even).

    Ids are 0-based and mean a layer's output, `hidden_states[id + 1]` in Transformers.
    """
    if num_taps == 1:
        return [num_target_layers // 2]
    stride = (num_target_layers - 4) / (num_taps - 1)
    return [round(1 + tap * stride) for tap in range(num_taps)]


FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Visibility:
    """What one layer lets slot i of a block at anchor a see; the default is plain DFlash.

    Context row t: t < a, and a + i - t < window. Slot j of the same block: j <= i in a causal
    layer, and |i - j| < window.
    """

    window: int | None = None
    """W, in tokens; None is no limit."""
    is_causal: bool = False
    """Slots see no later slot of their block."""


@dataclass(kw_only=True)
class DrafterConfig(DrafterVariant):
    """A DFlash drafter: what makes it a variant, and the shapes that the target decides.

    Letters of the shape legend: E `hidden_size`, H and G attention and kv heads, D `head_dim`,
    K `block_size`, L `len(target_layer_ids)`, V `vocab_size`, Vd `draft_vocab_size`.
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
    input_embedding_scale: float = 1.0
    """Factor on the raw embedding rows of the block."""
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
        self._check_layers()
        self._check_dflash2()
        self._check_dspark()
        size = self.draft_vocab_size
        require(
            size is None or (0 < size < self.vocab_size and not self.is_dflash2),
            f"drafter.draft_vocab_size (={size}) must lie in 1..{self.vocab_size - 1}, without "
            "drafter.selector_rank: candidates are ids of the whole vocabulary. Leave it unset.",
        )

    def _check_layers(self) -> None:
        types = self.layer_types
        require(
            types is None
            or (len(types) == self.num_hidden_layers and set(types) <= {FULL, SLIDING}),
            f"drafter.layer_types (={types}) must name {FULL} or {SLIDING} once for each of the "
            f"{self.num_hidden_layers} layers.",
        )
        slides = types is not None and SLIDING in types
        require(
            slides == (self.sliding_window is not None) and self.sliding_window != 0,
            f"drafter.sliding_window (={self.sliding_window}) must be a number of tokens where a "
            f"layer slides, and unset elsewhere. drafter.layer_types is {types}.",
        )

    def _check_dflash2(self) -> None:
        fields = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
        values = [getattr(self, name) for name in fields]
        require(
            all(value is None for value in values) or all(value for value in values),
            f"drafter.{', drafter.'.join(fields)} (={values}) must all be set (DFlash 2) or all "
            "unset. The released drafters use 2, 16, 256, 16.",
        )
        group = self.conv_group_size
        require(
            group is None or self.hidden_size % group == 0,
            f"drafter.conv_group_size (={group}) must divide the hidden size {self.hidden_size}.",
        )
        top_k = self.selector_top_k
        require(
            top_k is None or top_k <= self.vocab_size,
            f"drafter.selector_top_k (={top_k}) must be at most the vocabulary size "
            f"{self.vocab_size}. Set it to 16.",
        )

    def _check_dspark(self) -> None:
        rank = self.markov_rank
        require(
            rank is None or (rank > 0 and not self.is_dflash2),
            f"drafter.markov_rank (={rank}) must be at least 1, without drafter.selector_rank: a "
            "drafter is DSpark or DFlash 2. Set it to 256, or leave one of them unset.",
        )
        require(
            rank is not None or not (self.markov_gated or self.has_confidence_head),
            "drafter.markov_gated and drafter.has_confidence_head "
            f"(={self.markov_gated}, {self.has_confidence_head}) belong to DSpark. Set "
            "drafter.markov_rank too.",
        )

    @property
    def num_taps(self) -> int:
        """L, the number of tap layers."""
        return len(self.target_layer_ids)

    @property
    def is_dflash2(self) -> bool:
        """Tell whether convolutions and a candidate selector are there."""
        return self.selector_rank is not None

    @property
    def is_shifted(self) -> bool:
        """Tell whether slot k predicts position a + k + 1 (DSpark) instead of its own, a + k."""
        return self.markov_rank is not None

    @property
    def first_slot(self) -> int:
        """Give the first slot that predicts: 0 where labels are shifted, else 1."""
        return 0 if self.is_shifted else 1

    @property
    def num_drafts(self) -> int:
        """Give the most tokens that one block drafts."""
        return self.block_size - self.first_slot

    @property
    def num_output_ids(self) -> int:
        """Give the ids that have a logit: Vd, or V."""
        return self.draft_vocab_size or self.vocab_size

    def layer_visibility(self) -> list[Visibility]:
        """Give what each layer lets a slot see."""
        return [
            Visibility(
                window=self.sliding_window if kind == SLIDING else None,
                is_causal=kind == SLIDING if self.is_causal is None else self.is_causal,
            )
            for kind in self.layer_types or [FULL] * self.num_hidden_layers
        ]

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
            layer_types=self.layer_types or [FULL] * self.num_hidden_layers,
            use_sliding_window=self.sliding_window is not None,
            sliding_window=self.sliding_window,
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
        own = target.to_dict()  # where layers differ in heads (Gemma 4), the sliding ones speak
        return cls(
            hidden_size=target.hidden_size,
            intermediate_size=settings.intermediate_size or target.intermediate_size,
            num_hidden_layers=settings.num_hidden_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=settings.num_key_value_heads
            or own.get("num_key_value_heads")
            or target.num_attention_heads,
            head_dim=settings.head_dim
            or own.get("head_dim")
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
            input_embedding_scale=_embedding_scale(settings, target),
            final_logit_softcapping=_softcap(settings, target),
            **{field.name: getattr(settings, field.name) for field in fields(DrafterVariant)},
        )


def _embedding_scale(settings: DrafterSettings, target: PreTrainedConfig) -> float:
    """Take the recipe's scale, else the factor inside the target family's embedding module.

    Every Gemma multiplies its embedding rows by sqrt(E), other families do not scale.
    """
    if settings.input_embedding_scale is not None:
        return settings.input_embedding_scale
    return target.hidden_size**0.5 if target.model_type.startswith("gemma") else 1.0


def _softcap(settings: DrafterSettings, target: PreTrainedConfig) -> float | None:
    """Take the recipe's cap, 0 for none, else the target's if it has one."""
    cap = settings.final_logit_softcapping
    if cap is None:
        cap = target.to_dict().get("final_logit_softcapping")
    return cap or None


def _own_rope(target: PreTrainedConfig) -> dict[str, Any]:
    """Take the target's theta and scaling, never its partial width or its M-RoPE sections.

    A target with one RoPE per layer type (Gemma 3) lends the one of its full layers.
    """
    rope = dict(target.rope_parameters)
    rope = dict(rope.get(FULL, rope))
    require(
        "rope_theta" in rope,
        f"target.name_or_path: its rope_parameters (={sorted(rope)}) have no rope_theta to copy "
        "to the drafter.",
    )
    for key in ("partial_rotary_factor", "mrope_section", "mrope_interleaved"):
        rope.pop(key, None)
    if rope.get("rope_type") == "proportional":  # partial width by another name (Gemma 4)
        rope["rope_type"] = "default"
    return rope
