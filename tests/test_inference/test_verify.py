from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from dflash_inference.sampling import draw
from dflash_inference.verify import (
    Verdicts,
    accept_argmax_proposal,
    accept_greedy,
    accept_sampled_proposal,
)

ROWS, NUM_DRAFTS, VOCABULARY = 20_000, 3, 16


def logits_choosing(*token_ids: int) -> Tensor:
    """Give `[1, m, 10]` logits whose argmax per row is the given token."""
    return torch.nn.functional.one_hot(torch.tensor([token_ids]), 10).float()


def judged(draft_ids: list[int], logits: Tensor) -> tuple[int, int]:
    verdicts = accept_greedy(torch.tensor([draft_ids], dtype=torch.int64), logits)
    return int(verdicts.num_accepted[0]), int(verdicts.bonus_token[0])


def test_everything_is_kept_when_the_draft_is_what_the_target_says() -> None:
    assert judged([3, 4, 5], logits_choosing(3, 4, 5, 6)) == (3, 6)


def test_bonus_token_replaces_a_wrong_first_draft() -> None:
    assert judged([9, 4, 5], logits_choosing(3, 4, 5, 6)) == (0, 3)


def test_nothing_behind_the_first_mismatch_counts() -> None:
    assert judged([3, 9, 5], logits_choosing(3, 4, 5, 6)) == (1, 4)


def test_an_empty_draft_gives_the_targets_own_token() -> None:
    assert judged([], logits_choosing(7)) == (0, 7)


def test_equals_a_plain_loop_on_random_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(200, 6, 3, generator=generator)
    drafts = torch.randint(3, (200, 5), generator=generator)
    verdicts = accept_greedy(drafts, logits)
    for row in range(200):
        wanted = 0
        while wanted < 5 and drafts[row, wanted] == logits[row, wanted].argmax():
            wanted += 1
        assert verdicts.num_accepted[row] == wanted
        assert verdicts.bonus_token[row] == logits[row, wanted].argmax()


def random_law(seed: int, *, positions: int, zeros: int = 0) -> Tensor:
    """Give `[positions, 16]` probabilities, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    law = torch.rand(positions, VOCABULARY, generator=generator, dtype=torch.float64).pow(3)
    law[:, :zeros] = 0
    return law / law.sum(-1, keepdim=True)


def uniforms(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def committed(draft_ids: Tensor, verdicts: Verdicts) -> Tensor:
    """Give `[A, n + 1]` committed tokens, -1 behind the bonus token."""
    slots = torch.arange(draft_ids.shape[1] + 1)
    padded = torch.nn.functional.pad(draft_ids, (0, 1))
    kept = verdicts.num_accepted[:, None]
    tokens = torch.where(slots < kept, padded, verdicts.bonus_token[:, None])
    return torch.where(slots <= kept, tokens, -1)


def p_value(tokens: Tensor, law: Tensor) -> float:
    """Compare counts of tokens with a law `[16]` by chi-square, cells of 5 expected and more."""
    counts = torch.bincount(tokens, minlength=VOCABULARY).tolist()
    expected = (law * len(tokens)).tolist()
    observed_cells, expected_cells = [0.0], [0.0]
    for want, count in sorted(zip(expected, counts, strict=True), reverse=True):
        assert want > 0 or count == 0
        if expected_cells[-1] >= 5:
            observed_cells.append(0.0)
            expected_cells.append(0.0)
        observed_cells[-1] += count
        expected_cells[-1] += want
    if expected_cells[-1] < 5:  # what is left over joins its neighbour
        observed_cells[-2:] = [sum(observed_cells[-2:])]
        expected_cells[-2:] = [sum(expected_cells[-2:])]
    return float(stats.chisquare(observed_cells, expected_cells).pvalue)


Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Verdicts]


def one_hot_rule(drafts: Tensor, p: Tensor, q: Tensor, u: Tensor) -> Verdicts:
    return accept_argmax_proposal(drafts, p, u)


def sampled_rule(drafts: Tensor, p: Tensor, q: Tensor, u: Tensor) -> Verdicts:
    return accept_sampled_proposal(drafts, p, proposals=q, uniforms=u)


def biased_rule(drafts: Tensor, p: Tensor, q: Tensor, u: Tensor) -> Verdicts:
    """Draw the bonus token from p instead of the residual: the classical mistake."""
    verdicts = sampled_rule(drafts, p, q, u)
    rows = verdicts.num_accepted[:, None, None].expand(-1, 1, VOCABULARY)
    bonus = draw(p.gather(1, rows).squeeze(1), u[:, -1])
    return Verdicts(num_accepted=verdicts.num_accepted, bonus_token=bonus)


def p_values(rule: Rule, p_law: Tensor, q_law: Tensor) -> list[float]:
    """Run 20,000 blocks through draft and verify; compare the token of every place with p.

    The law at a place does not depend on earlier tokens here, so each place has to show it among
    all blocks that reach it.
    """
    q = q_law.expand(ROWS, -1, -1)
    drafts = draw(q, uniforms(1, ROWS, NUM_DRAFTS))
    p = p_law.expand(ROWS, -1, -1)
    tokens = committed(drafts, rule(drafts, p, q, uniforms(2, ROWS, NUM_DRAFTS + 1)))
    reached = [tokens[:, place][tokens[:, place] >= 0] for place in range(NUM_DRAFTS + 1)]
    return [p_value(t, law) for t, law in zip(reached, p_law, strict=True) if len(t) > 500]


P_LAW = random_law(3, positions=NUM_DRAFTS + 1)
PROPOSALS = {
    "another law": random_law(4, positions=NUM_DRAFTS),
    "p itself": P_LAW[:NUM_DRAFTS],
    "a law without some of p's tokens": random_law(5, positions=NUM_DRAFTS, zeros=9),
}


@pytest.mark.parametrize("name", PROPOSALS)
def test_sampled_proposals_leave_the_targets_law(name: str) -> None:
    assert min(p_values(sampled_rule, P_LAW, PROPOSALS[name])) > 1e-3


def test_a_target_that_cannot_say_what_is_proposed_still_speaks_its_own_law() -> None:
    p_law = random_law(6, positions=NUM_DRAFTS + 1, zeros=8)
    q_law = random_law(7, positions=NUM_DRAFTS).flip(-1)
    q_law[:, :8], q_law[:, 8:] = 1 / 8, 0  # disjoint supports: every draft is rejected
    assert min(p_values(sampled_rule, p_law, q_law)) > 1e-3


@pytest.mark.parametrize("favourite", [0, 7])
def test_one_hot_proposals_leave_the_targets_law(favourite: int) -> None:
    one_hot = torch.zeros(NUM_DRAFTS, VOCABULARY, dtype=torch.float64)
    one_hot[:, favourite] = 1
    assert min(p_values(one_hot_rule, P_LAW, one_hot)) > 1e-3
    assert min(p_values(sampled_rule, P_LAW, one_hot)) > 1e-3


def test_a_biased_rule_is_caught() -> None:
    assert min(p_values(biased_rule, P_LAW, PROPOSALS["another law"])) < 1e-6


def test_proposals_equal_to_the_target_are_always_kept() -> None:
    q = P_LAW[:NUM_DRAFTS].expand(ROWS, -1, -1)
    drafts = draw(q, uniforms(1, ROWS, NUM_DRAFTS))
    p = P_LAW.expand(ROWS, -1, -1)
    verdicts = sampled_rule(drafts, p, q, uniforms(2, ROWS, NUM_DRAFTS + 1))
    assert bool((verdicts.num_accepted == NUM_DRAFTS).all())


def test_a_rejection_by_rounding_alone_falls_back_to_the_targets_law() -> None:
    p = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]], dtype=torch.float64)
    u = torch.tensor([[1.0, 0.25]], dtype=torch.float64)  # rejects although p equals q
    verdicts = accept_sampled_proposal(torch.tensor([[1]]), p, proposals=p[:, :1], uniforms=u)
    assert (int(verdicts.num_accepted[0]), int(verdicts.bonus_token[0])) == (0, 0)


def test_draw_never_gives_a_token_of_probability_zero() -> None:
    law = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64)
    edges = torch.tensor([0.0, 0.3 - 1e-12, 0.3, 1 - 2**-53], dtype=torch.float64)
    assert draw(law.expand(4, -1), edges).tolist() == [1, 1, 3, 3]


def test_draw_follows_the_law() -> None:
    tokens = draw(P_LAW[0].expand(ROWS, -1), uniforms(8, ROWS))
    assert p_value(tokens, P_LAW[0]) > 1e-3
