"""Two drafters, or two traces of the same requests, side by side.

    dflash-train compare A B [kind=replay] [first_difference=true] [json=true]

Requests are paired by id and both sides are resampled together (statistics.py). A side is better
or worse only if the 95 % interval of the difference excludes 0, and never on fewer than 50
requests. `first_difference=true` asks instead where two traces of the same requests part.
"""

from dataclasses import asdict, dataclass
from typing import Any

from dflash_inference.comparison_sides import Side, read_side
from dflash_inference.request_rows import RequestRow, sums_of
from dflash_inference.statistics import (
    FEWEST_FOR_A_CLAIM,
    AcceptanceLength,
    Difference,
    acceptance_length,
    paired_difference,
)
from dflash_inference.trace import (
    TRAFFIC_SPLIT,
    StepDifference,
    first_difference,
    num_matching_tokens,
)
from dflash_train.config import require


@dataclass(kw_only=True)
class PairedSlice:
    """The same requests on both sides: all of a split, or one group of it."""

    name: str
    first: AcceptanceLength
    second: AcceptanceLength
    difference: Difference
    """First minus second, pooled."""

    @property
    def sentence(self) -> str:
        """Say who is better, in words."""
        gap = (
            f"{self.difference.value:+.3f} tokens per step, 95 % interval "
            f"{self.difference.interval.low:+.3f} to {self.difference.interval.high:+.3f}"
        )
        match self.difference.verdict:
            case "better":
                return f"A is better than B ({gap})"
            case "worse":
                return f"A is worse than B ({gap})"
        if self.difference.num_requests < FEWEST_FOR_A_CLAIM:
            return f"undecided ({gap}): fewer than {FEWEST_FOR_A_CLAIM} requests make no claim"
        return f"undecided ({gap}): the interval includes 0"


@dataclass(kw_only=True)
class Comparison:
    """Two sides on the requests that both have."""

    first: Side
    second: Side
    slices: list[PairedSlice]
    """Each split and behind it its groups; the traffic, or all of a trace file, comes first."""
    num_only_first: int
    """Requests with a verify step that only the first side has."""
    num_only_second: int

    @property
    def remarks(self) -> list[str]:
        """What a reader must know before believing the figures."""
        said: list[str] = []
        if self.num_only_first or self.num_only_second:
            said.append(
                f"left out: {self.num_only_first} requests that only A has, "
                f"{self.num_only_second} that only B has"
            )
        if self.first.ceiling != self.second.ceiling:
            said.append(
                f"the ceilings differ: a step of A commits at most {self.first.ceiling} tokens, "
                f"one of B {self.second.ceiling}"
            )
        shared = self.first.traces.keys() & self.second.traces.keys()
        others = sum(
            self.first.traces[name].output_ids != self.second.traces[name].output_ids
            for name in shared
        )
        if others:
            said.append(f"{others} of {len(shared)} requests have different answers on the sides")
        return said

    def lines(self) -> list[str]:
        """Give the comparison as lines to print."""
        said = [f"A {self.first.place}", f"B {self.second.place}"]
        width = max(len(each.name) for each in self.slices)
        for each in self.slices:
            said.append(
                f"{each.name:<{width}}  A {each.first.pooled:.3f}  B {each.second.pooled:.3f}  "
                f"{each.difference.num_requests} requests: {each.sentence}"
            )
        return said + self.remarks

    def as_json(self) -> dict[str, Any]:
        """Give the comparison as JSON values."""
        return {
            "a": self.first.place,
            "b": self.second.place,
            "slices": [
                {
                    "name": each.name,
                    "verdict": each.difference.verdict,
                    "difference": asdict(each.difference),
                    "a": asdict(each.first),
                    "b": asdict(each.second),
                }
                for each in self.slices
            ],
            "num_only_a": self.num_only_first,
            "num_only_b": self.num_only_second,
            "ceiling_a": self.first.ceiling,
            "ceiling_b": self.second.ceiling,
            "remarks": self.remarks,
        }


@dataclass(kw_only=True)
class RequestDifference:
    """Where two traces of one request part; None where they do not."""

    id: str
    num_steps: int
    """Of the first side."""
    step: StepDifference | None
    """Step, counted from 0."""
    output_position: int | None
    """First token of the output that differs, counted from 0."""

    @property
    def is_equal(self) -> bool:
        """Whether both did the same at every step and wrote the same."""
        return self.step is None and self.output_position is None


@dataclass(kw_only=True)
class Differences:
    """Two traces of the same requests, step by step."""

    requests: list[RequestDifference]
    num_only_first: int
    num_only_second: int

    @property
    def unequal(self) -> list[RequestDifference]:
        """The requests that part."""
        return [each for each in self.requests if not each.is_equal]

    def lines(self) -> list[str]:
        """Give the findings as lines to print."""
        said = [
            f"{len(self.requests) - len(self.unequal)} of {len(self.requests)} requests are equal "
            "at every step"
        ]
        said += [_difference_line(each) for each in self.unequal]
        if self.num_only_first or self.num_only_second:
            said.append(
                f"left out: {self.num_only_first} requests that only A has, "
                f"{self.num_only_second} that only B has"
            )
        return said

    def as_json(self) -> dict[str, Any]:
        """Give the findings as JSON values."""
        return {
            "num_requests": len(self.requests),
            "num_equal": len(self.requests) - len(self.unequal),
            "differences": [asdict(each) for each in self.unequal],
            "num_only_a": self.num_only_first,
            "num_only_b": self.num_only_second,
        }


def compare_places(
    first: str, second: str, *, kind: str = "replay", resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Compare two run folders, reports or trace files.

    Raises:
        ValueError: A place holds nothing to compare, or no request is on both sides.
    """
    sides = (read_side(first, kind=kind), read_side(second, kind=kind))
    return compare_sides(*sides, resamples=resamples, seed=seed)


def compare_sides(first: Side, second: Side, *, resamples: int, seed: int) -> Comparison:
    """Pair the requests of two sides and compare each split and each group of it.

    Raises:
        ValueError: No request is on both sides.
    """
    shared = [name for name in first.rows if name in second.rows]
    require(
        bool(shared),
        f"{first.place} and {second.place} share no request with a verify step: ids of one do not "
        "occur in the other. Compare drafters on the same held-out requests.",
    )
    slices: list[PairedSlice] = []
    for split, names in _splits(shared, first, second).items():
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(first.rows[name].group, []).append(name)
        parts = {split or "all": names}
        if len(groups) > 1:
            ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
            parts |= {f"{split or 'all'}/{group}": members for group, members in ordered}
        for part, members in parts.items():
            slices.append(
                _pair(
                    part,
                    [first.rows[each] for each in members],
                    [second.rows[each] for each in members],
                    resamples=resamples,
                    seed=seed,
                )
            )
    return Comparison(
        first=first,
        second=second,
        slices=slices,
        num_only_first=len(first.rows) - len(shared),
        num_only_second=len(second.rows) - len(shared),
    )


def compare_rows(
    first: list[RequestRow], second: list[RequestRow], *, resamples: int, seed: int
) -> Difference | None:
    """Give the paired difference of two lists on the requests of both; None if they share none."""
    others = {row.id: row for row in second}
    shared = [row for row in first if row.id in others]
    if not shared:
        return None
    paired = _pair("", shared, [others[row.id] for row in shared], resamples=resamples, seed=seed)
    return paired.difference


def find_differences(
    first: str, second: str, *, kind: str = "replay", counts_are_clipped: bool = False
) -> Differences:
    """Find for every request the first step at which two traces differ.

    Args:
        first: A run folder or a trace file.
        second: Another.
        kind: Which traces of a run folder.
        counts_are_clipped: One side records accepted tokens after clipping (official package):
            the last step is then compared by its committed tokens.

    Raises:
        ValueError: A side holds no traces, or no request is on both.
    """
    sides = (read_side(first, kind=kind), read_side(second, kind=kind))
    for side in sides:
        require(
            bool(side.traces),
            f"{side.place} holds sums of requests, not their steps. Give traces: a run folder or a "
            "trace file.",
        )
    mine, theirs = sides[0].traces, sides[1].traces
    shared = [name for name in mine if name in theirs]
    require(bool(shared), f"{first} and {second} share no request id: nothing can be compared.")
    found: list[RequestDifference] = []
    for name in shared:
        one, other = mine[name], theirs[name]
        position = num_matching_tokens(one.output_ids, other.output_ids)
        is_same = position == len(one.output_ids) == len(other.output_ids)
        found.append(
            RequestDifference(
                id=name,
                num_steps=len(one.steps),
                step=first_difference(one, other, counts_are_clipped=counts_are_clipped),
                output_position=None if is_same else position,
            )
        )
    return Differences(
        requests=found,
        num_only_first=len(mine) - len(shared),
        num_only_second=len(theirs) - len(shared),
    )


def _pair(
    name: str,
    first: list[RequestRow],
    second: list[RequestRow],
    *,
    resamples: int,
    seed: int,
) -> PairedSlice:
    """Compare two lists of the same requests in the same order; the first side's weights count."""
    ours = sums_of(first)
    theirs = sums_of(second)
    theirs.weights, theirs.conversations = ours.weights, ours.conversations
    return PairedSlice(
        name=name,
        first=acceptance_length(ours, resamples=resamples, seed=seed),
        second=acceptance_length(theirs, resamples=resamples, seed=seed),
        difference=paired_difference(ours, theirs, resamples=resamples, seed=seed),
    )


def _splits(names: list[str], first: Side, second: Side) -> dict[str, list[str]]:
    """Group requests by split, as far as a side knows it; traffic comes first."""
    splits: dict[str, list[str]] = {}
    for name in names:
        split = first.splits.get(name) or second.splits.get(name, "")
        splits.setdefault(split, []).append(name)
    return dict(sorted(splits.items(), key=lambda item: (item[0] != TRAFFIC_SPLIT, item[0])))


def _difference_line(found: RequestDifference) -> str:
    said: list[str] = []
    if found.step is not None:
        sides = []
        for label, step in (("A", found.step.first), ("B", found.step.second)):
            sides.append(
                f"{label} has no such step"
                if step is None
                else f"{label} start {step.start} width {step.width} accepted {step.num_accepted} "
                f"committed {step.committed}"
            )
        said.append(f"step {found.step.index} of {found.num_steps}: {'; '.join(sides)}")
    if found.output_position is not None:
        said.append(f"output token {found.output_position} differs")
    return f"{found.id}: {'; '.join(said)}"
