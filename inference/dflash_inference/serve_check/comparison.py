"""One request answered by a server and by our decoder: where do the two part?

Three things are compared, in this order: the tokens, the tokens against those that the server
writes without a drafter, and how many drafts it kept in each step. What a server counts in the last
step of a request depends on how it treats drafts behind the end, so that step is told, not judged.

Where two computations of the same logits round differently, a near-tie turns over and everything
behind it is another text. So a request is compared up to its first difference, and the question is
whether the target, or the drafter, was undecided there: `near_tie.py` answers it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import zip_longest

from dflash_inference.trace import DecodeTrace, TopTwo, num_matching_tokens


class Aspect(Enum):
    """What differs."""

    tokens = "tokens"
    """The server's tokens are not our decoder's."""
    without_drafter = "without_drafter"
    """The server's tokens are not those that it writes without the drafter."""
    steps = "steps"
    """A step kept another number of drafts."""
    counts = "counts"
    """The server's sums over the request do not fit the steps."""


@dataclass(kw_only=True)
class DraftCounts:
    """What a server counts of one request: sums over its steps."""

    num_drafts: int
    num_accepted: int
    accepted_at: list[int] | None = None
    """Steps that kept the draft of each position, the first draft's first; None: not counted."""

    @classmethod
    def of_steps(cls, accepted: list[int], *, num_positions: int) -> "DraftCounts":
        """Sum the accepted drafts of steps."""
        at = [sum(kept > place for kept in accepted) for place in range(num_positions)]
        return cls(num_drafts=len(accepted), num_accepted=sum(accepted), accepted_at=at)


@dataclass(kw_only=True)
class ServedAnswer:
    """What a server did with one request."""

    id: str
    output_ids: list[int]
    finish_reason: str
    accepted: list[int] | None = None
    """Drafts kept in each step, in order; None where the server tells sums alone."""
    counts: DraftCounts | None = None
    """None where it counts nothing, or decoded without a drafter."""
    remarks: list[str] = field(default_factory=list)
    """What a reader must know of this server; sentences without a full stop."""


@dataclass(kw_only=True)
class Difference:
    """The first difference of one kind."""

    aspect: Aspect
    position: int
    """Output token, counted from 0, at which it shows."""
    step: int | None = None
    """Verify step, counted from 0, if a step differs."""
    ours: int | None = None
    """Our token, or the drafts that we kept; None: we had ended."""
    theirs: int | None = None
    undecided: TopTwo | None = None
    """The two best candidates there and their logits, as we compute them; None: not looked at."""
    is_near_tie: bool = False
    """The two sides took these two candidates, and their gap is at rounding level."""


Judge = Callable[[Difference], Difference]
"""Adds to a difference whether the target or the drafter was undecided there."""


@dataclass(kw_only=True)
class RequestFinding:
    """One request, compared up to its first difference."""

    id: str
    num_tokens: int
    """Of the server's answer."""
    num_equal_tokens: int
    """Tokens before the first that differs from ours."""
    accepted: list[int]
    """Drafts that we kept in each step that was compared and found equal."""
    ours: list[int]
    """Drafts that we kept in every step."""
    theirs: list[int]
    """Drafts that the server kept; empty if it does not tell them by step."""
    last_step_differs: bool = False
    """The last step, which is not judged, was counted otherwise."""
    differences: list[Difference] = field(default_factory=list)

    @property
    def real_differences(self) -> list[Difference]:
        """Those that no near-tie explains."""
        return [each for each in self.differences if not each.is_near_tie]

    @property
    def near_ties(self) -> list[Difference]:
        """Those that a near-tie explains."""
        return [each for each in self.differences if each.is_near_tie]


def compare_request(
    ours: DecodeTrace, served: ServedAnswer, *, plain: ServedAnswer | None, judge: Judge
) -> RequestFinding:
    """Compare one request up to its first difference.

    Args:
        ours: Our decoding of it, from `own_steps`: no block narrowed by the end of the budget.
        served: The server's answer with the drafter.
        plain: Its answer without; None if it was not asked for one.
        judge: Tells a near-tie from a difference.
    """
    num_equal = num_matching_tokens(ours.output_ids, served.output_ids)
    accepted = [step.num_accepted for step in ours.steps]
    finding = RequestFinding(
        id=served.id,
        num_tokens=len(served.output_ids),
        num_equal_tokens=num_equal,
        accepted=[],
        ours=accepted,
        theirs=served.accepted or [],
    )
    found = [_differing_tokens(Aspect.tokens, ours.output_ids, served.output_ids)]
    if plain is not None:
        found.append(_differing_tokens(Aspect.without_drafter, plain.output_ids, served.output_ids))
    is_whole = num_equal == len(ours.output_ids) == len(served.output_ids)
    parted = _compare_steps(finding) if served.accepted is not None else None
    found.append(parted)
    if served.accepted is None and is_whole:
        finding.accepted = accepted[:-1]
    if is_whole and parted is None and served.counts is not None:
        found.append(_compare_counts(accepted, served, served.counts))
    finding.differences = [judge(each) for each in found if each is not None]
    return finding


def _differing_tokens(aspect: Aspect, ours: list[int], theirs: list[int]) -> Difference | None:
    place = num_matching_tokens(ours, theirs)
    if place == len(ours) == len(theirs):
        return None
    return Difference(
        aspect=aspect,
        position=place,
        ours=ours[place] if place < len(ours) else None,
        theirs=theirs[place] if place < len(theirs) else None,
    )


def _compare_steps(finding: RequestFinding) -> Difference | None:
    """Compare the steps whose tokens are the same on both sides; the last one is not judged."""
    mine, theirs = finding.ours, finding.theirs
    num_steps = max(len(mine), len(theirs))
    position = 1  # output token that the step drafts first; prefill wrote the one before
    for index, (own, other) in enumerate(zip_longest(mine, theirs)):
        shown = position + min(own or 0, other or 0)  # the first token that both did not draft
        if shown >= finding.num_equal_tokens:
            return None  # the tokens themselves differ there, and are reported
        if index + 1 == num_steps:
            finding.last_step_differs = own != other
            return None
        if own is None or own != other:
            return Difference(
                aspect=Aspect.steps, position=shown, step=index, ours=own, theirs=other
            )
        finding.accepted.append(own)
        position = shown + 1
    return None


def _compare_counts(
    accepted: list[int], served: ServedAnswer, counts: DraftCounts
) -> Difference | None:
    """Compare sums: with the server's own steps, else with ours, the last step left open."""
    theirs = served.accepted or []
    num_positions: int = max([len(counts.accepted_at or []), *accepted, *theirs])
    at = [*(counts.accepted_at or []), *[0] * num_positions][:num_positions]
    steps = accepted[:-1] if served.accepted is None else served.accepted
    known = DraftCounts.of_steps(steps, num_positions=num_positions)
    more_drafts = counts.num_drafts - known.num_drafts
    if served.accepted is None:
        fits = more_drafts in (0, 1)
    else:
        fits = more_drafts == 0 and counts.num_accepted == known.num_accepted
    if counts.accepted_at is not None and known.accepted_at is not None:
        rest = [more - less for more, less in zip(at, known.accepted_at, strict=True)]
        fits &= _is_one_step(rest) if served.accepted is None else not any(rest)
    if fits:
        return None
    return Difference(
        aspect=Aspect.counts,
        position=len(served.output_ids),
        ours=known.num_drafts,
        theirs=counts.num_drafts,
    )


def _is_one_step(rest: list[int]) -> bool:
    """Whether counts by position are those of at most one step: ones, then zeros."""
    return all(each in (0, 1) for each in rest) and rest == sorted(rest, reverse=True)
