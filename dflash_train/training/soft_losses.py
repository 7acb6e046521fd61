"""Losses against the target's distribution, on k + 1 buckets.

The target's distribution p is stored as its top k ids; all other ids share one bucket, the rest.
The drafter's q is summed over the same buckets, so at k = V these are the losses over the whole
vocabulary. Legend: S slots, k ids of the teacher, b = k + 1 buckets, the rest last.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_train.config import LossConfig

_TINY = 1e-30
"""Below any overlap that matters; keeps its logarithm finite."""


@dataclass(kw_only=True)
class SoftLoss:
    """How far the drafter's distribution is from the target's, slot by slot."""

    loss: Tensor
    """`[S]`, the weighted sum of the soft terms."""
    overlap: Tensor
    """`[S]`, sum min(p, q) = 1 - TV: the acceptance probability of a sampled draft."""


def bucket_probabilities(p_Sk: Tensor, *, is_complete: bool) -> Tensor:
    """Append the mass of the rest: `[S, k]` to `[S, b]`.

    Args:
        p_Sk: The target's probabilities of the kept ids.
        is_complete: They are all ids, so what is missing to 1 is rounding.
    """
    rest = (1 - p_Sk.sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat([p_Sk, torch.zeros_like(rest) if is_complete else rest], dim=-1)


def soft_loss(log_q_Sb: Tensor, p_Sb: Tensor, loss: LossConfig) -> SoftLoss:
    """Add up KL, TV and both LK losses of each slot with the recipe's coefficients.

    With alpha = sum min(p, q): KL = sum p log(p / q); TV = 1 - alpha; LK-alpha = -log alpha;
    LK-lambda = s KL + (1 - s) TV with s = exp(-eta alpha), alpha without gradient in s
    (arXiv 2602.23881).

    Args:
        log_q_Sb: `[S, b]`, log q, finite also where q is 0.
        p_Sb: `[S, b]` from `bucket_probabilities`.
        loss: Coefficients and eta.
    """
    kl = (torch.xlogy(p_Sb, p_Sb) - p_Sb * log_q_Sb).sum(-1)
    overlap = torch.minimum(p_Sb, log_q_Sb.exp()).sum(-1)
    kl_share = torch.exp(-loss.lk_eta * overlap.detach())
    total = (
        loss.kl * kl
        + loss.tv * (1 - overlap)
        - loss.lk_alpha * overlap.clamp(min=_TINY).log()
        + loss.lk_lambda * (kl_share * kl + (1 - kl_share) * (1 - overlap))
    )
    return SoftLoss(loss=total, overlap=overlap.detach())
