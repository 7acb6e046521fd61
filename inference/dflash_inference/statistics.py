"""Acceptance figures with intervals: pooled and per-request means, positions, differences.

Definitions: a step that keeps n drafted tokens has acceptance length n + 1. Pooled is
`sum (n + 1) / sum steps` over all requests and governs throughput; per request is the mean of
the requests' own means. Both are ratios of sums over requests, so one bootstrap serves them.

Steps of a request depend on each other, and so do the turns of a conversation: conversations are
resampled, never steps. Two ways of drafting are compared on the same resamples. Logged calls
that share one record count by its weight.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dflash_inference.trace import DecodeTrace

FEWEST_FOR_A_CLAIM = 50
RESAMPLE_CHUNK = 500

Floats = NDArray[np.float64]


@dataclass(kw_only=True)
class Interval:
    """A 95 % bootstrap interval: 2.5 and 97.5 percentiles."""

    low: float
    high: float


@dataclass(kw_only=True)
class RequestSums:
    """Per request: `sum (n + 1)`, steps, weight and the conversation it belongs to, each `[R]`."""

    tokens: Floats
    steps: Floats
    weights: Floats
    conversations: list[str]

    @classmethod
    def of(cls, traces: list[DecodeTrace]) -> "RequestSums":
        """Sum up traces; a request that prefill alone finished has no step and is left out."""
        stepped = [trace for trace in traces if trace.steps]
        return cls(
            tokens=np.array(
                [sum(step.acceptance_length for step in trace.steps) for trace in stepped], float
            ),
            steps=np.array([len(trace.steps) for trace in stepped], float),
            weights=np.array([trace.weight for trace in stepped], float),
            conversations=[trace.conversation or trace.id for trace in stepped],
        )

    @property
    def num_requests(self) -> int:
        """R, requests with at least one step."""
        return len(self.conversations)


@dataclass(kw_only=True)
class AcceptanceLength:
    """Mean acceptance lengths of one set of requests, with intervals and counts."""

    pooled: float
    interval: Interval
    """Of `pooled`."""
    per_request: float
    per_request_interval: Interval
    num_requests: int
    num_conversations: int
    num_steps: int


@dataclass(kw_only=True)
class Difference:
    """How one way of drafting differs from another in pooled acceptance length, on the same
    requests: one minus the other, or, where it is said to be relative, their ratio less 1."""

    value: float
    interval: Interval
    num_requests: int

    @property
    def verdict(self) -> str:
        """Say `better`, `worse` or `undecided`; no claim below 50 requests."""
        if self.num_requests < FEWEST_FOR_A_CLAIM:
            return "undecided"
        if self.interval.low > 0:
            return "better"
        return "worse" if self.interval.high < 0 else "undecided"


@dataclass(kw_only=True)
class PositionAcceptance:
    """Acceptance of drafts 1 .. num_drafts, counted from the anchor, one entry of a list each.

    Draft i stands i positions after the anchor, whichever slot of the block drafts it: slot i, or
    slot i - 1 in DSpark's shifted layout. So drafters of every kind are compared at equal places.
    """

    offered: list[int]
    """Steps that drafted this far."""
    reached: list[int]
    """Steps that kept this draft, and so all before it."""
    joint: list[float | None]
    """`reached / offered`; None if no step drafted this far."""
    conditional: list[float | None]
    """Joint over the joint of the draft before; None where that is 0."""


def pooled_mean(sums: RequestSums) -> float:
    """Give `sum (n + 1) / sum steps` over all requests."""
    return float(sums.weights @ sums.tokens / (sums.weights @ sums.steps))


def per_request_mean(sums: RequestSums) -> float:
    """Give the mean over requests of each request's mean acceptance length."""
    return float(sums.weights @ (sums.tokens / sums.steps) / sums.weights.sum())


def bootstrap_ratios(
    numerators: Floats, denominators: Floats, *, resamples: int, seed: int
) -> Floats:
    """Resample units with replacement and give the ratio of sums, per resample.

    Args:
        numerators: `[U, Q]`, Q quantities of U units; all quantities share the resamples.
        denominators: `[U, Q]`.
        resamples: Number of resamples.
        seed: Seed of the draw.

    Returns:
        `[resamples, Q]`.
    """
    generator = np.random.default_rng(seed)
    num_units = numerators.shape[0]
    even = np.full(num_units, 1 / num_units)
    ratios: list[Floats] = []
    for first in range(0, resamples, RESAMPLE_CHUNK):
        size = min(RESAMPLE_CHUNK, resamples - first)
        counts = generator.multinomial(num_units, even, size=size).astype(float)  # [size, U]
        ratios.append((counts @ numerators) / (counts @ denominators))
    return np.concatenate(ratios)


def percentile_interval(samples: Floats) -> Interval:
    """Give the 2.5 and 97.5 percentiles."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return Interval(low=float(low), high=float(high))


def acceptance_length(sums: RequestSums, *, resamples: int, seed: int) -> AcceptanceLength:
    """Give both means with their intervals.

    Raises:
        ValueError: No request has a verify step.
    """
    if sums.num_requests == 0:
        raise ValueError(
            "evaluate: no request has a verify step, every answer ended with its first token. "
            "Raise data.max_new_tokens or evaluate other prompts."
        )
    per_request = sums.weights * sums.tokens / sums.steps
    numerators = _by_conversation(sums, [sums.weights * sums.tokens, per_request])
    denominators = _by_conversation(sums, [sums.weights * sums.steps, sums.weights])
    ratios = bootstrap_ratios(numerators, denominators, resamples=resamples, seed=seed)
    return AcceptanceLength(
        pooled=pooled_mean(sums),
        interval=percentile_interval(ratios[:, 0]),
        per_request=per_request_mean(sums),
        per_request_interval=percentile_interval(ratios[:, 1]),
        num_requests=sums.num_requests,
        num_conversations=numerators.shape[0],
        num_steps=int(sums.steps.sum()),
    )


def paired_difference(
    first: RequestSums, second: RequestSums, *, resamples: int, seed: int
) -> Difference:
    """Give pooled(first) - pooled(second) of the same requests in the same order."""
    lengths = _paired_lengths(first, second, resamples=resamples, seed=seed)
    return Difference(
        value=pooled_mean(first) - pooled_mean(second),
        interval=percentile_interval(lengths[:, 0] - lengths[:, 1]),
        num_requests=first.num_requests,
    )


def relative_difference(
    first: RequestSums, second: RequestSums, *, resamples: int, seed: int
) -> Difference:
    """Give pooled(first) / pooled(second) - 1 of the same requests in the same order."""
    lengths = _paired_lengths(first, second, resamples=resamples, seed=seed)
    return Difference(
        value=pooled_mean(first) / pooled_mean(second) - 1,
        interval=percentile_interval(lengths[:, 0] / lengths[:, 1] - 1),
        num_requests=first.num_requests,
    )


def position_acceptance(traces: list[DecodeTrace], *, num_drafts: int) -> PositionAcceptance:
    """Give joint and conditional acceptance of drafts 1 .. num_drafts, counted by weight.

    Args:
        traces: Any way of drafting.
        num_drafts: Most tokens one step drafts: K - 1, or K in DSpark's shifted layout.
    """
    offered = np.zeros(num_drafts + 1, dtype=np.int64)
    reached = np.zeros(num_drafts + 1, dtype=np.int64)
    for trace in traces:
        for step in trace.steps:
            offered[: step.num_levels + 1] += trace.weight
            reached[: step.num_accepted + 1] += trace.weight
    # Index 0 is the anchor, kept in every step: J_0 = 1.
    joint = [
        int(kept) / int(seen) if seen else None for kept, seen in zip(reached, offered, strict=True)
    ]
    conditional = [
        here / before if here is not None and before else None for before, here in pairwise(joint)
    ]
    return PositionAcceptance(
        offered=offered[1:].tolist(),
        reached=reached[1:].tolist(),
        joint=joint[1:],
        conditional=conditional,
    )


def length_histogram(traces: list[DecodeTrace], *, num_drafts: int) -> list[int]:
    """Count steps by acceptance length 1 .. num_drafts + 1, by weight."""
    counts = [0] * (num_drafts + 1)
    for trace in traces:
        for step in trace.steps:
            counts[step.num_accepted] += trace.weight
    return counts


def draft_use(traces: list[DecodeTrace]) -> dict[str, float | int | None]:
    """Give how much of the work was of use, by weight: of drafts, and of the rows verify read.

    A tree counts each of its nodes. `efficiency` is `sum n / sum drafted`, `wasted_verify_rows` is
    `1 - sum (n + 1) / sum width`.
    """
    drafted = accepted = rows = steps = 0
    for trace in traces:
        drafted += trace.weight * sum(step.width - 1 for step in trace.steps)
        accepted += trace.weight * sum(step.num_accepted for step in trace.steps)
        rows += trace.weight * sum(step.width for step in trace.steps)
        steps += trace.weight * len(trace.steps)
    return {
        "drafted": drafted,
        "accepted": accepted,
        "efficiency": accepted / drafted if drafted else None,
        "wasted_verify_rows": 1 - (accepted + steps) / rows if rows else None,
    }


def by_group(traces: list[DecodeTrace]) -> dict[str, list[DecodeTrace]]:
    """Split traces by group, the largest group first, ties by name."""
    groups: dict[str, list[DecodeTrace]] = {}
    for trace in traces:
        groups.setdefault(trace.group, []).append(trace)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def _paired_lengths(
    first: RequestSums, second: RequestSums, *, resamples: int, seed: int
) -> Floats:
    """Give both pooled lengths on the same resamples of conversations, `[resamples, 2]`."""
    assert first.conversations == second.conversations
    numerators = _by_conversation(
        first, [first.weights * first.tokens, second.weights * second.tokens]
    )
    denominators = _by_conversation(
        first, [first.weights * first.steps, second.weights * second.steps]
    )
    return bootstrap_ratios(numerators, denominators, resamples=resamples, seed=seed)


def _by_conversation(sums: RequestSums, columns: list[Floats]) -> Floats:
    """Add up columns `[R]` within each conversation: `[U, len(columns)]`."""
    units = {name: row for row, name in enumerate(dict.fromkeys(sums.conversations))}
    rows = np.array([units[name] for name in sums.conversations])
    totals = np.zeros((len(units), len(columns)))
    np.add.at(totals, rows, np.stack(columns, axis=1))
    return totals
