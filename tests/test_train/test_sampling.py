from collections import Counter

import pytest
import torch

from dflash_train.config import ServingSampling
from dflash_train.features.sampling import RowSampler, is_plain_greedy
from dflash_train.testing import tiny_target

LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -4.0])


def draw(sampling: ServingSampling, number: int, prompt: list[int] | None = None) -> Counter[int]:
    return Counter(
        RowSampler(prompt or [5], sampling, seed=seed).choose(LOGITS) for seed in range(number)
    )


def test_tokens_come_as_often_as_the_tempered_distribution_says() -> None:
    number = 3000
    want = (LOGITS / 0.7).softmax(-1) * number
    got = torch.tensor([draw(ServingSampling(temperature=0.7), number)[i] for i in range(6)])
    chi_square = float(((got - want).square() / want).sum())
    assert chi_square < 20.5  # 5 degrees of freedom, p = 1e-3


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (ServingSampling(temperature=1.0, top_k=2), {0, 1}),
        (ServingSampling(temperature=1.0, top_p=0.6), {0, 1}),
        (ServingSampling(temperature=1.0, min_p=0.3), {0, 1, 2}),
        (ServingSampling(temperature=1.0, top_k=1), {0}),
        (ServingSampling(), {0}),
    ],
)
def test_cuts_leave_the_likeliest_tokens(sampling: ServingSampling, allowed: set[int]) -> None:
    assert draw(sampling, 200).keys() == allowed


def test_a_repetition_penalty_counts_prompt_and_answer() -> None:
    sampler = RowSampler([0], ServingSampling(repetition_penalty=2.0), seed=0)
    assert [sampler.choose(LOGITS) for _ in range(2)] == [1, 0]  # 2.0 and then 1.5 are halved
    assert not is_plain_greedy(ServingSampling(repetition_penalty=2.0))
    assert is_plain_greedy(ServingSampling(top_p=0.5))


def test_penalties_that_only_servers_know_are_refused() -> None:
    with pytest.raises(ValueError, match=r"presence_penalty \(=0\.5\).*data\.endpoints\.urls"):
        RowSampler([0], ServingSampling(presence_penalty=0.5), seed=0)


def test_a_sampled_row_is_the_same_alone_and_among_others() -> None:
    target = tiny_target()
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]

    def sampler(row: int) -> RowSampler:
        return RowSampler(prompts[row], ServingSampling(temperature=1.0), seed=row)

    together = target.generate_batch(
        prompts, max_new_tokens=10, samplers=[sampler(row) for row in range(3)]
    )
    for row, prompt in enumerate(prompts):
        alone = target.generate_batch([prompt], max_new_tokens=10, samplers=[sampler(row)])[0]
        assert together[row].output_ids == alone.output_ids
    greedy = target.generate_batch(prompts, max_new_tokens=10)
    assert [row.output_ids for row in together] != [row.output_ids for row in greedy]
