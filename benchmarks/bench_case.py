"""What every contender of `bench_train` trains on: the same weights, tokens, features and anchors.

Everything is drawn from a seed at SmolLM2's shapes; no checkpoint is needed, since neither time nor
memory of a step depends on values. Documents are chats of two answers with a short question between
them, so that some blocks run into the end of an answer, into the next one and into the end of the
document: there the trainers differ. Legend: T tokens of all documents, A anchors, K block size, L
taps, E hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from dflash_train.training.blocks import select_anchors

QUESTION_TOKENS = 48
FOLLOW_UP_TOKENS = 8
DECAY_GAMMA = 7.0
"""Position decay that the paper pairs with K = 16."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of drafter, target and batch; the defaults are SmolLM2-135M's."""

    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 5
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int = 64
    vocab_size: int = 49_152
    num_taps: int = 5
    num_target_layers: int = 30
    rms_norm_eps: float = 1e-5
    rope_theta: float = 100_000.0
    block_size: int = 16
    num_documents: int = 4
    document_tokens: int = 512
    anchors_per_document: int = 64

    @property
    def num_tokens(self) -> int:
        """T, tokens of all documents."""
        return self.num_documents * self.document_tokens

    @property
    def num_blocks(self) -> int:
        """A, anchors of all documents."""
        return self.num_documents * self.anchors_per_document

    @property
    def mask_token_id(self) -> int:
        """Last id of the vocabulary; no document holds it."""
        return self.vocab_size - 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """One batch and the weights a step starts from, float32; documents laid end to end."""

    shapes: Shapes
    features: Tensor
    """`[T, L*E]`."""
    input_ids: Tensor
    """`[T]` int64."""
    loss_mask: Tensor
    """`[T]` bool, True where the target wrote the token."""
    anchors: Tensor
    """`[documents, A / documents]` int64, ascending positions in their document."""
    last_hidden: Tensor
    """`[T, E]` rows whose head argmax is the next token: the target wrote the text greedily."""
    embedding: Tensor
    """`[V, E]`, the head too: SmolLM2 ties them."""
    weights: dict[str, Tensor]
    """Drafter tensors by the names of z-lab's checkpoints."""

    @property
    def packed_anchors(self) -> Tensor:
        """`[A]` int64, positions in the row of all documents."""
        starts = torch.arange(self.shapes.num_documents) * self.shapes.document_tokens
        return (self.anchors + starts[:, None]).flatten()


def build_case(shapes: Shapes, *, seed: int = 0) -> Case:
    """Draw a case; the same seed gives the same one."""
    generator = Generator().manual_seed(seed)
    loss_mask = _chat_mask(shapes.document_tokens)
    input_ids = torch.randint(shapes.mask_token_id, (shapes.num_tokens,), generator=generator)
    embedding = torch.randn(shapes.vocab_size, shapes.hidden_size, generator=generator) * 0.02
    anchors = [
        select_anchors(loss_mask, shapes.anchors_per_document, generator=generator)
        for _ in range(shapes.num_documents)
    ]
    width = shapes.num_taps * shapes.hidden_size
    return Case(
        shapes=shapes,
        features=torch.randn(shapes.num_tokens, width, generator=generator),
        input_ids=input_ids,
        loss_mask=loss_mask.repeat(shapes.num_documents),
        anchors=torch.stack(anchors),
        last_hidden=embedding[input_ids.roll(-1)],
        embedding=embedding,
        weights=_draw_weights(shapes, generator),
    )


def decay_weights(block_size: int) -> Tensor:
    """Give `[K]` float32: 0 for the anchor's slot, exp(-(k - 1) / gamma) for slot k."""
    weights_K = torch.exp(-(torch.arange(block_size) - 1) / DECAY_GAMMA)
    weights_K[0] = 0.0
    return weights_K


def _chat_mask(num_tokens: int) -> Tensor:
    """Mark the two answers of a chat: question, answer, short follow-up, answer to the end."""
    mask = torch.ones(num_tokens, dtype=torch.bool)
    mask[: min(QUESTION_TOKENS, num_tokens // 4)] = False
    middle = num_tokens // 2
    mask[middle : middle + FOLLOW_UP_TOKENS] = False
    return mask


def _draw_weights(shapes: Shapes, generator: Generator) -> dict[str, Tensor]:
    """Draw matrices at 0.02 and norms around 1, so that a wrong norm shows."""
    return {
        name: torch.randn(size, generator=generator) * 0.02
        if len(size) > 1
        else 1 + 0.1 * torch.randn(size, generator=generator)
        for name, size in _weight_sizes(shapes).items()
    }


def _weight_sizes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    width, inner = shapes.hidden_size, shapes.intermediate_size
    queries = shapes.num_attention_heads * shapes.head_dim
    keys = shapes.num_key_value_heads * shapes.head_dim
    layer = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "self_attn.q_norm": (shapes.head_dim,),
        "self_attn.k_norm": (shapes.head_dim,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    sizes = {"fc.weight": (width, shapes.num_taps * width)}
    sizes |= {"hidden_norm.weight": (width,), "norm.weight": (width,)}
    for index in range(shapes.num_hidden_layers):
        sizes |= {f"layers.{index}.{name}.weight": size for name, size in layer.items()}
    return sizes
