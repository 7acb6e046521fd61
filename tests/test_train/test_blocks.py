import pytest
import torch

from dflash_train.drafter.attention import Blocks
from dflash_train.drafter.config import Visibility
from dflash_train.training.blocks import (
    anchor_generator,
    block_labels,
    label_mask,
    select_anchors,
    visibility_mask,
)

#                                 0  1  2  3  4  5  6  7
LOSS_MASK = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1], dtype=torch.bool)


def test_anchors_need_a_supervised_token_and_one_after_it():
    drawn = select_anchors(LOSS_MASK, 64, generator=torch.Generator().manual_seed(0))
    assert drawn.tolist() == [2, 3, 6]
    assert drawn.dtype == torch.int64


def test_anchors_are_ascending_distinct_and_as_many_as_asked():
    loss_mask = torch.arange(63) >= 10
    drawn = select_anchors(loss_mask, 20, generator=torch.Generator().manual_seed(1)).tolist()
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 20
    assert min(drawn) >= 10
    assert max(drawn) <= 61


def test_a_row_without_two_supervised_tokens_in_a_run_has_no_anchor():
    for bits in ([0, 0, 0, 1], [1, 0, 1, 0], [0], [1]):
        loss_mask = torch.tensor(bits, dtype=torch.bool)
        assert select_anchors(loss_mask, 4, generator=torch.Generator()).tolist() == []


def test_every_eligible_position_is_drawn_about_equally_often():
    loss_mask = torch.arange(13) >= 2  # eligible: 2..11
    counts = torch.zeros(13)
    for epoch in range(1000):
        drawn = select_anchors(
            loss_mask, 3, generator=anchor_generator(0, epoch=epoch, row_id="row")
        )
        counts[drawn] += 1
    assert counts[:2].sum() == 0
    assert counts[12] == 0
    assert counts[2:12].min() > 230  # 300 expected, standard deviation 14.5
    assert counts[2:12].max() < 370


def test_anchor_stream_depends_on_seed_epoch_and_row_alone():
    def draw(seed: int, epoch: int, row_id: str) -> list[int]:
        generator = anchor_generator(seed, epoch=epoch, row_id=row_id)
        return torch.randperm(50, generator=generator).tolist()

    first = draw(0, 0, "a")
    torch.manual_seed(123)
    assert draw(0, 0, "a") == first
    assert (
        len({tuple(draw(*key)) for key in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))})
        == 4
    )


def test_label_mask_is_a_prefix_that_stops_at_a_gap_and_at_the_end():
    mask = label_mask(LOSS_MASK, torch.tensor([2, 3, 6]), 5)
    assert mask.int().tolist() == [
        [0, 1, 1, 0, 0],  # 3, 4, then the gap at 5; 6 lies behind it
        [0, 1, 0, 0, 0],
        [0, 1, 0, 0, 0],  # 7 is the last token
    ]


def test_labels_are_the_tokens_at_the_slots_own_positions():
    input_ids = torch.arange(100, 108)
    mask = label_mask(LOSS_MASK, torch.tensor([2, 6]), 3)
    labels = block_labels(input_ids, torch.tensor([2, 6]), 3)
    assert labels[:, 0].tolist() == [102, 106]
    assert labels[mask].tolist() == [103, 104, 107]


def test_shifted_labels_are_the_next_tokens_and_slot_zero_has_one():
    input_ids, anchors = torch.arange(100, 108), torch.tensor([2, 3, 6])
    mask = label_mask(LOSS_MASK, anchors, 3, first_slot=0)
    assert mask.int().tolist() == [
        [1, 1, 0],  # 3, 4, then the gap at 5
        [1, 0, 0],
        [1, 0, 0],  # 7 is the last token
    ]
    labels = block_labels(input_ids, anchors, 3, first_slot=0)
    assert labels[mask].tolist() == [103, 104, 104, 107]


def test_a_block_stops_where_the_next_turn_of_the_conversation_begins():
    turns = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    for first_slot, reached in ((1, [2, 3]), (0, [2, 3])):
        mask = label_mask(turns, torch.tensor([1]), 8, first_slot=first_slot)
        labels = block_labels(torch.arange(8), torch.tensor([1]), 8, first_slot=first_slot)
        assert labels[mask].tolist() == reached


@pytest.mark.parametrize(
    ("visibility", "rows"),
    [
        # anchor 3 of 4 rows, K = 3; the fourth row is the anchor's own
        (Visibility(), ["1110 111", "1110 111", "1110 111"]),
        (Visibility(is_causal=True), ["1110 100", "1110 110", "1110 111"]),
        (Visibility(window=3, is_causal=True), ["0110 100", "0010 110", "0000 111"]),
        (Visibility(window=2, is_causal=True), ["0010 100", "0000 110", "0000 011"]),
        (Visibility(window=2), ["0010 110", "0000 111", "0000 011"]),
        (Visibility(window=1), ["0000 100", "0000 010", "0000 001"]),
    ],
)
def test_dense_mask_spells_out_windows_and_causality(visibility: Visibility, rows: list[str]):
    blocks = Blocks(
        context_offsets=[0, 4], block_offsets=[0, 1], anchor_positions=torch.tensor([3])
    )
    mask = visibility_mask(blocks, 3, visibility=visibility).int().tolist()
    assert ["".join(map(str, row)) for row in mask] == [row.replace(" ", "") for row in rows]


def test_dense_mask_spells_out_the_visibility_rule():
    blocks = Blocks(
        context_offsets=[0, 2, 5],
        block_offsets=[0, 1, 3],
        anchor_positions=torch.tensor([1, 1, 3]),
        widths=torch.tensor([2, 2, 2]),
    )
    # context of document 0 | document 1   | blocks 0, 1, 2
    expected = [
        [1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1],
    ]
    assert visibility_mask(blocks, 2).int().tolist() == [row for row in expected for _ in range(2)]

    blocks.widths = torch.tensor([2, 1, 2])  # the missing slot is seen by itself alone
    expected[1][8] = 0
    narrow = visibility_mask(blocks, 2).int().tolist()
    assert narrow[2] == expected[1]
    assert narrow[3] == [0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0]
