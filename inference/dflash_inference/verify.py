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
    """Drafted tokens kept, 0 .. block width - 1."""
    bonus_token: int
    """The target's own token after the last accepted one; the next anchor."""


def accept_greedy(draft_ids: Tensor, target_logits: Tensor) -> Verdict:
    """Keep the longest prefix of the draft that the target would have written.

    Row i of the logits is the target's view after slot i, so it judges `draft_ids[i]`.

    Args:
        draft_ids: `[m - 1]` int64, the tokens of slots 1 .. m - 1.
        target_logits: `[m, V]`, verify of the anchor and the draft.
    """
    target_ids = target_logits.argmax(dim=-1)  # [m]
    is_kept = (draft_ids == target_ids[:-1]).long().cumprod(dim=0)  # [m - 1]
    num_accepted = int(is_kept.sum())
    return Verdict(num_accepted=num_accepted, bonus_token=int(target_ids[num_accepted]))
