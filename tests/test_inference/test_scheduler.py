from collections.abc import Callable
from typing import Any

import pytest
import torch

from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.request import RequestState
from dflash_inference.sampling import SamplingParams
from dflash_inference.scheduler import Scheduler, Ticket
from dflash_train.features.target import Target
from dflash_train.testing import tiny_drafter, tiny_target

PROMPTS = [[1, 40, 41, 42, 90, 91], [1, 77], [1, 60, 61, 62, 63, 64], [5, 5, 5], [9, 8]]


class FailingError(Exception):
    pass


@pytest.fixture(scope="module")
def target() -> Target:
    target = tiny_target(dtype=torch.float64)
    target.stop_token_ids = frozenset()
    return target


def decoder_of(
    target: Target, observe: Callable[[RequestState], None] = RequestState.check_invariants
) -> SpeculativeDecoder:
    return SpeculativeDecoder(target, tiny_drafter(target, dtype=torch.float64), observe=observe)


def scheduler_of(target: Target, **limits: int) -> Scheduler:
    return Scheduler(decoder_of(target), **({"token_budget": 1000, "most_requests": 8} | limits))


def params(number: int) -> SamplingParams:
    """Greedy and sampled in turns, all of other lengths."""
    shape: dict[str, Any] = {"temperature": 1.1, "top_k": 30, "seed": number} if number % 2 else {}
    return SamplingParams(max_new_tokens=6 + 3 * number, **shape)


def run_out(scheduler: Scheduler) -> None:
    for _ in range(500):
        if scheduler.is_idle:
            return
        scheduler.step()
    pytest.fail("the scheduler does not come to an end")


def test_every_request_writes_what_it_writes_alone(target: Target) -> None:
    scheduler = scheduler_of(target, most_requests=3)
    tickets = [scheduler.submit(ids, params(n)) for n, ids in enumerate(PROMPTS)]
    run_out(scheduler)
    for number, (ids, ticket) in enumerate(zip(PROMPTS, tickets, strict=True)):
        alone = decoder_of(target).generate(ids, params=params(number))
        assert ticket.state.output_ids == alone.output_ids
        assert ticket.state.finish_reason == alone.finish_reason
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.tokens_held) == (0, 0, 0)


def test_counts_are_those_of_the_steps(target: Target) -> None:
    scheduler = scheduler_of(target)
    tickets = [scheduler.submit(ids, params(n)) for n, ids in enumerate(PROMPTS)]
    run_out(scheduler)
    steps = [step for ticket in tickets for step in ticket.state.steps if step.width > 1]
    counts = scheduler.counts
    assert counts.output_tokens == sum(len(ticket.state.output_ids) for ticket in tickets)
    assert counts.prompt_tokens == sum(map(len, PROMPTS))
    assert counts.drafts == len(steps) > 0
    assert counts.draft_tokens == sum(step.width - 1 for step in steps)
    assert counts.accepted_tokens == sum(step.num_accepted for step in steps)
    assert counts.accepted_at.total() == counts.accepted_tokens
    assert counts.finished == {"length": len(PROMPTS)}


def test_the_budget_admits_in_order_of_arrival_and_nobody_overtakes(target: Target) -> None:
    scheduler = scheduler_of(target, token_budget=30)
    big = SamplingParams(max_new_tokens=18)
    first = scheduler.submit([1, 2], big)
    second = scheduler.submit([1, 3], big)
    small = scheduler.submit([1, 4], SamplingParams(max_new_tokens=2))
    assert scheduler.step() == [first]
    assert (scheduler.tokens_held, scheduler.num_waiting) == (20, 2)
    while not first.is_finished:
        assert first in scheduler.step()
        assert not second.state.output_ids
        assert not small.state.output_ids  # it would fit, but it came later
    assert scheduler.step() == [second, small]
    run_out(scheduler)
    assert len(small.state.output_ids) == 2


def test_no_more_than_the_limit_run_at_once(target: Target) -> None:
    scheduler = scheduler_of(target, most_requests=2)
    for number, ids in enumerate(PROMPTS):
        scheduler.submit(ids, params(number))
    widths = []
    while not scheduler.is_idle:
        widths.append(len(scheduler.step()))
    assert max(widths) == 2


def test_a_request_larger_than_the_whole_budget_is_refused(target: Target) -> None:
    scheduler = scheduler_of(target, token_budget=30)
    with pytest.raises(ValueError, match=r"max_tokens \(=29\).*31.*budget \(=30\)"):
        scheduler.submit([1, 2], SamplingParams(max_new_tokens=29))
    assert scheduler.is_idle
    scheduler.submit([1, 2], SamplingParams(max_new_tokens=28))


@pytest.mark.parametrize("limits", [{"token_budget": 0}, {"most_requests": 0}])
def test_limits_below_one_are_refused(target: Target, limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        scheduler_of(target, **limits)


def test_cancelling_frees_the_slot_at_once_and_leaves_the_others_alone(target: Target) -> None:
    scheduler = scheduler_of(target, most_requests=2)
    gone, stays, waits, never = (scheduler.submit(PROMPTS[n], params(n)) for n in range(4))
    scheduler.step()
    held = scheduler.tokens_held
    scheduler.cancel(gone)
    scheduler.cancel(never)
    assert (gone.state.finish_reason, never.state.finish_reason) == ("cancelled", "cancelled")
    assert scheduler.tokens_held == held - gone.num_rows
    assert gone.state.target_cache.layers == gone.state.drafter_cache.layers == []
    assert set(scheduler.step()) == {stays, waits}
    run_out(scheduler)
    for number, ticket in ((1, stays), (2, waits)):
        alone = decoder_of(target).generate(PROMPTS[number], params=params(number))
        assert ticket.state.output_ids == alone.output_ids
    assert len(gone.state.output_ids) == 1
    assert never.state.output_ids == []
    scheduler.cancel(stays)
    assert stays.state.finish_reason == "length"
    assert scheduler.counts.finished == {"length": 2, "cancelled": 2}


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_request_that_raises_fails_alone(target: Target, fails_at: int) -> None:
    """Its steps fail after some requests of the batch have been changed, and others have not."""
    bad: list[Ticket] = []

    def observe(state: RequestState) -> None:
        state.check_invariants()
        if bad and state is bad[0].state and len(state.steps) == fails_at:
            raise FailingError

    scheduler = Scheduler(decoder_of(target, observe), token_budget=1000, most_requests=8)
    tickets = [scheduler.submit(ids, params(n)) for n, ids in enumerate(PROMPTS)]
    bad.append(tickets[2])
    run_out(scheduler)
    assert bad[0].state.finish_reason == "error"
    assert isinstance(bad[0].error, FailingError)
    assert len(bad[0].state.steps) == max(0, fails_at - 1)
    for number in (0, 1, 3, 4):
        alone = decoder_of(target).generate(PROMPTS[number], params=params(number))
        assert tickets[number].state.output_ids == alone.output_ids
        assert [s.num_accepted for s in tickets[number].state.steps] == [
            s.num_accepted for s in alone.steps
        ]
    assert scheduler.tokens_held == 0
    counted = sum(len(ticket.state.output_ids) for ticket in tickets)
    assert scheduler.counts.output_tokens == counted


def test_a_pass_that_fails_once_costs_nobody_a_token(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = scheduler_of(target)
    tickets = [scheduler.submit(ids, params(n)) for n, ids in enumerate(PROMPTS)]
    scheduler.step()
    scheduler.step()
    real_run, failures = scheduler.decoder.target_pass.run, [MemoryError()]

    def run(spans: list[Any]) -> list[Any]:  # fails after the drafter has eaten the features
        if failures:
            raise failures.pop()
        return real_run(spans)

    monkeypatch.setattr(scheduler.decoder.target_pass, "run", run)
    run_out(scheduler)
    assert not failures
    for number, (ids, ticket) in enumerate(zip(PROMPTS, tickets, strict=True)):
        alone = decoder_of(target).generate(ids, params=params(number))
        assert ticket.state.output_ids == alone.output_ids
