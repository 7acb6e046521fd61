from dataclasses import replace
from itertools import islice

import pytest
import torch

from dflash_train.config import TrainingConfig
from dflash_train.features.store import FeatureRow
from dflash_train.features.target import Target
from dflash_train.training.batching import (
    BatchSource,
    collate,
    pack_stream,
    plan_epoch,
    take_window,
)
from dflash_train.training.losses import position_weights

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
    batch = collate(rows, block_size=4, num_anchors=3, seed=0, epoch=0)
    assert batch.num_tokens == sum(len(row.input_ids) for row in rows)
    assert batch.blocks.block_offsets == [0, 3, 6, 9]
    for number, row in enumerate(rows):
        first, stop = batch.blocks.context_offsets[number : number + 2]
        anchors = batch.blocks.anchor_positions[3 * number : 3 * number + 3]
        assert stop - first == anchors.max()
        assert torch.equal(batch.target_features[first:stop], row.features[: stop - first])
        assert torch.equal(batch.anchor_ids[3 * number : 3 * number + 3], row.input_ids[anchors])


def test_blocks_of_a_row_do_not_depend_on_its_pack(rows: list[FeatureRow]):
    together = collate(rows, block_size=4, num_anchors=3, seed=0, epoch=5)
    alone = collate(rows[1:2], block_size=4, num_anchors=3, seed=0, epoch=5)
    assert torch.equal(together.labels[3:6], alone.labels)
    assert torch.equal(together.label_mask[3:6], alone.label_mask)
    other = collate(rows[1:2], block_size=4, num_anchors=3, seed=0, epoch=6)
    assert not torch.equal(other.blocks.anchor_positions, alone.blocks.anchor_positions)


def test_rows_without_an_anchor_are_left_out_and_a_pack_of_them_is_named(rows: list[FeatureRow]):
    silent = replace(rows[0], id="silent", loss_mask=torch.zeros_like(rows[0].loss_mask))
    batch = collate([silent, rows[1]], block_size=4, num_anchors=3, seed=0, epoch=0)
    assert batch.blocks.block_offsets == [0, 3]
    with pytest.raises(ValueError, match="silent"):
        collate([silent], block_size=4, num_anchors=3, seed=0, epoch=0)


def test_the_denominator_is_known_from_labels_alone(rows: list[FeatureRow]):
    batch = collate(rows, block_size=4, num_anchors=9, seed=0, epoch=0)
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
    settings = TrainingConfig(max_steps=1, pack_tokens=64, num_anchors=3)
    store = write_split(tmp_path / "train", [short, rows[1]])
    source = BatchSource(store, settings=settings, block_size=4, seed=0)
    assert source.rows == [1]
    (pack,) = islice(source.stream(epoch=0, position=0), 1)
    assert torch.equal(
        source.load(pack).labels,
        collate(rows[1:2], block_size=4, num_anchors=3, seed=0, epoch=0).labels,
    )
    empty = write_split(tmp_path / "empty", [short])
    with pytest.raises(ValueError, match="nothing to train on"):
        BatchSource(empty, settings=settings, block_size=4, seed=0)
