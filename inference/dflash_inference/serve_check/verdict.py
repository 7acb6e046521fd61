"""The sentence about one server: agrees, or differs at request i and step j, and the likely cause.

The causes are read from the pattern of all requests, in the order in which they hide each other;
the patterns are those of faults that shapes never show.
"""

from dataclasses import dataclass, field
from typing import Any

from dflash_inference.serve_check.comparison import Aspect, Difference, RequestFinding

DEMANDED_ACCEPTED, DEMANDED_LENGTH = 500, 1.5
"""Accepted drafts and acceptance length below which agreement proves little."""
_NOTHING_KEPT = 1.15
"""Acceptance length of a drafter whose drafts are kept by chance."""
_NEARLY_ALL = 0.8
"""Share of equal steps from which the drafter itself must be the same."""
_LATE = 2 / 3
"""Share of a request after which a first difference speaks for the length of the context."""


@dataclass(kw_only=True)
class SideVerdict:
    """What was found about one server serving one folder."""

    side: str
    """Such as `vLLM, zlab`."""
    requests: list[RequestFinding]
    by_step: bool
    """The server told its steps, not sums alone."""
    remarks: list[str] = field(default_factory=list)
    """What a reader must know of the server; sentences without a full stop."""

    @property
    def agrees(self) -> bool:
        """No request has a difference that a near-tie does not explain."""
        return not self.differing

    @property
    def differing(self) -> list[int]:
        """Requests with a real difference, counted from 0."""
        return [i for i, each in enumerate(self.requests) if each.real_differences]

    @property
    def num_near_ties(self) -> int:
        """Requests that were compared up to a near-tie only."""
        return sum(bool(each.near_ties) for each in self.requests)

    @property
    def num_steps(self) -> int:
        """Steps that were compared and found equal."""
        return sum(len(each.accepted) for each in self.requests)

    @property
    def num_accepted(self) -> int:
        """Drafts that were kept in these steps."""
        return sum(sum(each.accepted) for each in self.requests)

    @property
    def acceptance_length(self) -> float:
        """Tokens per step of these steps."""
        return 1 + self.num_accepted / max(1, self.num_steps)

    @property
    def proves_enough(self) -> bool:
        """Whether enough drafts were kept for agreement to mean something."""
        enough = self.num_accepted >= DEMANDED_ACCEPTED
        return enough and self.acceptance_length >= DEMANDED_LENGTH

    def sentence(self) -> str:
        """Give the verdict."""
        if not self.agrees:
            return f"{self.side}: DIFFERS at {self._where()}; likely {likely_cause(self)}."
        weak = "" if self.proves_enough else (
            f" Fewer than {DEMANDED_ACCEPTED} accepted drafts at {DEMANDED_LENGTH} tokens a step: "
            "ask for more or longer requests before you trust it."
        )  # fmt: skip
        return (
            f"{self.side}: agrees on {len(self.requests)} requests, {self.num_steps} steps and "
            f"{self.num_accepted} accepted drafts, {self.acceptance_length:.2f} tokens a step; "
            f"{self.num_near_ties} compared up to a near-tie.{weak}"
        )

    def lines(self) -> list[str]:
        """Give all that is to be printed; the verdict comes last."""
        remarks = [f"{self.side}: {remark}." for remark in self.remarks]
        return [*remarks, *self.difference_lines(), *self.near_tie_lines(), self.sentence()]

    def near_tie_lines(self) -> list[str]:
        """Give each near-tie with both logits, one a line."""
        return [
            f"near-tie: request {i} ({each.id}), {_place(tie)}: {_candidates(tie)}"
            for i, each in enumerate(self.requests)
            for tie in each.near_ties
        ]

    def difference_lines(self, *, most: int = 5) -> list[str]:
        """Give the first real differences, one a line."""
        lines = [
            f"difference: request {i} ({self.requests[i].id}), {_place(each)}: {each.aspect.value}"
            f", ours {each.ours}, theirs {each.theirs}; {_candidates(each)}"
            for i in self.differing
            for each in self.requests[i].real_differences
        ]
        return lines[:most] + ([f"... {len(lines) - most} more"] if len(lines) > most else [])

    def as_json(self) -> dict[str, Any]:
        """Give the figures."""
        return {
            "side": self.side,
            "agrees": self.agrees,
            "requests": len(self.requests),
            "requests_differing": len(self.differing),
            "near_ties": self.num_near_ties,
            "last_steps_counted_otherwise": sum(each.last_step_differs for each in self.requests),
            "steps": self.num_steps,
            "accepted_drafts": self.num_accepted,
            "acceptance_length": round(self.acceptance_length, 3),
            "compared_by_step": self.by_step,
            "proves_enough": self.proves_enough,
            "remarks": self.remarks,
            "cause": None if self.agrees else likely_cause(self),
        }

    def _where(self) -> str:
        first = self.differing[0]
        each = self.requests[first].real_differences[0]
        number = f"{len(self.differing)} of {len(self.requests)} requests"
        return f"request {first}, {_place(each)} ({number})"


def likely_cause(verdict: SideVerdict) -> str:
    """Name what most probably causes the differences, from their pattern."""
    real = [each for finding in verdict.requests for each in finding.real_differences]
    aspects = {each.aspect for each in real}
    if Aspect.without_drafter in aspects:
        return (
            "the server's verification: with the drafter it writes other text than without, which "
            "no drafter can cause. Look at its attention backend, KV precision and sampling"
        )
    if Aspect.tokens in aspects:
        return (
            "another target than ours: weights, revision, number format or stop tokens. Its text "
            "is no matter of the drafter"
        )
    if Aspect.steps in aspects:
        return _cause_of_steps(verdict)
    return "the server's own counting: its sums do not fit its steps, though the tokens agree"


def _cause_of_steps(verdict: SideVerdict) -> str:
    theirs = [kept for each in verdict.requests for kept in each.theirs]
    ours = [kept for each in verdict.requests for kept in each.ours]
    length = 1 + sum(theirs) / max(1, len(theirs))
    first = [
        (each, verdict.requests[i])
        for i in verdict.differing
        for each in verdict.requests[i].real_differences
        if each.aspect is Aspect.steps and each.step is not None
    ]
    if length < _NOTHING_KEPT <= 1 + sum(ours) / max(1, len(ours)):
        return (
            f"the server's input to the drafter: it keeps next to nothing ({length:.2f} tokens a "
            "step). Tap ids (one convention counts from 1), RoPE or the mask id"
        )
    if verdict.num_steps >= _NEARLY_ALL * len(ours):
        return (
            "the drafter's numbers: single drafts turn, most steps are equal. Number format, norms "
            "or precision of RoPE; a request or two may be a near-tie wider than rounding explains"
        )
    if all((each.step or 0) >= _LATE * len(finding.ours) for each, finding in first):
        return (
            "the length of the context: requests agree at first and part late. Sliding window, "
            "RoPE range or prefix cache"
        )
    if all(each.ours and each.theirs for each, _ in first):
        return (
            "the inside of a block: the first draft agrees and later ones do not. Causal flag, "
            "served width, convolution or candidate selector"
        )
    return "the positions or the features of a block: causal flag, window, RoPE or order of taps"


def _place(each: Difference) -> str:
    step = "" if each.step is None else f"step {each.step}, "
    return f"{step}output token {each.position}"


def _candidates(each: Difference) -> str:
    if each.undecided is None:
        return "candidates not known"
    (first, second), (high, low) = each.undecided.ids, each.undecided.logits
    return f"logit {high:.6f} of token {first}, {low:.6f} of token {second}"
