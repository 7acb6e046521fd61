from dataclasses import replace
from itertools import islice

import pytest
import torch

from dflash_train.features.store import FeatureRow
from dflash_train.features.target import Target
from dflash_train.features.teacher import TeacherRow
from dflash_train.training.batching import (
    BatchSource,
    BlockSettings,
    collate,
    pack_stream,
    plan_epoch,
    take_window,
)
from dflash_train.training.losses import position_weights

SETTINGS = BlockSettings(block_size=4, num_anchors=3, seed=0)
LENGTHS = [30, 10, 50, 120, 20, 40, 64, 5, 33]


@pytest.fixture
def rows(target32: Target, answer_rows) -> list[FeatureRow]:
    return answer_rows(target32, [5, 11, 7], max_new_tokens=9)


def test_an_epoch_holds_every_row_once_and_no_pack_is_overfull():
    packs = plan_epoch(LENGTHS, pack_tokens=64, seed=0, epoch=0)
    assert sorted(row for pack in packs for row in pack) == list(range(len(LENGTHS)))
    for pack in packs:
        assert len(pack) == 1 or sum(LENGTHS[row] for row in pack) <= 64
    assert [3] in packs  # 120 tokens stand alone


def test_the_order_of_rows_depends_on_seed_and_epoch_alone():
    def plan(seed: int, epoch: int) -> list[list[int]]:
        return plan_epoch(LENGTHS, pack_tokens=64, seed=seed, epoch=epoch)

    first = plan(0, 0)
    torch.manual_seed(99)
    assert plan(0, 0) == first
    assert plan(0, 1) != first
    assert plan(1, 0) != first


def test_a_stream_resumes_at_the_very_next_pack():
    whole = list(islice(pack_stream(LENGTHS, pack_tokens=64, seed=0), 40))
    assert whole[-1].epoch >= 3
    for taken in (1, 7, 23):
        last = whole[taken - 1]
        rest = pack_stream(
            LENGTHS, pack_tokens=64, seed=0, epoch=last.epoch, position=last.position + 1
        )
        assert list(islice(rest, 40 - taken)) == whole[taken:]


def test_ranks_take_turns_so_that_no_pack_is_lost_or_repeated():
    stream = pack_stream(LENGTHS, pack_tokens=64, seed=0)
    window = take_window(stream, num_micro_batches=2, num_ranks=3)
    shares = [window[rank::3] for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert [pack for pair in zip(*shares, strict=True) for pack in pair] == window


def test_collation_lays_documents_end_to_end_up_to_their_last_anchor(rows: list[FeatureRow]):
    batch = collate(rows, SETTINGS, epoch=0)
    assert batch.num_tokens == sum(len(row.input_ids) for row in rows)
    assert batch.blocks.block_offsets == [0, 3, 6, 9]
    for number, row in enumerate(rows):
        first, stop = batch.blocks.context_offsets[number : number + 2]
        anchors = batch.blocks.anchor_positions[3 * number : 3 * number + 3]
        assert stop - first == anchors.max()
        assert torch.equal(batch.target_features[first:stop], row.features[: stop - first])
        assert torch.equal(batch.anchor_ids[3 * number : 3 * number + 3], row.input_ids[anchors])


def test_blocks_of_a_row_do_not_depend_on_its_pack(rows: list[FeatureRow]):
    together = collate(rows, SETTINGS, epoch=5)
    alone = collate(rows[1:2], SETTINGS, epoch=5)
    assert torch.equal(together.labels[3:6], alone.labels)
    assert torch.equal(together.label_mask[3:6], alone.label_mask)
    other = collate(rows[1:2], SETTINGS, epoch=6)
    assert not torch.equal(other.blocks.anchor_positions, alone.blocks.anchor_positions)


def test_rows_without_an_anchor_are_left_out_and_a_pack_of_them_is_named(rows: list[FeatureRow]):
    silent = replace(rows[0], id="silent", loss_mask=torch.zeros_like(rows[0].loss_mask))
    batch = collate([silent, rows[1]], SETTINGS, epoch=0)
    assert batch.blocks.block_offsets == [0, 3]
    with pytest.raises(ValueError, match="silent"):
        collate([silent], SETTINGS, epoch=0)


def test_the_denominator_is_known_from_labels_alone(rows: list[FeatureRow]):
    batch = collate(rows, replace(SETTINGS, num_anchors=9), epoch=0)
    weights = position_weights(4, 4.0)
    expected = sum(float(weights[slot]) for _, slot in batch.label_mask.nonzero().tolist())
    assert float(batch.weight_sum(weights)) == pytest.approx(expected, rel=1e-12)


def test_rows_whose_answer_is_one_token_are_never_planned(rows, write_split, tmp_path):
    short = replace(
        rows[0],
        id="short",
        input_ids=rows[0].input_ids[:6],
        loss_mask=rows[0].loss_mask[:6],
        features=rows[0].features[:6],
    )
    store = write_split(tmp_path / "train", [short, rows[1]])
    source = BatchSource(store, SETTINGS, pack_tokens=64)
    assert source.rows == [1]
    (pack,) = islice(source.stream(epoch=0, position=0), 1)
    assert torch.equal(
        source.load(pack).labels,
        collate(rows[1:2], SETTINGS, epoch=0).labels,
    )
    empty = write_split(tmp_path / "empty", [short])
    with pytest.raises(ValueError, match="nothing to train on"):
        BatchSource(empty, SETTINGS, pack_tokens=64)


def test_shifted_slots_are_labelled_with_the_next_token(rows: list[FeatureRow]):
    settings = replace(SETTINGS, first_slot=0)
    batch = collate(rows[:1], settings, epoch=0)
    ids = rows[0].input_ids
    for block, anchor in enumerate(batch.blocks.anchor_positions.tolist()):
        for slot in range(4):
            is_there = anchor + slot + 1 < len(ids)
            assert bool(batch.label_mask[block, slot]) == is_there
            if is_there:
                assert batch.labels[block, slot] == ids[anchor + slot + 1]
                assert batch.previous_ids[block, slot] == ids[anchor + slot]


def test_each_slot_knows_the_token_before_its_label(rows: list[FeatureRow]):
    batch = collate(rows[:1], SETTINGS, epoch=0)
    for block, slot in batch.label_mask.nonzero().tolist():
        position = int(batch.blocks.anchor_positions[block]) + slot
        assert batch.labels[block, slot] == rows[0].input_ids[position]
        assert batch.previous_ids[block, slot] == rows[0].input_ids[position - 1]


@pytest.mark.parametrize("first_slot", [0, 1])
def test_a_label_outside_the_draft_vocabulary_ends_its_block(
    rows: list[FeatureRow], first_slot: int
):
    settings = replace(SETTINGS, first_slot=first_slot, num_anchors=20)
    whole = collate(rows, settings, epoch=0)
    allowed = whole.labels[whole.label_mask].unique()[::2]
    reduced = collate(rows, replace(settings, draft_token_ids=allowed), epoch=0)
    assert torch.equal(reduced.labels, whole.labels)
    for block in range(len(whole.labels)):
        is_open = True
        for slot in range(first_slot, 4):
            is_open &= bool(whole.label_mask[block, slot] and whole.labels[block, slot] in allowed)
            assert bool(reduced.label_mask[block, slot]) == is_open
    assert 0 < reduced.label_mask.sum() < whole.label_mask.sum()


@pytest.mark.parametrize("first_slot", [0, 1])
def test_the_teacher_of_a_label_is_stored_one_row_before_it(
    rows: list[FeatureRow], first_slot: int
):
    settings = replace(SETTINGS, first_slot=first_slot, use_teacher=True)
    positions = torch.arange(len(rows[0].input_ids))
    teacher = TeacherRow(
        ids=positions[:, None].int(), probabilities=torch.full((len(positions), 1), 0.5)
    )
    batch = collate([replace(rows[0], teacher=teacher)], settings, epoch=0)
    assert batch.teacher is not None
    for block, slot in batch.label_mask.nonzero().tolist():
        position = int(batch.blocks.anchor_positions[block]) + slot + 1 - first_slot
        assert batch.labels[block, slot] == rows[0].input_ids[position]
        assert batch.teacher.ids[block, slot].item() == position - 1


def test_a_label_without_a_distribution_is_refused(rows: list[FeatureRow]):
    settings = replace(SETTINGS, use_teacher=True)
    with pytest.raises(ValueError, match=r"row-0-0 has labels.*data\.teacher_top_k"):
        collate(rows, settings, epoch=0)
    length = len(rows[0].input_ids)
    zeros = TeacherRow(ids=torch.zeros(length, 2).int(), probabilities=torch.zeros(length, 2))
    with pytest.raises(ValueError, match=r"row-0-0 has labels"):
        collate([replace(rows[0], teacher=zeros)], settings, epoch=0)
