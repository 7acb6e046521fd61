"""Acceptance: which drafted tokens the target keeps, and the token it adds itself.

Pure functions on one block. Greedy rule: a drafted token is kept while it is the target's
argmax under everything before it, so the committed text never depends on the drafter.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(kw_only=True)
class Verdict:
    """What one verify pass decides about a block."""

    num_accepted: int
    """Drafted tokens kept, 0 .. n of n drafts."""
    bonus_token: int
    """The target's own token after the last accepted one; the next anchor."""


def accept_greedy(draft_ids: Tensor, target_logits: Tensor) -> Verdict:
    """Keep the longest prefix of the draft that the target would have written.

    Row i of the logits is the target's view after token i of anchor and drafts, so it judges
    `draft_ids[i]`.

    Args:
        draft_ids: `[n]` int64, the drafts from left to right.
        target_logits: `[n + 1, V]`, verify of the anchor and the drafts.
    """
    target_ids = target_logits.argmax(dim=-1)  # [n + 1]
    is_kept = (draft_ids == target_ids[:-1]).long().cumprod(dim=0)  # [n]
    num_accepted = int(is_kept.sum())
    return Verdict(num_accepted=num_accepted, bonus_token=int(target_ids[num_accepted]))
