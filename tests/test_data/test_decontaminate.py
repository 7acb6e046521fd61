import random

import pytest

from dflash_data.ingest.decontaminate import EvaluationText, find_contaminated, user_turns
from dflash_train.records.conversation import Conversation, Turn

LONG = " ".join(f"word{number}" for number in range(60))
SHORT = " ".join(f"term{number}" for number in range(20))
TINY = "Write a haiku, please"


def asks(*user: str, system: str = "Be brief.") -> Conversation:
    turns = [
        Turn(role="system", content=system),
        *(Turn(role="user", content=text) for text in user),
    ]
    return Conversation(id="sha256:1", source="openai", messages=turns)


TEXT = EvaluationText({"tasks": [asks(LONG), asks(TINY)], "chat": [asks(SHORT)]})


def found(*records: Conversation) -> list[str | None]:
    numbers = find_contaminated(list(records), TEXT)
    return [TEXT.names[number] if number >= 0 else None for number in numbers]


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
        ("\N{FULLWIDTH LATIN CAPITAL LETTER W}rite a haiku please", "tasks"),
        ("", None),
        ("???", None),
    ],
)
def test_shared_text_is_found_by_the_rule_of_its_prompt_length(user: str, expected: str | None):
    assert found(asks("hello there", user)) == [expected]


def test_system_prompts_are_exempt_and_turns_are_not_joined():
    words = LONG.split()
    apart = asks(" ".join(words[:7]), " ".join(words[7:14]))
    assert found(asks("hello", system=LONG), apart) == [None, None]


def test_hashed_runs_find_what_a_search_word_by_word_finds():
    random.seed(3)
    words = [f"w{number}" for number in range(12)]
    prompts = [" ".join(random.choices(words, k=random.randint(3, 60))) for _ in range(30)]
    texts = [" ".join(random.choices(words, k=random.randint(1, 90))) for _ in range(200)]
    for _ in range(100):
        prompt, start = random.choice(prompts).split(), random.randint(0, 20)
        texts.append(f"{random.choice(texts)} {' '.join(prompt[start : start + 14])} {texts[0]}")

    def runs(text: str, size: int) -> set[str]:
        split = text.split()
        return {" ".join(split[i : i + size]) for i in range(len(split) - size + 1)}

    def shares(text: str) -> bool:
        return any(
            text == prompt or runs(text, size) & runs(prompt, size)
            for prompt in prompts
            for size in [13 if len(prompt.split()) >= 40 else 8]
        )

    evaluation = EvaluationText({"set": [asks(prompt) for prompt in prompts]})
    expected = [shares(text) for text in texts]
    assert [number >= 0 for number in evaluation.sets_that_contain(texts)] == expected
    assert 20 < sum(expected) < 290


def test_user_turns_leave_out_other_roles_and_answers():
    record = asks("one", "two")
    record.messages.append(Turn(role="assistant", content="an answer"))
    assert user_turns(record) == ["one", "two"]
