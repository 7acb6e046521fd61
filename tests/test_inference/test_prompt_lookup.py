import numpy as np
import pytest

from dflash_inference.prompt_lookup import prompt_lookup, propose


def propose_list(text: list[int], num_tokens: int) -> list[int]:
    return propose(np.array(text), num_tokens).tolist()


def brute_force(text: list[int], num_tokens: int) -> list[int]:
    """Try every suffix, longest first, and every earlier place, latest first."""
    for length in range(len(text) - 1, 0, -1):
        for end in range(len(text) - 2, length - 2, -1):
            if text[end + 1 - length : end + 1] == text[-length:]:
                return text[end + 1 : end + 1 + num_tokens]
    return []


def test_longest_match_wins_over_a_more_recent_shorter_one() -> None:
    assert propose_list([1, 2, 3, 7, 7, 9, 3, 8, 1, 2, 3], 2) == [7, 7]


def test_most_recent_of_equal_matches_wins() -> None:
    assert propose_list([5, 1, 5, 2, 5], 1) == [2]


def test_no_match_proposes_nothing() -> None:
    assert propose_list([1, 2, 3], 4) == []
    assert propose_list([1], 4) == []


def test_a_match_near_the_end_proposes_only_what_is_there() -> None:
    assert propose_list([4, 4], 5) == [4]


def test_equals_brute_force_on_random_texts() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        text = generator.integers(0, 4, generator.integers(1, 14)).tolist()
        assert propose_list(text, 3) == brute_force(text, 3)


def test_steps_of_a_hand_example() -> None:
    # Prompt 1 2 3 4 5 | answer 1 2 3 9: prefill gives 1; step 0 copies 2 3 4, keeps 2 3, bonus 9.
    steps = prompt_lookup([1, 2, 3, 4, 5], [1, 2, 3, 9], block_size=4, max_length=20)
    assert [(s.start, s.width, s.num_accepted, s.committed) for s in steps] == [(5, 4, 2, 3)]


def test_a_step_without_a_match_commits_one_token() -> None:
    steps = prompt_lookup([1, 2], [3, 4, 5], block_size=8, max_length=20)
    assert [(s.start, s.width, s.num_accepted, s.committed) for s in steps] == [
        (2, 1, 0, 1),
        (3, 1, 0, 1),
    ]


def test_draft_is_narrowed_to_the_budget() -> None:
    steps = prompt_lookup([1, 2, 3, 4, 5], [1, 2, 3], block_size=8, max_length=8)
    assert [(s.start, s.width, s.num_accepted, s.committed) for s in steps] == [(5, 3, 2, 2)]


@pytest.mark.parametrize("block_size", [2, 5, 8])
def test_committed_tokens_add_up_to_the_answer(block_size: int) -> None:
    generator = np.random.default_rng(block_size)
    for _ in range(50):
        prompt = generator.integers(0, 5, 12).tolist()
        answer = generator.integers(0, 5, generator.integers(1, 20)).tolist()
        steps = prompt_lookup(prompt, answer, block_size=block_size, max_length=12 + 20)
        assert sum(step.committed for step in steps) == len(answer) - 1
        assert all(step.width <= block_size for step in steps)
        assert all(step.num_accepted < step.width for step in steps)
