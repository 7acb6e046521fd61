from dataclasses import replace

import pytest
import torch

from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.store import FeatureRow
from dflash_train.features.target import FrozenHead, Target
from dflash_train.testing import tiny_drafter
from dflash_train.training import replay as replay_module
from dflash_train.training.replay import ReplayTrace, replay, replay_many, replay_rows

K = 4


def sequential_replay(drafter: Drafter, head: FrozenHead, row: FeatureRow) -> ReplayTrace:
    """The loop of the definition: one cached draft step after the other."""
    trace = ReplayTrace(starts=[], num_accepted=[], widths=[], end=len(row.input_ids) - 1)
    cache = drafter.new_cache()
    start = row.prompt_length
    while start < trace.end:
        width = min(K, row.max_length - start)
        anchor = row.input_ids[start : start + 1]
        block = block_embeddings(head, anchor, num_slots=width, config=drafter.config)[0]
        with torch.no_grad():
            hidden = drafter.draft_step(block, row.features[cache.length : start], cache)
        drafts = drafter.logits(hidden, head).argmax(-1).tolist()
        accepted = 0
        while (
            accepted + 1 < width
            and start + accepted + 1 <= trace.end
            and drafts[accepted + 1] == int(row.input_ids[start + accepted + 1])
        ):
            accepted += 1
        trace.starts.append(start)
        trace.num_accepted.append(accepted)
        trace.widths.append(width)
        start += min(accepted + 1, trace.end - start)
    return trace


def drafted_row(
    drafter: Drafter, head: FrozenHead, row: FeatureRow, *, errors: list[int]
) -> FeatureRow:
    """Give a row whose answer is what the drafter drafts, but for wrong tokens at `errors`.

    So acceptance has every value, as after training, without training.
    """
    ids, start = row.input_ids.clone(), row.prompt_length
    while start < len(ids) - 1:
        width = min(K, row.max_length - start)
        block = block_embeddings(
            head, ids[start : start + 1], num_slots=width, config=drafter.config
        )
        with torch.no_grad():
            hidden = drafter.draft_step(block[0], row.features[:start], drafter.new_cache())
        drafts = drafter.logits(hidden, head).argmax(-1)[1:]
        stop = start + 1
        for draft in drafts[: len(ids) - start - 1]:
            is_wrong = stop in errors
            ids[stop] = (int(draft) + 1) % 200 if is_wrong else draft
            stop += 1
            if is_wrong:
                break
        else:
            stop = min(stop + 1, len(ids))  # the bonus token stays what it is
        start = stop - 1
    return FeatureRow(
        id=row.id,
        tenant=None,
        session=None,
        input_ids=ids,
        loss_mask=row.loss_mask,
        features=row.features,
        max_length=row.max_length,
        finish_reason=row.finish_reason,
    )


@pytest.fixture
def drafter(target64: Target) -> Drafter:
    drafter = tiny_drafter(target64, block_size=K, dtype=torch.float64)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.ndim == 2:
                parameter *= 15  # so that masks look at each other, and width matters
    return drafter


@pytest.fixture
def rows(target64: Target, drafter: Drafter, answer_rows) -> list[FeatureRow]:
    """Rows that end at the budget, rows cut before it as by a stop token, one of a single token."""
    answered = answer_rows(target64, [5, 9, 6, 7], max_new_tokens=23)
    drafted = [
        drafted_row(drafter, target64.head, row, errors=[row.prompt_length + at for at in errors])
        for row, errors in zip(answered, ([], [2, 3, 9], [1, 6, 14, 15], [4]), strict=True)
    ]
    return [
        *drafted,
        shortened(drafted[0], 10),
        shortened(drafted[1], 17),
        shortened(drafted[2], 1),
    ]


def shortened(row: FeatureRow, num_answer_tokens: int) -> FeatureRow:
    length = row.prompt_length + num_answer_tokens
    return FeatureRow(
        id=f"{row.id}-{num_answer_tokens}",
        tenant=None,
        session=None,
        input_ids=row.input_ids[:length],
        loss_mask=row.loss_mask[:length],
        features=row.features[:length],
        max_length=row.max_length,
        finish_reason="stop",
    )


def test_replay_equals_the_sequential_loop_step_by_step(
    drafter: Drafter, target64: Target, rows: list[FeatureRow]
):
    traces = replay_rows(drafter, target64.head, rows)
    assert traces == [sequential_replay(drafter, target64.head, row) for row in rows]
    counts = torch.tensor([n for trace in traces for n in trace.num_accepted])
    assert set(counts.tolist()) == {0, 1, 2, 3}, "the comparison must see every acceptance"
    widths = {width for trace in traces for width in trace.widths}
    assert widths - {K}, "and blocks narrowed by the budget"


def test_blocks_near_the_budget_are_narrow_ones(
    drafter: Drafter, target64: Target, rows: list[FeatureRow]
):
    generous = [replace(row, max_length=row.max_length + K) for row in rows]
    narrow, wide = (replay_rows(drafter, target64.head, group) for group in (rows, generous))
    assert [trace.num_accepted for trace in narrow] != [trace.num_accepted for trace in wide]


def test_replay_does_not_depend_on_how_starts_are_grouped(
    drafter: Drafter, target64: Target, rows: list[FeatureRow], monkeypatch: pytest.MonkeyPatch
):
    expected = [replay(drafter, target64.head, row) for row in rows]
    monkeypatch.setattr(replay_module, "BLOCKS_AT_ONCE", 5)
    monkeypatch.setattr(replay_module, "SLOTS_AT_ONCE", 3)
    assert replay_rows(drafter, target64.head, rows) == expected


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
