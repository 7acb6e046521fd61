"""The target's embedding table and LM head, which every drafter borrows and none trains.

Legend: V vocabulary, Vd draft vocabulary, E hidden size.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from dflash_train.config import require


@dataclass(kw_only=True)
class FrozenHead:
    """The target's embedding table and LM head, which the drafter borrows."""

    embedding_weight: Tensor
    """`[V, E]`."""
    lm_head_weight: Tensor
    """`[V, E]`; the same tensor as the embedding where the target ties them. `[Vd, E]` where only
    some ids can be drafted."""
    draft_token_ids: Tensor | None = None
    """`[Vd]` int64, ascending: the target's id of each row of the head; None means all V."""

    def embed(self, ids: Tensor) -> Tensor:
        """Look up raw rows `[..., E]`, without any scale of the target's embedding module."""
        return functional.embedding(ids, self.embedding_weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Multiply `[..., E]` hidden states with the head: `[..., V]`, or `[..., Vd]`."""
        return functional.linear(hidden, self.lm_head_weight)

    def restricted(self, ids: Tensor) -> "FrozenHead":
        """Give the head of a reduced draft vocabulary, from a full one.

        Args:
            ids: `[Vd]` int64, ascending ids of the target's vocabulary.
        """
        assert self.draft_token_ids is None
        ids = ids.to(self.lm_head_weight.device)
        return FrozenHead(
            embedding_weight=self.embedding_weight,
            lm_head_weight=self.lm_head_weight[ids],
            draft_token_ids=ids,
        )

    @functools.cached_property
    def output_ids(self) -> Tensor:
        """Give `[V]` or `[Vd]` int64, the target's id of each row of the head."""
        if self.draft_token_ids is not None:
            return self.draft_token_ids
        return torch.arange(len(self.lm_head_weight), device=self.lm_head_weight.device)


def frozen_head(model: PreTrainedModel) -> FrozenHead:
    """Borrow embedding and LM head of a loaded model, through its accessors."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    require(
        output is not None,
        f"target.name_or_path (={model.name_or_path}) has no LM head. Use a causal language model.",
    )
    assert output is not None
    return FrozenHead(
        embedding_weight=embedding.get_parameter("weight").detach(),
        lm_head_weight=output.get_parameter("weight").detach(),
    )
