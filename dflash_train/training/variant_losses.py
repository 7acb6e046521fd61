"""The losses of the heads that variants have beside the trunk.

DFlash 2's published code leaves the selector's objective open; as in other trainers it is the cross
entropy over the candidates after the true previous token, and a label that is no candidate takes
the weakest one's place. DSpark's confidence head (arXiv 2607.05147) learns the probability that a
slot's draft is accepted. Legend: S slots, C candidates, E hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dflash_train.drafter.model import Drafter
from dflash_train.features.frozen_head import FrozenHead

_CHUNK = 256
"""Slots whose candidates' head rows `[c, C, E]` exist at once."""


@dataclass(kw_only=True)
class SelectorTerms:
    """What the candidate selector makes of each slot."""

    loss: Tensor
    """`[S]`, cross entropy over the candidates, in nats."""
    is_correct: Tensor
    """`[S]` bool, the best-scored candidate is the label and was found without help."""


def selector_terms(
    drafter: Drafter, head: FrozenHead, hidden_SE: Tensor, *, previous_S: Tensor, labels_S: Tensor,
    candidates_SC: Tensor,
) -> SelectorTerms:  # fmt: skip
    """Score the candidates of each slot after the true previous token.

    Args:
        drafter: A DFlash 2 drafter.
        head: The whole head, or a sample of it.
        hidden_SE: `[S, E]`; gradients flow to it and to the selector.
        previous_S: `[S]` int64, token before each slot's label.
        labels_S: `[S]` int64, rows of the head.
        candidates_SC: `[S, C]` int64, rows of the head, best first.
    """
    is_found_S = (candidates_SC == labels_S[:, None]).any(dim=1)
    offered_SC = candidates_SC.clone()
    offered_SC[:, -1] = torch.where(is_found_S, offered_SC[:, -1], labels_S)
    parts = zip(
        hidden_SE.split(_CHUNK), previous_S.split(_CHUNK), offered_SC.split(_CHUNK), strict=True
    )
    scores_SC = torch.cat(
        [
            checkpoint(
                _scores, drafter, head, hidden, previous, offered,
                use_reentrant=False, preserve_rng_state=False, determinism_check="none",
            )
            for hidden, previous, offered in parts
        ]
    )  # fmt: skip
    place_S = (offered_SC == labels_S[:, None]).int().argmax(dim=1)
    return SelectorTerms(
        loss=functional.cross_entropy(scores_SC, place_S, reduction="none"),
        is_correct=is_found_S & (scores_SC.argmax(dim=1) == place_S),
    )


def confidence_loss(
    drafter: Drafter, hidden_SE: Tensor, *, previous_S: Tensor, accepted_S: Tensor
) -> Tensor:
    """Give the binary cross entropy of each slot's confidence, `[S]` in nats.

    Args:
        drafter: A drafter with a confidence head.
        hidden_SE: `[S, E]`.
        previous_S: `[S]` int64, token before each slot's label.
        accepted_S: `[S]` in 0..1, probability that the slot's draft is accepted, detached.
    """
    logits_S = drafter.confidence_logits(hidden_SE, previous_S)
    logits_S = logits_S.to(torch.promote_types(logits_S.dtype, torch.float32))
    target_S = accepted_S.detach().to(logits_S.dtype)
    return functional.binary_cross_entropy_with_logits(logits_S, target_S, reduction="none")


def _scores(
    drafter: Drafter, head: FrozenHead, hidden_cE: Tensor, previous_c: Tensor, index_cC: Tensor
) -> Tensor:
    assert drafter.candidate_selector is not None
    rows_cCE = functional.embedding(index_cC, head.lm_head_weight)
    logits_cC = (rows_cCE @ hidden_cE.to(rows_cCE.dtype)[..., None]).squeeze(-1)
    logits_cC = logits_cC.to(torch.promote_types(logits_cC.dtype, torch.float32))
    return drafter.candidate_selector(
        hidden_cE,
        previous_c,
        logits_SC=drafter.shape_logits(logits_cC),
        ids_SC=head.output_ids[index_cC],
    )
