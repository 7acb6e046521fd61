from dataclasses import replace

import pytest
import torch

from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.store import FeatureStore
from dflash_train.testing import assert_close
from dflash_train.training.vocabulary import HeadRows, count_labels, most_frequent_ids, sample_head


def test_only_answer_tokens_of_the_chosen_rows_are_counted(
    target32, answer_rows, write_split, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    rows = answer_rows(target32, [5, 9, 7])
    store = write_split(tmp_path / "rows", rows)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "__getitem__", None)  # features stay unread
        counts = count_labels(store, [0, 2], vocab_size=260)
    want = torch.zeros(260, dtype=torch.int64)
    for row in (rows[0], rows[2]):
        for token in row.input_ids[row.prompt_length :].tolist():
            want[token] += 1
    assert torch.equal(counts, want)


def test_the_most_frequent_ids_are_taken_with_ties_by_id_and_all_stop_ids():
    counts = torch.tensor([0, 5, 2, 2, 9, 2, 0])
    assert most_frequent_ids(counts, 3, always=[]).tolist() == [1, 2, 4]
    assert most_frequent_ids(counts, 4, always=[6]).tolist() == [1, 2, 4, 6]
    assert most_frequent_ids(counts, 2, always=[6, 0]).tolist() == [0, 6]


def test_a_sampled_head_depends_on_seed_and_step_alone_and_keeps_every_label():
    weight = torch.randn(50, 8)
    head = FrozenHead(embedding_weight=weight, lm_head_weight=weight)
    is_label = torch.arange(50) % 5 == 0

    def draw(seed: int, step: int) -> list[int]:
        ids = sample_head(head, is_label, num_drawn=7, seed=seed, step=step).head.draft_token_ids
        assert ids is not None
        return ids.tolist()

    first = draw(0, 3)
    torch.manual_seed(9)
    assert draw(0, 3) == first
    assert draw(0, 4) != first
    assert draw(1, 3) != first
    assert len(first) == 17
    assert set(range(0, 50, 5)) <= set(first)


def test_the_sampled_partition_sum_is_the_whole_one_in_the_mean():
    weight = torch.randn(50, 8, dtype=torch.float64)
    head = FrozenHead(embedding_weight=weight, lm_head_weight=weight)
    hidden, is_label = 0.3 * torch.randn(8, dtype=torch.float64), torch.arange(50) % 5 == 0
    sums = []
    for step in range(4000):
        sample = sample_head(head, is_label, num_drawn=8, seed=0, step=step)
        assert sample.log_weights is not None
        sums.append((sample.head.logits(hidden) + sample.log_weights).exp().sum())
    assert_close("mean", torch.stack(sums).mean(), head.logits(hidden).exp().sum(), 0.02)  # a mean


def test_drawing_all_ids_is_the_whole_head():
    weight = torch.randn(20, 4)
    head = FrozenHead(embedding_weight=weight, lm_head_weight=weight)
    sample = sample_head(head, torch.arange(20) < 6, num_drawn=14, seed=0, step=0)
    assert sample.log_weights is not None
    assert not sample.log_weights.any()
    assert torch.equal(sample.head.lm_head_weight, weight)
    assert replace(sample.head, draft_token_ids=None, lm_head_weight=weight) == head


@pytest.mark.parametrize(
    ("num_labels", "num_drawn"), [(6, 4), (6, 14), (6, 40), (20, 3), (None, 0)]
)
def test_the_number_of_rows_is_that_of_every_step(num_labels: int | None, num_drawn: int):
    weight = torch.randn(20, 4)
    rows = HeadRows(
        head=FrozenHead(embedding_weight=weight, lm_head_weight=weight),
        is_label=None if num_labels is None else torch.arange(20) < num_labels,
        num_drawn=num_drawn,
        seed=0,
    )
    for step in range(3):
        assert len(rows.of_step(step).head.lm_head_weight) == rows.number
