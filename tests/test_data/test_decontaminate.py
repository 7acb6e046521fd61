import pytest

from dflash_data.decontaminate import EvaluationText, decontaminate
from dflash_data.drops import DropReason
from dflash_train.records.conversation import Conversation, Turn

LONG = " ".join(f"word{number}" for number in range(60))
SHORT = " ".join(f"term{number}" for number in range(20))
TINY = "Write a haiku, please"
LETTERS = "q w e r t y u i o p a s d f".split()


def asks(*user: str, split: str = "train", system: str = "Be brief.") -> Conversation:
    turns = [
        Turn(role="system", content=system),
        *(Turn(role="user", content=text) for text in user),
    ]
    return Conversation(id="sha256:1", source="openai", messages=turns, split=split)


TEXT = EvaluationText({"tasks": [asks(LONG), asks(TINY)], "chat": [asks(SHORT)]})


def run_of(text: str, size: int) -> str:
    return " ".join(["so", *text.split()[3 : 3 + size], "then", "what"])


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (LONG.upper().replace(" ", "\n"), "tasks"),
        (run_of(LONG, 13), "tasks"),
        (run_of(LONG, 12), None),
        (run_of(SHORT, 8), "chat"),
        (run_of(SHORT, 7), None),
        ("write  A haiku -- please!", "tasks"),
        ("Write a haiku, please, about rain", None),
    ],
)
def test_shared_text_is_found_by_the_rule_of_its_prompt_length(user: str, expected: str | None):
    assert TEXT.set_that_contains(asks("hello there", user)) == expected


def test_system_prompts_are_exempt_and_turns_are_not_joined():
    assert TEXT.set_that_contains(asks("hello", system=LONG)) is None
    words = LONG.split()
    assert TEXT.set_that_contains(asks(" ".join(words[:7]), " ".join(words[7:14]))) is None


def test_test_split_is_never_touched():
    records = [asks(LONG), asks(LONG, split="validation"), asks(LONG, split="test"), asks("fine")]
    sifted = decontaminate(records, TEXT, ("train", "validation"))
    assert [record.split for record in sifted.kept] == ["test", "train"]
    assert sifted.dropped == {DropReason.contaminated: 2}
    assert sifted.facts == {"tasks": 2}
