"""Replay of every kind of drafter against the loop and the choice of tokens written out plainly."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dflash_train.config import DrafterSettings
from dflash_train.drafter.attention import Blocks, ContextKV
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.store import FeatureRow
from dflash_train.features.target import Target
from dflash_train.testing import DECODED_VARIANTS, MASK_TOKEN_ID, SLIDING
from dflash_train.training import replay as replay_module
from dflash_train.training.replay import ReplayTrace, replay, replay_many, replay_rows

K = 4
VARIANTS = DECODED_VARIANTS | {
    "all sliding, bidirectional, narrower than a block": {
        "layer_types": [SLIDING, SLIDING], "sliding_window": 3, "is_causal": False,
    },
    "reduced vocabulary": {"draft_vocab_size": 70},
    "dspark, reduced vocabulary": {"markov_rank": 4, "draft_vocab_size": 70},
}  # fmt: skip
STARTS_AS_NO_CHANGE = ("candidate_selector", "markov_head", "_conv.")


def build(target: Target, fields: dict[str, Any]) -> Drafter:
    """Build a random drafter all parts of which matter."""
    settings = DrafterSettings(
        block_size=K,
        num_hidden_layers=2,
        target_layer_ids=target.target_layer_ids,
        mask_token_id=MASK_TOKEN_ID,
        **fields,
    )
    torch.manual_seed(0)
    drafter = Drafter(DrafterConfig.for_target(settings, target.model.config)).double().eval()
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if parameter.ndim == 2:
                parameter *= 15  # so that masks look at each other, and width matters
            if any(part in name for part in STARTS_AS_NO_CHANGE):
                parameter += 0.5 * torch.randn_like(parameter)
    size = drafter.config.draft_vocab_size
    if size is not None:
        drafter.set_draft_vocabulary(torch.arange(size) * 3 + 5)
    return drafter


def choose_by_definition(drafter: Drafter, hidden: Tensor, previous: int, head: FrozenHead) -> int:
    """Give the draft of one slot, hidden `[E]`, from the formulas of the variants."""
    size = drafter.config.draft_vocab_size
    ids = torch.arange(drafter.config.vocab_size) if size is None else torch.arange(size) * 3 + 5
    added = torch.full((drafter.config.vocab_size,), -torch.inf, dtype=hidden.dtype)
    added[ids] = 0.0
    if drafter.markov_head is not None:
        row = drafter.markov_head.markov_w1.weight[previous]
        if drafter.markov_head.gate_proj is not None:
            row = row * drafter.markov_head.gate_proj(torch.cat([hidden, row])).sigmoid()
        added[ids] = drafter.markov_head.markov_w2.weight @ row
    logits = drafter.logits(hidden, head) + added  # [V]
    selector = drafter.candidate_selector
    if selector is not None:
        candidates = logits.argsort(descending=True)[: selector.top_k]
        wanted = selector.predecessor_codebook[previous] * selector.hidden_projection(hidden)
        scores = logits[candidates] + selector.successor_codebook[candidates] @ wanted
        return int(candidates[scores.argmax()])
    return int(logits.argmax())


@torch.no_grad()
def draft_by_definition(
    drafter: Drafter, head: FrozenHead, row: FeatureRow, start: int, *, num_drafts: int
) -> list[int]:
    """Draft one block of a row with a fresh cache, token by token."""
    first_slot = drafter.config.first_slot
    block = block_embeddings(
        head,
        row.input_ids[start : start + 1],
        num_slots=first_slot + num_drafts,
        config=drafter.config,
    )
    hidden = drafter.draft_step(block[0], row.features[:start], drafter.new_cache())
    drafts = [int(row.input_ids[start])]
    for slot in range(first_slot, first_slot + num_drafts):
        drafts.append(choose_by_definition(drafter, hidden[slot], drafts[-1], head))
    return drafts[1:]


def sequential_replay(drafter: Drafter, head: FrozenHead, row: FeatureRow) -> ReplayTrace:
    """The loop of the definition: one draft step after the other."""
    trace = ReplayTrace(starts=[], num_accepted=[], widths=[], end=len(row.input_ids) - 1)
    start = row.prompt_length
    while start < trace.end:
        # Plain: m = min(K, max_length - start) slots, m - 1 drafts. Shifted: one draft per slot.
        if drafter.config.is_shifted:
            num_drafts = min(K, row.max_length - start - 1)
        else:
            num_drafts = min(K, row.max_length - start) - 1
        drafts = draft_by_definition(drafter, head, row, start, num_drafts=num_drafts)
        stored = row.input_ids[start + 1 : start + 1 + num_drafts].tolist()
        accepted = 0
        while accepted < len(stored) and drafts[accepted] == stored[accepted]:
            accepted += 1
        trace.starts.append(start)
        trace.num_accepted.append(accepted)
        trace.widths.append(num_drafts + 1)
        start += min(accepted + 1, trace.end - start)
    return trace


def drafted_row(
    drafter: Drafter, head: FrozenHead, row: FeatureRow, *, errors: list[int]
) -> FeatureRow:
    """Give a row whose answer is what the drafter drafts, but for wrong tokens at `errors`.

    So acceptance has every value, as after training, without training.
    """
    row = replace(row, input_ids=row.input_ids.clone())
    ids, start = row.input_ids, row.prompt_length
    while start < len(ids) - 1:
        num_drafts = min(drafter.config.num_drafts, row.max_length - start - 1)
        drafts = draft_by_definition(drafter, head, row, start, num_drafts=num_drafts)
        stop = start + 1
        for draft in drafts[: len(ids) - start - 1]:
            is_wrong = stop in errors
            ids[stop] = (draft + 1) % 200 if is_wrong else draft
            stop += 1
            if is_wrong:
                break
        else:
            stop = min(stop + 1, len(ids))  # the bonus token stays what it is
        start = stop - 1
    return row


@pytest.fixture(params=list(VARIANTS))
def drafter(request: pytest.FixtureRequest, target64: Target) -> Drafter:
    return build(target64, VARIANTS[request.param])


@pytest.fixture
def rows(target64: Target, drafter: Drafter, answer_rows) -> list[FeatureRow]:
    """Rows that end at the budget, rows cut before it as by a stop token, one of a single token."""
    answered = answer_rows(target64, [5, 9, 6, 7], max_new_tokens=23)
    drafted = [
        drafted_row(drafter, target64.head, row, errors=[row.prompt_length + at for at in errors])
        for row, errors in zip(answered, ([], [2, 3, 9], [1, 6, 14, 15], [4, 7, 12]), strict=True)
    ]
    return [
        *drafted,
        shortened(drafted[0], 10),
        shortened(drafted[1], 17),
        shortened(drafted[2], 1),
    ]


def shortened(row: FeatureRow, num_answer_tokens: int) -> FeatureRow:
    length = row.prompt_length + num_answer_tokens
    return replace(
        row,
        id=f"{row.id}-{num_answer_tokens}",
        input_ids=row.input_ids[:length],
        loss_mask=row.loss_mask[:length],
        features=row.features[:length],
        finish_reason="stop",
    )


def test_replay_equals_the_sequential_loop_step_by_step(
    drafter: Drafter, target64: Target, rows: list[FeatureRow]
):
    traces = replay_rows(drafter, target64.head, rows)
    assert traces == [sequential_replay(drafter, target64.head, row) for row in rows]
    counts = torch.tensor([n for trace in traces for n in trace.num_accepted])
    num_drafts = drafter.config.num_drafts
    assert set(counts.tolist()) == set(range(num_drafts + 1)), "it must see every acceptance"
    widths = {width for trace in traces for width in trace.widths}
    assert num_drafts + 1 in widths
    assert widths - {num_drafts + 1}, "and blocks narrowed by the budget"


def test_blocks_near_the_budget_are_narrow_ones(
    drafter: Drafter, target64: Target, rows: list[FeatureRow]
):
    cuts = [shortened(row, length) for row in rows[:4] for length in range(3, 23)]
    tight = [replace(row, max_length=len(row.input_ids)) for row in cuts]
    generous = [replace(row, max_length=len(row.input_ids) + K) for row in cuts]
    narrow, wide = (replay_rows(drafter, target64.head, group) for group in (tight, generous))
    is_equal = [trace.num_accepted for trace in narrow] == [trace.num_accepted for trace in wide]
    # Where slots see no later ones, the wide block's first slots are the narrow block.
    assert is_equal == bool(drafter.config.is_causal)


@pytest.mark.parametrize("drafter", ["dflash2", "dspark", "dspark, gated, sliding"], indirect=True)
def test_drafts_depend_on_the_token_before(
    drafter: Drafter, target64: Target, rows: list[FeatureRow], monkeypatch: pytest.MonkeyPatch
):
    expected = replay_rows(drafter, target64.head, rows)

    def choose_blindly(hidden_SE: Tensor, previous_ids_S: Tensor, head: FrozenHead) -> Tensor:
        return Drafter.choose(drafter, hidden_SE, torch.zeros_like(previous_ids_S), head)

    monkeypatch.setattr(drafter, "choose", choose_blindly)
    assert replay_rows(drafter, target64.head, rows) != expected


def test_replay_does_not_depend_on_how_starts_are_grouped(
    drafter: Drafter, target64: Target, rows: list[FeatureRow], monkeypatch: pytest.MonkeyPatch
):
    expected = [replay(drafter, target64.head, row) for row in rows]
    monkeypatch.setattr(replay_module, "ROWS_AT_ONCE", {"cpu": 3})
    monkeypatch.setattr(replay_module, "BLOCKS_AT_ONCE", 7)
    monkeypatch.setattr(replay_module, "SLOTS_AT_ONCE", 3)
    assert replay_rows(drafter, target64.head, rows) == expected
    monkeypatch.setattr(replay_module, "FEW_ROWS", 1)  # one step of every row, never ahead
    assert replay_rows(drafter, target64.head, rows) == expected
    monkeypatch.setattr(replay_module, "CONTEXT_AT_ONCE", 1)  # every row alone
    assert replay_rows(drafter, target64.head, rows) == expected


def test_a_start_that_no_step_visits_is_not_evaluated(
    drafter: Drafter, target64: Target, rows: list[FeatureRow], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(replay_module, "FEW_ROWS", 1)
    evaluated: list[int] = []
    denoise = drafter.denoise

    def counting(block_embeddings: Tensor, contexts: list[ContextKV], blocks: Blocks) -> Tensor:
        evaluated.extend(blocks.anchor_positions.tolist())
        return denoise(block_embeddings, contexts, blocks)

    monkeypatch.setattr(drafter, "denoise", counting)
    traces = replay_rows(drafter, target64.head, rows)
    assert sorted(evaluated) == sorted(start for trace in traces for start in trace.starts)


def test_an_answer_of_one_token_has_no_verify_step(
    drafter: Drafter, target64: Target, rows: list[FeatureRow]
):
    trace = replay(drafter, target64.head, rows[-1])
    assert trace.starts == []
    assert replay_many(drafter, target64.head, rows[-1:]).num_steps == 0


def test_steps_of_a_request_commit_its_answer(
    drafter: Drafter, target64: Target, rows: list[FeatureRow]
):
    for row in rows:
        trace = replay(drafter, target64.head, row)
        committed = sum(trace.acceptance_lengths)
        answer_after_prefill = len(row.input_ids) - row.prompt_length - 1
        # The last step's bonus token may lie past the stored answer.
        assert committed - answer_after_prefill in (0, 1)


def test_pooled_and_per_request_means_are_told_apart(
    drafter: Drafter, target64: Target, rows: list[FeatureRow]
):
    counts = replay_many(drafter, target64.head, rows)
    lengths = [replay(drafter, target64.head, row).acceptance_lengths for row in rows[:-1]]
    flat = [value for request in lengths for value in request]
    assert counts.num_requests == 6
    assert counts.pooled == pytest.approx(sum(flat) / len(flat), rel=1e-12)
    means = [sum(request) / len(request) for request in lengths]
    assert counts.per_request == pytest.approx(sum(means) / 6, rel=1e-12)
    assert counts.pooled < counts.per_request


def test_a_redacted_answer_counts_up_to_its_first_gap(
    drafter: Drafter, rows: list[FeatureRow], target64: Target
) -> None:
    row = rows[1]
    end = row.prompt_length + 5
    mask = row.loss_mask.clone()
    mask[end : end + 2] = False
    gapped = replay(drafter, target64.head, replace(row, loss_mask=mask))
    features = torch.cat([row.features[: end - 1], torch.zeros_like(row.features[:1])])
    short = replace(
        row, input_ids=row.input_ids[:end], loss_mask=row.loss_mask[:end], features=features
    )
    assert gapped == replay(drafter, target64.head, short)
    assert gapped.end == end - 1
