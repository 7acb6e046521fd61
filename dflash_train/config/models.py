"""The two models of a recipe: the frozen target and the shape of its drafter."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from dflash_train.config.checks import require


class Dtype(Enum):
    """Number formats of weights and stored features."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Attention(Enum):
    """Attention implementations of the target in Transformers."""

    sdpa = "sdpa"
    eager = "eager"


class DrafterInit(Enum):
    """What a new drafter starts from: noise, as in the paper, or the target's last layers."""

    random = "random"
    target = "target"


@dataclass(kw_only=True)
class TargetConfig:
    """The frozen language model whose output must be reproduced."""

    name_or_path: str = MISSING
    """Hub id, local folder, or `wheel:NAME==VERSION` for a PyPI wheel that holds a GGUF file."""
    revision: str | None = None
    """Git revision on the hub; None means the default branch."""
    dtype: Dtype = Dtype.float32
    """Number format in which the target runs."""
    attention: Attention = Attention.sdpa
    """Attention implementation of the target."""
    shapes: dict[str, Any] = field(default_factory=dict)
    """By `name_or_path`, the keys of a target's text configuration that shapes and sizes follow
    from: a plan takes them where the target itself cannot be reached. No result follows from
    them."""


@dataclass(kw_only=True)
class DrafterVariant:
    """What makes a drafter differ from plain DFlash: the same fields in a recipe and a checkpoint.

    The defaults are plain DFlash, which alone loads in every server.
    """

    attention_bias: bool = False
    """Biases on the q, k, v and o projections."""
    output_multiplier: float = 1.0
    """Factor on the logits."""
    layer_types: list[str] | None = None
    """`full_attention` or `sliding_attention` per drafter layer; None is full everywhere."""
    sliding_window: int | None = None
    """W of the sliding layers, in tokens, the query's own position included."""
    is_causal: bool | None = None
    """Causality inside a block, of every layer; None: full layers bidirectional, sliding ones
    causal."""
    conv_kernel_size: int | None = None
    """DFlash 2, with the three below (released: 2, 16, 256, 16): slots that a convolution mixes,
    the slot itself included."""
    conv_group_size: int | None = None
    """DFlash 2: channels that share a dynamic kernel."""
    selector_rank: int | None = None
    """DFlash 2: width of the candidate selector's codebooks."""
    selector_top_k: int | None = None
    """DFlash 2: candidates per slot."""
    markov_rank: int | None = None
    """DSpark: width of the Markov head's tables (256); the slots' labels shift by one, so K slots
    draft K tokens."""
    markov_gated: bool = False
    """DSpark: gate the previous token's row by the hidden state."""
    has_confidence_head: bool = False
    """DSpark: estimate each slot's acceptance probability."""
    confidence_sees_markov: bool = True
    """DSpark: the confidence head also reads the previous token's row."""
    draft_vocab_size: int | None = None
    """Vd: ids that can be drafted, the most frequent ones; None is the whole vocabulary."""


@dataclass(kw_only=True)
class DrafterSettings(DrafterVariant):
    """The shape of the drafter that a recipe asks for; None copies the target's value."""

    block_size: int = 8
    """K: the anchor and K - 1 masked positions, predicted in one pass."""
    num_hidden_layers: int = 3
    """Drafter layers."""
    init: DrafterInit = DrafterInit.random
    """Start from random weights, or from copies of the target's last layers (equal shapes only)."""
    num_taps: int = 5
    """Target layers that are read, spread by the paper's rule, unless `target_layer_ids` is set."""
    target_layer_ids: list[int] | None = None
    """0-based ids of the tap layers (their output); the last layer is never tapped."""
    mask_token_id: int = MISSING
    """Vocabulary id that the target never emits; its embedding row fills the masked slots."""
    intermediate_size: int | None = None
    """MLP width."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key and value heads."""
    head_dim: int | None = None
    """Width of one head."""
    input_embedding_scale: float | None = None
    """Factor on raw embedding rows; None takes the target family's: sqrt(E) for Gemma, else 1."""
    final_logit_softcapping: float | None = None
    """Cap of the logits; None takes the target's if it has one, 0 is no cap."""

    def __post_init__(self) -> None:
        require(
            self.block_size >= 2,
            f"drafter.block_size (={self.block_size}) must be at least 2: an anchor and one masked "
            "position. Set it to 8 or 16.",
        )
        require(
            self.num_hidden_layers >= 1,
            f"drafter.num_hidden_layers (={self.num_hidden_layers}) must be at least 1. Set it "
            "to 3.",
        )
        require(
            self.num_taps >= 1,
            f"drafter.num_taps (={self.num_taps}) must be at least 1. Set it to 5.",
        )
