"""Who drafts in a step, and how many drafts are worth a place in the verify pass."""

from dataclasses import dataclass
from typing import Protocol

from dflash_inference.drafting import Draft, no_draft
from dflash_inference.request import RequestState


class DraftPolicy(Protocol):
    """Decides before and after drafting, from committed tokens and the drafter alone.

    The output stays the target's own as long as the decision to verify draft i rests on what was
    committed and on drafts before i: never on draft i itself, on later ones, or on what the target
    would say. (A drafted token that was looked at first is no sample of its distribution any more.)
    """

    def plan(self, requests: list[RequestState]) -> list[Draft | None]:
        """Give for each request of a step what needs no drafter: a copy, or nothing at all.

        None asks the drafter.
        """
        ...

    def num_verified(self, request: RequestState, draft: Draft) -> int:
        """Give how many of the drafter's drafts, from the left, the target shall verify."""
        ...


@dataclass(frozen=True)
class FirstDrafts:
    """Always verify the same number of the drafter's drafts; none is plain decoding."""

    number: int | None = None
    """None is all of them."""

    def plan(self, requests: list[RequestState]) -> list[Draft | None]:
        """Ask the drafter unless nothing would be verified."""
        return [no_draft() if self.number == 0 else None for _ in requests]

    def num_verified(self, request: RequestState, draft: Draft) -> int:
        """Give the number, or what the budget left of it."""
        return len(draft.ids) if self.number is None else min(self.number, len(draft.ids))
