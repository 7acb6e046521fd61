import numpy as np
import pytest
import torch

from dflash_inference.block_length import FirstDrafts
from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.drafting import Draft, no_draft
from dflash_inference.lookup_drafts import LookupDrafts, lookup_decoder
from dflash_inference.paying_drafts import PayingDrafts, match_class
from dflash_inference.prompt_lookup import find_copy, prompt_lookup
from dflash_inference.request import RequestState
from dflash_inference.sampling import SamplingParams
from dflash_inference.serving_costs import CostRow, CostTable
from dflash_inference.trace import StepTrace
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target
from dflash_train.testing import DECODED_VARIANTS, assert_close, tiny_drafter, tiny_target

PROMPT = [1, 40, 41, 42, 90, 91, 40, 41]
BUDGET = 60

FLAT = CostTable(
    hardware="invented",
    rows=[
        CostRow(batch=1, width=w, verify_s=1 + 0.02 * w, draft_s=0.3 * (w > 1))
        for w in (1, 2, 4, 8)
    ],
)
"""Width costs little; drafting costs a third of a pass, copying nothing."""


def free_target(family: str = "llama") -> Target:
    target = tiny_target(dtype=torch.float64, family=family)
    target.stop_token_ids = frozenset()
    return target


@pytest.fixture(scope="module")
def target() -> Target:
    return free_target()


def plain_tokens(target: Target, params: SamplingParams) -> list[int]:
    decoder = SpeculativeDecoder(target, None, policy=FirstDrafts(0))
    return decoder.generate(PROMPT, params=params).output_ids


def repetitive(seed: int) -> SamplingParams:
    """Give a law so narrow that the text repeats itself."""
    return SamplingParams(max_new_tokens=BUDGET, temperature=0.9, top_k=2, seed=seed)


def story(steps: list[StepTrace]) -> list[tuple[int, int, int, int]]:
    return [(step.start, step.width, step.num_accepted, step.committed) for step in steps]


def test_a_copy_says_how_much_of_the_text_matched() -> None:
    text = np.array([5, 6, 7, 8, 9, 6, 7, 8])
    copy = find_copy(text, 3)
    assert (copy.tokens.tolist(), copy.match_length) == ([9, 6, 7], 3)
    assert find_copy(text[:4], 3).match_length == 0
    assert [match_class(length) for length in (1, 2, 3, 4, 5, 8, 9, 500)] == [
        0, 1, 2, 2, 3, 3, 4, 4,
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("num_drafts", [1, 3, 7])
def test_copying_live_takes_the_steps_that_the_statistic_counts(
    family: str, num_drafts: int
) -> None:
    target = free_target(family)
    params = SamplingParams(max_new_tokens=BUDGET)
    live = lookup_decoder(target, num_drafts=num_drafts).generate(PROMPT, params=params)
    assert live.output_ids == plain_tokens(target, params)
    counted = prompt_lookup(
        PROMPT, live.output_ids, block_size=num_drafts + 1, max_length=len(PROMPT) + BUDGET
    )
    # Verify may look past the budget's end only in the last step, which both clip.
    assert story(live.steps)[:-1] == story(counted)[:-1]
    assert live.steps[-1].committed == counted[-1].committed
    assert live.block_size == num_drafts + 1
    assert {step.source for step in live.steps} <= {"lookup", "none"}
    assert all((step.source == "none") == (step.width == 1) for step in live.steps)
    # The greedy text of the tiny gemma3 repeats itself, that of the tiny llama does not.
    assert sum(step.num_accepted for step in live.steps) > 5 or family == "llama"


def test_copies_leave_the_tokens_of_a_seed_as_they_are(target: Target) -> None:
    decoder = lookup_decoder(target, num_drafts=5)
    num_accepted = num_rejecting = 0
    for seed in range(4):
        live = decoder.generate(PROMPT, params=repetitive(seed))
        assert live.output_ids == plain_tokens(target, repetitive(seed))
        num_accepted += sum(step.num_accepted for step in live.steps)
        num_rejecting += sum(step.num_accepted < step.width - 1 for step in live.steps)
    assert num_accepted > 5
    assert num_rejecting > 5


def test_nothing_to_copy_is_refused(target: Target) -> None:
    with pytest.raises(ValueError, match="num_drafts"):
        lookup_decoder(target, num_drafts=0)


def test_copies_replace_a_drafter_that_promises_less() -> None:
    """A random drafter is never right; the target's greedy text repeats itself."""
    target = free_target("gemma3")
    drafter = tiny_drafter(target, dtype=torch.float64, **DECODED_VARIANTS["dspark"])
    policy = PayingDrafts(FLAT, num_drafts=3, num_copied=5)
    decoder = SpeculativeDecoder(target, drafter, policy=policy)
    decoder.generate(PROMPT, max_new_tokens=BUDGET)
    live = decoder.generate(PROMPT, max_new_tokens=BUDGET)
    assert live.output_ids == plain_tokens(target, SamplingParams(max_new_tokens=BUDGET))
    sources = [step.source for step in live.steps]
    assert sources.count("lookup") > 5 * sources.count("drafter")
    assert sum(step.num_accepted for step in live.steps if step.source == "lookup") > 10


def test_a_drafter_that_promises_more_is_not_replaced() -> None:
    """Copies are wrong each time, drafts always right: learnt within a few steps."""
    policy = PayingDrafts(FLAT, num_drafts=3, num_copied=5)
    request = RequestState.of([1, 2, 3], SamplingParams(max_new_tokens=10_000))
    request.token_ids.append(1)  # token 1 came before, what followed it then does not come again
    asked = []
    for turn in range(40):
        (draft,) = policy.plan([request])
        asked.append(draft is None)
        made = draft or Draft(ids=torch.zeros(3, dtype=torch.int64))
        if draft is None:
            made = made.shortened(policy.num_verified(request, made))
        kept = len(made.ids) if draft is None else 0
        fresh = [100 + 10 * turn + place for place in range(kept)]
        request.steps.append(
            StepTrace(
                start=request.start,
                width=len(made.ids) + 1,
                num_accepted=kept,
                committed=kept + 1,
                source=made.source,
            )
        )
        request.token_ids += [*fresh, 1]
    assert all(asked[10:])


class Turns:
    """Copy, nothing, and the drafter, in turns of several steps."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.copies = LookupDrafts(4)

    def plan(self, requests: list[RequestState]) -> list[Draft | None]:
        self.num_steps += 1
        kind = self.num_steps // 2 % 3
        if kind == 0:
            return self.copies.plan(requests)
        return [no_draft() if kind == 1 else None for _ in requests]

    def num_verified(self, request: RequestState, draft: Draft) -> int:
        return len(draft.ids)


def test_the_drafter_misses_no_token_that_was_committed_without_it(target: Target) -> None:
    drafter = tiny_drafter(target, dtype=torch.float64)
    pending_seen = set()

    def compare_with_a_fresh_pass(state: RequestState) -> None:
        state.check_invariants()
        fresh = target.forward(torch.tensor([state.token_ids[: state.start]])).features[0]
        pending = state.pending_features
        pending_seen.add(len(pending))
        assert_close("features", pending, fresh[-len(pending) :], 1e-10)
        if state.drafter_cache.length:
            refilled = drafter.new_cache()
            one_slot = torch.zeros(1, drafter.config.hidden_size, dtype=torch.float64)
            Drafter.draft_step(drafter, one_slot, fresh[: -len(pending)], refilled)
            for held, wanted in zip(state.drafter_cache.layers, refilled.layers, strict=True):
                assert_close("context keys", held.k, wanted.k, 1e-10)

    decoder = SpeculativeDecoder(target, drafter, policy=Turns(), observe=compare_with_a_fresh_pass)
    live = decoder.generate(PROMPT, max_new_tokens=40)
    assert live.output_ids == plain_tokens(target, SamplingParams(max_new_tokens=40))
    assert {step.source for step in live.steps} == {"drafter", "lookup", "none"}
    assert max(pending_seen - {len(PROMPT)}) >= 4


def test_requests_that_copy_and_requests_that_draft_share_a_step(target: Target) -> None:
    class ByRequest(Turns):
        def plan(self, requests: list[RequestState]) -> list[Draft | None]:
            copies = self.copies.plan(requests)
            kinds = [request.prompt_length % 3 for request in requests]
            choices = zip(kinds, copies, strict=True)
            return [[copy, None, no_draft()][kind] for kind, copy in choices]

    decoder = SpeculativeDecoder(
        target, tiny_drafter(target, dtype=torch.float64), policy=ByRequest()
    )
    params = SamplingParams(max_new_tokens=20)
    prompts = [PROMPT[:length] for length in (3, 4, 5, 6, 7)]
    alone = [decoder.generate(prompt, params=params).output_ids for prompt in prompts]
    together = [decoder.new_request(prompt, params) for prompt in prompts]
    while any(request.finish_reason is None for request in together):
        decoder.step(together)
    assert [request.output_ids for request in together] == alone
    assert [request.steps[0].source for request in together][:2] != ["none", "none"]
