"""Acceptance: which drafted tokens the target keeps, and the token it adds itself.

Pure functions on many blocks at once; chance comes in as uniform numbers. Whatever the drafter
proposes, a committed token is the target's argmax (greedy) or distributed as the target's own
sample (speculative sampling, arXiv 2211.17192), given the tokens before it. Legend: A blocks, n
drafts of each, V vocabulary. Row i of what the target says comes after token i of anchor and
drafts, so it judges draft i.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_inference.sampling import draw


@dataclass(kw_only=True)
class Verdicts:
    """What one verify pass decides about each block."""

    num_accepted: Tensor
    """`[A]` int64, drafted tokens kept, 0 .. n."""
    bonus_token: Tensor
    """`[A]` int64, the target's own token after the last accepted one; the next anchor."""


def accept_greedy(draft_ids: Tensor, target_logits: Tensor) -> Verdicts:
    """Keep the longest prefix of each draft that the target would have written.

    Args:
        draft_ids: `[A, n]` int64, the drafts from left to right.
        target_logits: `[A, n + 1, V]`, verify of the anchor and the drafts.
    """
    return _keep_prefix(draft_ids, target_logits.argmax(dim=-1))


def accept_argmax_proposal(
    draft_ids: Tensor, target_probabilities: Tensor, uniforms: Tensor
) -> Verdicts:
    """Let the target draw every token of its own; keep drafts up to the first that differs.

    The law of rejection sampling with a proposal that puts everything on the draft.

    Args:
        draft_ids: `[A, n]` int64.
        target_probabilities: `[A, n + 1, V]`.
        uniforms: `[A, n + 1]` in [0, 1).
    """
    return _keep_prefix(draft_ids, draw(target_probabilities, uniforms))


def accept_sampled_proposal(
    draft_ids: Tensor, target_probabilities: Tensor, *, proposals: Tensor, uniforms: Tensor
) -> Verdicts:
    """Keep draft i with probability `min(1, p(d) / q(d))`, else draw from what p has above q.

    Args:
        draft_ids: `[A, n]` int64, drawn from `proposals`.
        target_probabilities: `[A, n + 1, V]`, p.
        proposals: `[A, n, V]`, q as it was drawn from.
        uniforms: `[A, n + 1]` in [0, 1): n decisions, then the bonus token.
    """
    num_drafts = draft_ids.shape[1]
    proposals = proposals.to(target_probabilities)
    judged = target_probabilities[:, :num_drafts]
    p, q = (each.gather(-1, draft_ids[..., None]).squeeze(-1) for each in (judged, proposals))
    is_kept = uniforms[:, :num_drafts].to(p) * q < p  # q(d) > 0: it was drawn
    num_accepted = is_kept.long().cumprod(dim=1).sum(dim=1)
    # Behind the last draft nothing was proposed: q is 0 there, and the residual is p itself.
    nothing = torch.zeros_like(target_probabilities[:, :1])
    row = num_accepted[:, None, None].expand(-1, 1, target_probabilities.shape[-1])
    p_row = target_probabilities.gather(1, row).squeeze(1)
    q_row = torch.cat([proposals, nothing], dim=1).gather(1, row).squeeze(1)
    residual = (p_row - q_row).clamp(min=0)
    is_empty = residual.sum(-1, keepdim=True) == 0  # p equals q: rejected by rounding alone
    bonus_token = draw(torch.where(is_empty, p_row, residual), uniforms[:, num_drafts])
    return Verdicts(num_accepted=num_accepted, bonus_token=bonus_token)


def _keep_prefix(draft_ids: Tensor, target_ids: Tensor) -> Verdicts:
    """Keep drafts `[A, n]` up to the first that is not the target's, `[A, n + 1]`."""
    is_kept = (draft_ids == target_ids[:, :-1]).long().cumprod(dim=1)
    num_accepted = is_kept.sum(dim=1)
    bonus_token = target_ids.gather(1, num_accepted[:, None]).squeeze(1)
    return Verdicts(num_accepted=num_accepted, bonus_token=bonus_token)
