import pytest
import torch

from dflash_train.config import DataConfig
from dflash_train.features.teacher import TeacherRow, join, top_tokens
from dflash_train.testing import assert_close


def random_logits(num_rows: int, vocab_size: int) -> torch.Tensor:
    return 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0))


def test_the_top_k_are_the_largest_probabilities_in_order():
    logits = random_logits(7, 63)
    kept = top_tokens(logits, 5)
    masses, ids = logits.double().softmax(-1).sort(-1, descending=True)
    assert (kept.ids.dtype, kept.probabilities.dtype) == (torch.int32, torch.float32)
    assert kept.ids.tolist() == ids[:, :5].tolist()
    assert_close("probabilities", kept.probabilities, masses[:, :5].float(), 1e-5)
    assert_close("rest", kept.rest_mass, masses[:, 5:].sum(-1).float(), 1e-5)


def test_the_whole_vocabulary_leaves_a_rest_that_is_zero_and_never_negative():
    kept = top_tokens(random_logits(50, 33), 33)
    assert (kept.probabilities.sum(-1) > 1).any()  # rounding, which the rest must not show
    assert (kept.rest_mass >= 0).all()
    assert kept.rest_mass.max() < 1e-6


def test_a_confident_row_keeps_its_small_rest():
    logits = torch.zeros(1, 1001)
    logits[0, 7] = 16.0
    rest = float(top_tokens(logits, 1).rest_mass)
    want = 1000 / (1000 + float(torch.tensor(16.0).double().exp()))
    assert rest == pytest.approx(want, rel=0.01)  # 1.1e-4; float16 would make it 0


def test_among_equal_logits_the_one_that_argmax_chose_comes_first():
    logits = torch.zeros(300, 512, dtype=torch.bfloat16)
    logits[torch.arange(300), torch.arange(300) + 100] = -1.0
    kept = top_tokens(logits, 4)
    assert kept.ids[:, 0].tolist() == logits.argmax(-1).tolist()
    assert all(len(set(row)) == 4 for row in kept.ids.tolist())
    assert (kept.probabilities[:, 0] == kept.probabilities[:, 3]).all()


def test_more_tokens_than_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"data\.teacher_top_k \(=34\) must be at most .* 33 ids"):
        top_tokens(random_logits(1, 33), 34)


def test_a_negative_number_of_tokens_is_refused_by_the_recipe():
    with pytest.raises(ValueError, match=r"data\.teacher_top_k \(=-1\) must not be negative"):
        DataConfig(teacher_top_k=-1)


def test_an_answers_distributions_stand_one_row_before_its_tokens():
    answer = top_tokens(random_logits(3, 33), 2)
    row = answer.over_the_row(4)
    assert row.ids.shape == row.probabilities.shape == (7, 2)
    assert torch.equal(row.ids[3:6], answer.ids)
    assert torch.equal(row.probabilities[3:6], answer.probabilities)
    for empty in (slice(0, 3), slice(6, 7)):
        assert not row.ids[empty].any()
        assert not row.probabilities[empty].any()
        assert row.rest_mass[empty].tolist() == [1.0] * len(row.rest_mass[empty])


def test_split_and_join_are_inverse():
    whole = top_tokens(random_logits(6, 33), 3)
    pieces = whole.split([1, 3, 2])
    assert [len(piece.ids) for piece in pieces] == [1, 3, 2]
    back: TeacherRow = join(pieces)
    assert torch.equal(back.ids, whole.ids)
    assert torch.equal(back.probabilities, whole.probabilities)
