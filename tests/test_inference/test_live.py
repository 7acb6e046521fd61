"""Live decoding of every kind of drafter against replay and against plain decoding.

Drafters are fitted to a tiny target's answers first: near an acceptance length of 1 the comparison
would prove nothing.
"""

import pytest
import torch

from dflash_inference.autoregressive import AutoregressiveDecoder
from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.evaluate import lookup_row, replay_row
from dflash_inference.live import replay_live
from dflash_inference.statistics import length_histogram, position_acceptance
from dflash_inference.trace import DecodeTrace, first_difference
from dflash_train.config import DrafterSettings
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.model import Drafter
from dflash_train.features.store import FeatureRow
from dflash_train.features.target import Target
from dflash_train.testing import DECODED_VARIANTS, MASK_TOKEN_ID, tiny_target

NUM_ROWS, BUDGET, K = 8, 26, 4


def invent_prompt(number: int) -> list[int]:
    generator = torch.Generator().manual_seed(number)
    return [1, *torch.randint(4, 260, (6 + number % 5,), generator=generator).tolist()]


@pytest.fixture(scope="module")
def target() -> Target:
    """A target some of whose answers stop: one at its first token, others inside a block."""
    target = tiny_target(dtype=torch.float64)
    answers = target.generate_batch(
        [invent_prompt(number) for number in range(NUM_ROWS)], max_new_tokens=BUDGET
    )
    target.stop_token_ids = frozenset({answers[0].output_ids[13], answers[1].output_ids[0]})
    return target


@pytest.fixture(scope="module")
def rows(target: Target, answer_prompts) -> list[FeatureRow]:
    prompts = [invent_prompt(number) for number in range(NUM_ROWS)]
    return answer_prompts(target, prompts, budget=BUDGET)


@pytest.fixture(scope="module", params=list(DECODED_VARIANTS))
def drafter(
    request: pytest.FixtureRequest, target: Target, rows: list[FeatureRow], fit_drafter
) -> Drafter:
    settings = DrafterSettings(
        block_size=K,
        num_hidden_layers=2,
        target_layer_ids=target.target_layer_ids,
        mask_token_id=MASK_TOKEN_ID,
        **DECODED_VARIANTS[request.param],
    )
    torch.manual_seed(0)
    drafter = Drafter(DrafterConfig.for_target(settings, target.model.config)).double()
    size = drafter.config.draft_vocab_size
    if size is not None:
        answered = torch.cat([row.input_ids[row.prompt_length :] for row in rows])
        counts = torch.bincount(answered, minlength=drafter.config.vocab_size)
        assert (counts > 0).sum() > size, "some tokens must be out of reach"
        drafter.set_draft_vocabulary(counts.argsort(descending=True)[:size].sort().values)
    return fit_drafter(target, drafter, rows, num_steps=40)


def decode(target: Target, drafter: Drafter, row: FeatureRow, *, budget: int) -> DecodeTrace:
    prompt = row.input_ids[: row.prompt_length].tolist()
    return SpeculativeDecoder(target, drafter).generate(prompt, max_new_tokens=budget)


def test_live_decoding_equals_replay_step_by_step(
    target: Target, drafter: Drafter, rows: list[FeatureRow]
) -> None:
    traces = []
    for row in rows:
        live = decode(target, drafter, row, budget=BUDGET)
        assert first_difference(live, replay_row(drafter, target.head, row, split="test")) is None
        traces.append(live)
    steps = [step for trace in traces for step in trace.steps]
    num_accepted = sum(step.num_accepted for step in steps)
    assert 1 + num_accepted / len(steps) >= 1.5
    assert num_accepted >= 56  # of each of nine kinds of drafter, above 500 together
    assert {trace.finish_reason for trace in traces} == {"stop", "length"}
    assert any(len(trace.output_ids) == 1 for trace in traces)
    ceiling = drafter.config.num_drafts + 1
    assert max(step.acceptance_length for step in steps) == ceiling
    assert {step.width for step in steps} >= {ceiling, 2}, "full blocks and the narrowest"


def test_live_decoding_equals_replay_and_plain_decoding_at_every_budget(
    target: Target, drafter: Drafter, rows: list[FeatureRow]
) -> None:
    for row in rows[:4]:
        prompt = row.input_ids[: row.prompt_length].tolist()
        plain = AutoregressiveDecoder(target).generate(prompt, max_new_tokens=12)
        for budget in (1, 2, 3, 4, 5, 6, 7, 12):
            live = decode(target, drafter, row, budget=budget)
            assert live.output_ids == plain.output_ids[:budget]
            again = replay_live(target, drafter, prompt, live, budget=budget)
            assert first_difference(live, again) is None


def test_figures_reach_as_far_as_the_drafter_drafts(
    target: Target, drafter: Drafter, rows: list[FeatureRow]
) -> None:
    num_drafts = drafter.config.num_drafts
    traces = [replay_row(drafter, target.head, row, split="test") for row in rows]
    num_steps = sum(len(trace.steps) for trace in traces)
    num_accepted = sum(step.num_accepted for trace in traces for step in trace.steps)
    positions = position_acceptance(traces, num_drafts=num_drafts)
    assert positions.offered[0] == num_steps
    assert sum(positions.reached) == num_accepted
    assert positions.reached[-1] > 0
    assert sum(length_histogram(traces, num_drafts=num_drafts)) == num_steps
    lookup = [lookup_row(row, split="test", block_size=num_drafts + 1) for row in rows]
    assert max(step.width for trace in lookup for step in trace.steps) == num_drafts + 1
