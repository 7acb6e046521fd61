import numpy as np
import pytest

from dflash_inference.statistics import (
    Difference,
    Interval,
    RequestSums,
    acceptance_length,
    bootstrap_ratios,
    by_group,
    length_histogram,
    paired_difference,
    pooled_mean,
    position_acceptance,
)
from dflash_inference.trace import DecodeTrace, StepTrace


def trace_of(
    num_accepted: list[int],
    *,
    name: str = "r",
    width: int = 4,
    weight: int = 1,
    group: str = "g",
    conversation: str = "",
) -> DecodeTrace:
    steps = [
        StepTrace(start=10 + i, width=width, num_accepted=n, committed=n + 1)
        for i, n in enumerate(num_accepted)
    ]
    return DecodeTrace(
        id=name,
        group=group,
        conversation=conversation or name,
        weight=weight,
        prompt_length=10,
        block_size=4,
        output_ids=[1] * (1 + sum(step.committed for step in steps)),
        steps=steps,
        finish_reason="length",
    )


def random_traces(num_requests: int, seed: int, *, rate: float = 0.5) -> list[DecodeTrace]:
    generator = np.random.default_rng(seed)
    traces = []
    for i in range(num_requests):
        own_rate = np.clip(rate + generator.normal(0, 0.15), 0.05, 0.95)
        kept = generator.geometric(1 - own_rate, generator.integers(3, 20)) - 1
        traces.append(trace_of(np.minimum(kept, 3).tolist(), name=f"r{i}"))
    return traces


def test_means_follow_their_definitions() -> None:
    traces = [trace_of([3, 3], name="a"), trace_of([0, 0, 0, 1], name="b")]
    result = acceptance_length(RequestSums.of(traces), resamples=50, seed=0)
    assert result.pooled == pytest.approx((8 + 5) / 6)
    assert result.per_request == pytest.approx((4 + 5 / 4) / 2)
    assert (result.num_requests, result.num_steps) == (2, 6)


def test_weight_equals_repetition() -> None:
    weighted = [trace_of([2], name="a", weight=3), trace_of([0, 1], name="b")]
    repeated = [trace_of([2], name=f"a{i}") for i in range(3)] + [trace_of([0, 1], name="b")]
    first, second = (
        acceptance_length(RequestSums.of(traces), resamples=10, seed=0)
        for traces in (weighted, repeated)
    )
    assert first.pooled == pytest.approx(second.pooled)
    assert first.per_request == pytest.approx(second.per_request)
    assert position_acceptance(weighted, num_drafts=3) == position_acceptance(
        repeated, num_drafts=3
    )
    assert length_histogram(weighted, num_drafts=3) == length_histogram(repeated, num_drafts=3)


def test_requests_without_a_step_are_left_out() -> None:
    sums = RequestSums.of([trace_of([]), trace_of([1], name="b")])
    assert sums.num_requests == 1
    with pytest.raises(ValueError, match="no request has a verify step"):
        acceptance_length(RequestSums.of([trace_of([])]), resamples=10, seed=0)


def test_bootstrap_equals_a_plain_loop_over_resampled_indices() -> None:
    generator = np.random.default_rng(3)
    tokens, steps = generator.integers(5, 40, (2, 30)).astype(float)
    ratios = bootstrap_ratios(tokens[:, None], steps[:, None], resamples=4000, seed=1)[:, 0]
    plain = []
    for _ in range(4000):
        chosen = generator.integers(0, 30, 30)
        plain.append(tokens[chosen].sum() / steps[chosen].sum())
    for percentile in (2.5, 50, 97.5):
        got, want = np.percentile(ratios, percentile), np.percentile(plain, percentile)
        # Both are estimates from 4000 draws: their error is about 1/25 of a standard deviation.
        assert got == pytest.approx(want, abs=0.15 * float(np.std(plain)))


def test_bootstrap_is_reproducible_and_independent_of_other_quantities() -> None:
    generator = np.random.default_rng(0)
    numerators, denominators = generator.random((20, 3)), generator.random((20, 3)) + 1
    all_three = bootstrap_ratios(numerators, denominators, resamples=1200, seed=5)
    alone = bootstrap_ratios(numerators[:, 1:2], denominators[:, 1:2], resamples=1200, seed=5)
    np.testing.assert_allclose(all_three[:, 1:2], alone, rtol=1e-12)
    assert all_three.shape == (1200, 3)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth = pooled_mean(RequestSums.of(random_traces(20_000, seed=99)))
    covered = 0
    for seed in range(150):
        sums = RequestSums.of(random_traces(60, seed=seed))
        interval = acceptance_length(sums, resamples=400, seed=seed).interval
        covered += interval.low <= truth <= interval.high
    assert 0.88 <= covered / 150 <= 0.99


def test_turns_of_one_conversation_widen_the_interval() -> None:
    apart = random_traces(60, seed=4)
    tied = [
        trace_of([s.num_accepted for s in t.steps], name=f"{t.id}-{copy}", conversation=t.id)
        for t in apart
        for copy in range(4)
    ]
    loose = [trace_of([s.num_accepted for s in t.steps], name=t.id) for t in tied]
    as_conversations = acceptance_length(RequestSums.of(tied), resamples=2000, seed=0)
    as_requests = acceptance_length(RequestSums.of(loose), resamples=2000, seed=0)
    assert as_conversations.num_conversations == 60
    assert as_requests.num_conversations == 240

    def size(interval: Interval) -> float:
        return interval.high - interval.low

    ratio = size(as_conversations.interval) / size(as_requests.interval)
    assert ratio == pytest.approx(2.0, rel=0.15)


def test_paired_difference_sees_what_two_intervals_would_hide() -> None:
    first = random_traces(80, seed=1)
    second = [trace_of([*(s.num_accepted for s in t.steps), 0], name=t.id) for t in first]
    difference = paired_difference(
        RequestSums.of(first), RequestSums.of(second), resamples=2000, seed=0
    )
    assert difference.value > 0
    assert difference.verdict == "better"
    swapped = paired_difference(
        RequestSums.of(second), RequestSums.of(first), resamples=2000, seed=0
    )
    assert swapped.verdict == "worse"
    assert swapped.interval.low == pytest.approx(-difference.interval.high)


@pytest.mark.parametrize(
    ("low", "high", "num_requests", "verdict"),
    [
        (0.1, 0.2, 50, "better"),
        (-0.2, -0.1, 50, "worse"),
        (-0.1, 0.1, 500, "undecided"),
        (0.1, 0.2, 49, "undecided"),
    ],
)
def test_verdict_needs_an_interval_off_zero_and_fifty_requests(
    low: float, high: float, num_requests: int, verdict: str
) -> None:
    interval = Interval(low=low, high=high)
    difference = Difference(value=0.0, interval=interval, num_requests=num_requests)
    assert difference.verdict == verdict


def test_positions_equal_a_plain_count() -> None:
    generator = np.random.default_rng(2)
    traces = []
    for i in range(40):
        width = int(generator.integers(1, 5))
        traces.append(trace_of(generator.integers(0, width, 9).tolist(), name=f"{i}", width=width))
    steps = [step for trace in traces for step in trace.steps]
    got = position_acceptance(traces, num_drafts=3)
    before = 1.0
    for slot in (1, 2, 3):
        offered = sum(step.width > slot for step in steps)
        reached = sum(step.num_accepted >= slot for step in steps)
        assert got.offered[slot - 1] == offered
        assert got.reached[slot - 1] == reached
        joint = reached / offered
        assert got.joint[slot - 1] == pytest.approx(joint)
        assert got.conditional[slot - 1] == pytest.approx(joint / before)
        before = joint


def test_joint_acceptance_adds_up_to_the_mean_when_every_slot_is_offered() -> None:
    traces = random_traces(30, seed=7)
    joint = position_acceptance(traces, num_drafts=3).joint
    assert 1 + sum(j for j in joint if j is not None) == pytest.approx(
        pooled_mean(RequestSums.of(traces))
    )


def test_a_position_that_was_never_reached_has_no_conditional_acceptance() -> None:
    positions = position_acceptance([trace_of([0, 0])], num_drafts=3)
    assert positions.joint == [0.0, 0.0, 0.0]
    assert positions.conditional == [0.0, None, None]
    narrow = position_acceptance([trace_of([0], width=1)], num_drafts=3)
    assert narrow.joint == [None, None, None]


def test_groups_come_largest_first() -> None:
    traces = [trace_of([1], group=g) for g in ("b", "a", "c", "c", "a")]
    assert [(name, len(held)) for name, held in by_group(traces).items()] == [
        ("a", 2),
        ("c", 2),
        ("b", 1),
    ]
