import torch

from dflash_inference.verify import accept_greedy


def logits_choosing(*token_ids: int) -> torch.Tensor:
    """Give `[m, 10]` logits whose argmax per row is the given token."""
    return torch.nn.functional.one_hot(torch.tensor(token_ids), 10).float()


def test_everything_is_kept_when_the_draft_is_what_the_target_says() -> None:
    verdict = accept_greedy(torch.tensor([3, 4, 5]), logits_choosing(3, 4, 5, 6))
    assert (verdict.num_accepted, verdict.bonus_token) == (3, 6)


def test_bonus_token_replaces_a_wrong_first_draft() -> None:
    verdict = accept_greedy(torch.tensor([9, 4, 5]), logits_choosing(3, 4, 5, 6))
    assert (verdict.num_accepted, verdict.bonus_token) == (0, 3)


def test_nothing_behind_the_first_mismatch_counts() -> None:
    verdict = accept_greedy(torch.tensor([3, 9, 5]), logits_choosing(3, 4, 5, 6))
    assert (verdict.num_accepted, verdict.bonus_token) == (1, 4)


def test_an_empty_draft_gives_the_targets_own_token() -> None:
    verdict = accept_greedy(torch.tensor([], dtype=torch.int64), logits_choosing(7))
    assert (verdict.num_accepted, verdict.bonus_token) == (0, 7)


def test_equals_a_plain_loop_on_random_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        logits = torch.rand(6, 3, generator=generator)
        draft = torch.randint(3, (5,), generator=generator)
        wanted = 0
        while wanted < 5 and draft[wanted] == logits[wanted].argmax():
            wanted += 1
        verdict = accept_greedy(draft, logits)
        assert (verdict.num_accepted, verdict.bonus_token) == (wanted, logits[wanted].argmax())
