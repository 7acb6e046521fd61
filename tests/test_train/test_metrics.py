import pytest

from dflash_train.training.metrics import AcceptanceCounts, TrainingCounts


def counts(**changes: object) -> TrainingCounts:
    values = {
        "loss_sum": 6.0, "weight_sum": 4.0, "ce_sum": 14.0, "num_tokens": 50, "num_blocks": 3,
        "slot_labels": [3, 2, 2], "slot_correct": [3, 1, 2], "slot_joint": [3, 1, 1],
    }  # fmt: skip
    return TrainingCounts(**(values | changes))  # type: ignore[arg-type]


def test_counts_add_up_and_shares_stay():
    both = counts() + counts()
    assert (both.num_tokens, both.num_blocks) == (100, 6)
    assert both.slot_accuracy == [1.0, 0.5, 1.0]
    assert both.joint_accuracy == [1.0, 0.5, 0.5]
    assert both.loss == 1.5
    assert both.cross_entropy == 2.0


def test_counts_survive_their_tensor():
    assert TrainingCounts.from_tensor(counts().to_tensor()) == counts()
    assert TrainingCounts.zeros(3) + counts() == counts()


def test_a_slot_without_labels_has_no_accuracy():
    assert counts(slot_labels=[3, 0, 0], slot_correct=[1, 0, 0]).slot_accuracy[1:] == [None, None]


def test_acceptance_is_pooled_over_steps_and_averaged_over_requests():
    acceptance = AcceptanceCounts.zeros(3)
    acceptance.add_request([3, 3, 3])
    acceptance.add_request([1])
    acceptance.add_request([])
    assert acceptance.pooled == pytest.approx(2.5)
    assert acceptance.per_request == pytest.approx(2.0)
    assert acceptance.by_position == [0.75, 0.75, 0.0]
    assert AcceptanceCounts.from_tensor(acceptance.to_tensor()) == acceptance
