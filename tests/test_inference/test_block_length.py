from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dflash_inference.block_length import DraftPolicy, FirstDrafts
from dflash_inference.cost_table import machine_costs, measured_widths
from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.drafting import Draft, no_draft
from dflash_inference.paying_drafts import PayingDrafts, num_that_pay
from dflash_inference.request import RequestState
from dflash_inference.running_acceptance import RunningAcceptance, expected_kept
from dflash_inference.sampling import SamplingParams
from dflash_inference.serving_costs import CostRow, CostTable, read_cost_table
from dflash_inference.step_costs import StepCosts
from dflash_inference.trace import StepTrace
from dflash_train.drafter.model import Drafter
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.target import Target
from dflash_train.testing import DECODED_VARIANTS, tiny_drafter, tiny_target

PROMPT = [1, 40, 41, 42, 90, 91, 40, 41]
NUM_DRAFTS = 7
Verify = Callable[[int], float]


def table_of(verify: Verify, *, draft_s: float = 0.3, batches: tuple[int, ...] = (1,)) -> CostTable:
    """Invent a table whose plain pass takes a second for each request of the batch, or less."""
    return CostTable(
        hardware="invented",
        rows=[
            CostRow(batch=b, width=w, verify_s=verify(w * b), draft_s=draft_s * (w > 1))
            for b in batches
            for w in measured_widths(NUM_DRAFTS)
        ],
    )


FLAT = table_of(lambda width: 1.0 + 0.02 * width)
STEEP = table_of(lambda width: 0.5 + 0.5 * width)


class Simulation:
    """A request whose drafts have a known fate, on a machine whose costs are a table's."""

    def __init__(self, policy: DraftPolicy, table: CostTable, *, seed: int = 0) -> None:
        self.policy, self.costs = policy, StepCosts(table)
        self.chance = np.random.default_rng(seed)
        params = SamplingParams(max_new_tokens=100_000)
        self.request = RequestState.of([1], params)
        self.request.token_ids.append(0)
        self.seconds = 0.0

    @property
    def num_tokens(self) -> int:
        return len(self.request.token_ids)

    @property
    def plain_seconds(self) -> float:
        return (self.num_tokens - 2) * self.costs.verify_s(1, batch=1)

    def run(
        self, num_tokens: int, rate: float, confidence: list[float] | None = None
    ) -> "Simulation":
        """Decode; each draft is kept with a probability once those before it are."""
        end = self.num_tokens + num_tokens
        while self.num_tokens < end:
            (draft,) = self.policy.plan([self.request])
            was_asked = draft is None
            if draft is None:
                made = Draft(ids=torch.zeros(NUM_DRAFTS, dtype=torch.int64))
                made.confidence = None if confidence is None else torch.tensor(confidence)
                draft = made.shortened(self.policy.num_verified(self.request, made))
            number = len(draft.ids)
            fate = np.append(self.chance.random(number) < rate, False)
            self.commit(draft, int(fate.argmin()))
            self.seconds += self.costs.verify_s(number + 1, batch=1)
            self.seconds += self.costs.draft_s(batch=1) if was_asked else 0.0
        return self

    def commit(self, draft: Draft, num_kept: int) -> None:
        step = StepTrace(
            start=self.request.start,
            width=len(draft.ids) + 1,
            num_accepted=num_kept,
            committed=num_kept + 1,
            source=draft.source,
        )
        self.request.steps.append(step)
        # Tokens never repeat, so nothing is found to copy.
        self.request.token_ids += range(self.num_tokens, self.num_tokens + step.committed)

    def sources(self, last: int) -> Counter[str]:
        return Counter(step.source for step in self.request.steps[-last:])


def test_running_rates_count_a_slot_only_where_it_was_reached_and_verified() -> None:
    acceptance = RunningAcceptance(3, kept_share=1.0, trust=1.0)
    acceptance.observe(0, num_verified=3)
    acceptance.observe(2, num_verified=3)
    acceptance.observe(1, num_verified=1)  # slot 2 was not offered
    assert acceptance.rates(np.array([0.5, 0.5, 0.5])).tolist() == pytest.approx(
        [(2 + 0.5) / 4, (1 + 0.5) / 2, 0.5 / 2]
    )
    assert expected_kept(np.array([0.5, 0.5])).tolist() == [0, 0.5, 0.75]


def test_running_rates_forget() -> None:
    acceptance = RunningAcceptance(1, kept_share=0.5, trust=0.1)
    for _ in range(50):
        acceptance.observe(0, num_verified=1)
    for _ in range(5):
        acceptance.observe(1, num_verified=1)
    assert acceptance.rates(np.array([0.0]))[0] > 0.9


@pytest.mark.parametrize("table", [FLAT, STEEP])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_a_drafter_that_does_not_pay_costs_a_few_percent_at_most(
    table: CostTable, rate: float
) -> None:
    policy = PayingDrafts(table, num_drafts=NUM_DRAFTS)
    simulation = Simulation(policy, table).run(2000, rate)
    assert simulation.seconds < 1.04 * simulation.plain_seconds


@pytest.mark.parametrize("rate", [0.6, 0.8, 0.95])
def test_a_drafter_that_pays_is_used_as_well_as_the_best_fixed_length(rate: float) -> None:
    for table in (FLAT, STEEP):
        fixed = [
            Simulation(FirstDrafts(number), table, seed=number).run(3000, rate).seconds
            for number in range(NUM_DRAFTS + 1)
        ]
        paying = Simulation(PayingDrafts(table, num_drafts=NUM_DRAFTS), table).run(3000, rate)
        assert paying.seconds < 1.06 * min(fixed)


def test_drafting_comes_back_soon_after_the_text_changes() -> None:
    simulation = Simulation(PayingDrafts(FLAT, num_drafts=NUM_DRAFTS), FLAT).run(600, 0.0)
    assert simulation.sources(40)["none"] >= 36
    simulation.run(200, 0.95)
    assert simulation.sources(10) == {"drafter": 10}


def test_a_step_of_the_cost_curve_is_not_crossed_for_little() -> None:
    """Up to four tokens wide verify is free, from there each costs a pass."""
    table = table_of(lambda width: 1.0 + max(0, width - 4))
    simulation = Simulation(PayingDrafts(table, num_drafts=NUM_DRAFTS), table).run(500, 0.7)
    widths = {step.width for step in simulation.request.steps[-30:]}
    assert widths == {4}


def test_a_full_machine_decodes_plainly_where_an_idle_one_speculates() -> None:
    """Above four tokens in a pass each costs: eight requests at once fill it."""
    table = table_of(lambda width: max(1.0, 0.25 * width), batches=(1, 8))

    def asked(batch: int) -> int:
        policy = PayingDrafts(table, num_drafts=NUM_DRAFTS, probe_share=0.0)
        params = SamplingParams(max_new_tokens=50)
        requests = [RequestState.of([1, 2], params) for _ in range(batch)]
        return sum(draft is None for draft in policy.plan(requests))

    assert (asked(1), asked(8)) == (1, 0)


@pytest.mark.parametrize(("num_good", "num_asking"), [(1, 0), (7, 7)])
def test_the_drafter_is_asked_when_those_who_gain_pay_its_price_together(
    num_good: int, num_asking: int
) -> None:
    """A draft takes as long for one request as for all: not worth it for a single one of eight."""
    table = table_of(lambda width: 1.0 + 0.01 * width, draft_s=1.0, batches=(1, 8))
    policy = PayingDrafts(table, num_drafts=NUM_DRAFTS, probe_share=0.0)
    requests = [RequestState.of([1, 2], SamplingParams(max_new_tokens=500)) for _ in range(8)]
    for index, request in enumerate(requests):
        kept = NUM_DRAFTS if index < num_good else 0
        step = StepTrace(start=2, width=NUM_DRAFTS + 1, num_accepted=kept, committed=kept + 1)
        request.steps += [step] * 40
    asked = [draft is None for draft in policy.plan(requests)]
    assert asked == [index < num_asking for index in range(8)]


def test_a_new_request_starts_with_what_others_have_shown() -> None:
    policy = PayingDrafts(FLAT, num_drafts=NUM_DRAFTS)
    Simulation(policy, FLAT).run(300, 0.0)
    other = Simulation(policy, FLAT).run(20, 0.0)
    assert other.sources(20)["drafter"] <= 1


def test_no_length_is_longer_than_what_the_budget_left() -> None:
    policy = PayingDrafts(FLAT, num_drafts=0, num_copied=5)
    request = RequestState.of([1, 2, 1, 2, 1, 2, 1, 2], SamplingParams(max_new_tokens=3))
    request.token_ids.append(1)
    (draft,) = policy.plan([request])
    assert draft is not None
    assert draft.ids.tolist() == [2, 1]


def test_whether_a_draft_is_verified_never_rests_on_what_knows_it() -> None:
    """Confidence of later slots is conditioned on draft i; changing it must not change i's fate."""
    chance = np.random.default_rng(1)
    lengths = set()
    for _ in range(300):
        rates, confidence = chance.random((2, 6))
        verify_s = 1 + chance.random(7).cumsum() * 0.4

        def decide(estimates: Any, rates: Any = rates, verify_s: Any = verify_s) -> int:
            return num_that_pay(rates, list(estimates), verify_s=verify_s, tokens_per_s=0.8)

        length = decide(confidence)
        lengths.add(length)
        for slot in range(6):  # estimates up to `slot` decide whether it is verified
            changed = confidence.copy()
            changed[slot + 1 :] = chance.random(5 - slot)
            assert (decide(changed) > slot) == (length > slot)
    assert lengths == set(range(7))


def test_without_confidence_the_length_is_the_one_with_the_highest_gain() -> None:
    chance = np.random.default_rng(2)
    for _ in range(200):
        rates, verify_s = chance.random(6), 1 + chance.random(7).cumsum() * 0.4
        gains = expected_kept(rates) - 1.3 * verify_s
        got = num_that_pay(rates, None, verify_s=verify_s, tokens_per_s=1.3)
        assert gains[got] == pytest.approx(gains.max())


@pytest.mark.parametrize("estimate", [0.01, 0.6, 0.999])
def test_a_confidence_head_that_is_wrong_is_corrected_by_what_came_true(estimate: float) -> None:
    confidence = [estimate] * NUM_DRAFTS
    policy = PayingDrafts(STEEP, num_drafts=NUM_DRAFTS)
    simulation = Simulation(policy, STEEP).run(3000, 0.9, confidence)
    fixed = [
        Simulation(FirstDrafts(number), STEEP).run(3000, 0.9).seconds
        for number in range(NUM_DRAFTS + 1)
    ]
    assert simulation.seconds < 1.06 * min(fixed)


class AnythingGoes:
    """An adversary: nothing, any copy or any part of the draft, without a reason."""

    def __init__(self, seed: int) -> None:
        self.chance = np.random.default_rng(seed)

    def plan(self, requests: list[RequestState]) -> list[Draft | None]:
        return [self.choose(request) for request in requests]

    def choose(self, request: RequestState) -> Draft | None:
        kind = self.chance.integers(4)
        if kind == 0:
            return no_draft()
        if kind == 1:
            number = request.num_drafts(int(self.chance.integers(1, 9)))
            ids = self.chance.choice(request.token_ids, number)
            return Draft(ids=torch.from_numpy(ids), source="lookup")
        return None

    def num_verified(self, request: RequestState, draft: Draft) -> int:
        return int(self.chance.integers(len(draft.ids) + 1))


@pytest.fixture(scope="module")
def target() -> Target:
    target = tiny_target(dtype=torch.float64)
    target.stop_token_ids = frozenset()
    return target


def every_policy() -> list[DraftPolicy]:
    adversaries: list[DraftPolicy] = [AnythingGoes(seed) for seed in range(3)]
    tables = (FLAT, STEEP, table_of(lambda width: 1.0, draft_s=0.0))
    return adversaries + [PayingDrafts(table, num_drafts=3, num_copied=4) for table in tables]


@pytest.mark.parametrize("kind", ["plain", "dflash2", "dspark"])
def test_greedy_tokens_equal_plain_decoding_whatever_the_policy(target: Target, kind: str) -> None:
    drafter = tiny_drafter(target, dtype=torch.float64, **DECODED_VARIANTS[kind])
    decoder = SpeculativeDecoder(target, drafter, policy=FirstDrafts(0))
    plain = decoder.generate(PROMPT, max_new_tokens=24)
    assert {(step.width, step.source) for step in plain.steps} == {(1, "none")}
    for policy in every_policy():
        decoder.policy = policy
        live = decoder.generate(PROMPT, max_new_tokens=24)
        assert live.output_ids == plain.output_ids


def test_argmax_proposals_leave_a_seeds_tokens_as_they_are(target: Target) -> None:
    """Token t is drawn with number t of the stream: the very tokens of plain decoding."""
    drafter = tiny_drafter(target, dtype=torch.float64)
    decoder = SpeculativeDecoder(target, drafter)
    num_accepted = 0
    for seed, policy in enumerate(every_policy()):
        params = SamplingParams(max_new_tokens=24, temperature=0.6, top_k=3, seed=seed)
        decoder.policy = FirstDrafts(0)
        plain = decoder.generate(PROMPT, params=params)
        decoder.policy = policy
        live = decoder.generate(PROMPT, params=params)
        assert live.output_ids == plain.output_ids
        num_accepted += sum(step.num_accepted for step in live.steps)
    assert num_accepted > 0


class LikelyTokens(Drafter):
    """Proposes a few ids, the first more often than the last, at every slot."""

    ids: list[int]

    def logits(self, hidden: Tensor, head: FrozenHead) -> Tensor:
        logits = torch.full((*hidden.shape[:-1], self.config.vocab_size), -40.0)
        logits[..., self.ids] = torch.linspace(2.5, 0, len(self.ids))
        return logits


class ByConfidence:
    """The rule of `PayingDrafts`, with a confidence that depends on all drafts before."""

    lengths: Counter[int]

    def __init__(self) -> None:
        self.lengths = Counter()

    def plan(self, requests: list[RequestState]) -> list[Draft | None]:
        return [None] * len(requests)

    def num_verified(self, request: RequestState, draft: Draft) -> int:
        before = [request.token_ids[-1], *draft.ids.tolist()]
        confidence = [0.9 if sum(before[: i + 1]) % 2 else 0.1 for i in range(len(draft.ids))]
        rates = np.full(len(draft.ids), 0.3)
        length = num_that_pay(
            rates,
            confidence,
            verify_s=np.linspace(1, 1 + 0.4 * len(rates), len(rates) + 1),
            tokens_per_s=1.0,
        )
        self.lengths[length] += 1
        return length


class ByTheDraftItself(ByConfidence):
    """A deliberately biased rule: a draft is verified if the draft is likely."""

    def num_verified(self, request: RequestState, draft: Draft) -> int:
        assert draft.proposal is not None
        chosen = draft.proposal.gather(-1, draft.ids[:, None])[:, 0]
        likely = chosen >= draft.proposal.max(-1).values * 0.7
        return int(likely.long().cumprod(0).sum())


@pytest.mark.parametrize(("rule", "is_lossless"), [(ByConfidence, True), (ByTheDraftItself, False)])
def test_drawn_proposals_keep_the_law_and_a_rule_that_sees_the_draft_is_caught(
    target: Target, rule: type[ByConfidence], is_lossless: bool
) -> None:
    """Three tokens together, against the target's own probabilities of each triple."""
    shape = {"temperature": 1.5, "top_k": 3}
    law = law_of_triples(target, [1, 77], shape)
    drafter = LikelyTokens(tiny_drafter(target).config).to(torch.float64).eval()
    seconds = {triple[1] for triple in law}
    mass = {each: sum(p for triple, p in law.items() if triple[1] == each) for each in seconds}
    drafter.ids = sorted(mass, key=lambda token: -mass[token])[:5]
    policy = rule()
    decoder = SpeculativeDecoder(target, drafter, samples_drafts=True, policy=policy)
    number = 1000
    requests = [
        decoder.new_request([1, 77], SamplingParams(max_new_tokens=5, seed=seed, **shape))
        for seed in range(number)
    ]
    for begin in range(0, number, 250):
        for _ in range(3):
            decoder.step(requests[begin : begin + 250])
    triples = Counter(tuple(request.output_ids[:3]) for request in requests)
    assert sum(request.steps[0].num_accepted > 0 for request in requests) > 50
    if rule is ByConfidence:
        assert min(policy.lengths[length] for length in (0, 1)) > 50
    p_value = p_value_of(triples, {triple: number * p for triple, p in law.items()})
    assert (p_value > 1e-3) == is_lossless


def p_value_of(counts: Counter[Any], expected: dict[Any, float]) -> float:
    """Compare counts with expectations; cells below 5 are merged."""
    assert set(counts) <= set(expected)
    large = [cell for cell in expected if expected[cell] >= 5]
    small = [cell for cell in expected if expected[cell] < 5]
    got, want = [counts[cell] for cell in large], [expected[cell] for cell in large]
    if small:
        got.append(sum(counts[cell] for cell in small))
        want.append(sum(expected[cell] for cell in small))
    return float(stats.chisquare(got, want).pvalue)


def law_of_triples(
    target: Target, prompt: list[int], shape: dict[str, Any]
) -> dict[tuple[int, ...], float]:
    processors = SamplingParams(max_new_tokens=1, **shape).processors()
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for tokens, probability in law.items():
            logits = target.forward(torch.tensor([[*prompt, *tokens]])).logits[0, -1:]
            p = processors(torch.empty(0, dtype=torch.int64), logits).softmax(-1)[0]  # pyright: ignore[reportArgumentType]
            for token in p.nonzero()[:, 0].tolist():
                longer[*tokens, token] = probability * float(p[token])
        law = longer
    return law


def test_confidence_comes_with_the_draft_and_does_not_know_it(target: Target) -> None:
    drafter = tiny_drafter(target, dtype=torch.float64, **DECODED_VARIANTS["dspark"])
    decoder = SpeculativeDecoder(target, drafter)
    request = decoder.new_request(PROMPT, SamplingParams(max_new_tokens=30))
    decoder.step([request])
    assert decoder.block_drafter is not None
    features, context = request.pending_features, list(request.drafter_cache.layers)
    hidden = decoder.block_drafter.block_hidden([request])[0]
    request.pending_parts, request.drafter_cache.layers = [features], context
    (draft,) = decoder.block_drafter.draft([request])
    before = torch.tensor([request.token_ids[-1], *draft.ids[:-1].tolist()])
    assert draft.confidence is not None
    assert torch.allclose(draft.confidence, drafter.confidence(hidden, before))
    shorter = draft.shortened(2).confidence
    assert shorter is not None
    assert len(shorter) == 2


def test_costs_are_read_between_and_beyond_the_measured_points() -> None:
    rows = [(1, 1, 1.0), (1, 2, 1.2), (1, 4, 2.0), (4, 1, 2.0), (4, 2, 3.0), (4, 4, 6.0)]
    costs = StepCosts(
        CostTable(
            hardware="invented",
            rows=[
                CostRow(batch=b, width=w, verify_s=seconds, draft_s=0.1 * b * (w > 1))
                for b, w, seconds in rows
            ],
        )
    )
    assert costs.verify_s(3, batch=1) == pytest.approx(1.6)
    assert costs.verify_s(6, batch=1) == pytest.approx(2.8)
    assert costs.verify_s(2, batch=2) == pytest.approx(1.2 + 1.8 / 3)
    assert costs.verify_s(1, batch=8) == pytest.approx(4.0)
    assert costs.draft_s(batch=2) == pytest.approx(0.2)


def test_a_machine_is_measured_once_and_again_on_request(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DFLASH_HOME", str(tmp_path))
    decoder = SpeculativeDecoder(target, tiny_drafter(target, dtype=torch.float64))

    def costs(**options: Any) -> CostTable:
        options = {"context_length": 16, "batches": (1, 2)} | options
        return machine_costs(decoder, **options)

    table = costs()
    (path,) = (tmp_path / "cost-tables").iterdir()
    assert read_cost_table(path) == table
    assert [(row.batch, row.width) for row in table.rows] == [
        (b, w) for b in (1, 2) for w in (1, 2, 4)
    ]
    assert all(row.verify_s > 0 and (row.draft_s > 0) == (row.width > 1) for row in table.rows)
    marked = path.read_text().replace(table.hardware, "marked")
    path.write_text(marked)
    assert costs().hardware == "marked"
    assert costs(force=True).hardware == table.hardware
    costs(context_length=12)
    assert len(list(path.parent.iterdir())) == 2


def test_widths_are_powers_of_two_and_the_widest() -> None:
    assert measured_widths(7) == [1, 2, 4, 8]
    assert measured_widths(15) == [1, 2, 4, 8, 16]
    assert measured_widths(6) == [1, 2, 4, 7]
