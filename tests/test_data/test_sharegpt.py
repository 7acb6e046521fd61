from typing import Any

import orjson
import pytest

from dflash_data.adapters.log_format import Line
from dflash_data.adapters.sharegpt import FORMAT
from dflash_data.drops import Drop
from dflash_train.records.conversation import Conversation, Turn

HUMAN: dict[str, Any] = {"from": "human", "value": "Name a noble gas."}
GPT: dict[str, Any] = {"from": "gpt", "value": "Argon."}
USER: dict[str, Any] = {"role": "user", "content": "Name a noble gas."}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "Argon."}


def read(*lines: Any) -> list[Any]:
    return list(FORMAT.read(Line(f"log:{n}", orjson.dumps(line)) for n, line in enumerate(lines)))


def kinds(line: Any) -> list[str]:
    return [call.reason.value if isinstance(call, Drop) else "kept" for call in read(line)]


def test_documented_lines_become_public_records_that_are_never_on_policy():
    brief = {"from": "system", "value": "Be brief."}
    turns, messages = read(
        {"id": "sg-9", "conversations": [brief, HUMAN, GPT]}, {"messages": [USER, ANSWER]}
    )
    assert turns.messages == [
        Turn(role="system", content="Be brief."),
        Turn(**USER),
        Turn(**ANSWER),
    ]
    assert messages.messages == [Turn(**USER), Turn(**ANSWER)]
    for call in (turns, messages):
        assert isinstance(call, Conversation)
        assert (call.origin, call.on_policy, call.model, call.ts) == ("public", False, None, None)
        assert (call.sampling, call.on_policy_reason) == ({}, "other_model")


def test_every_assistant_turn_is_a_record_with_the_messages_before_it():
    first, second, open_end = read({"id": "c", "conversations": [HUMAN, GPT, HUMAN, GPT, HUMAN]})
    assert [len(call.messages) for call in (first, second, open_end)] == [2, 4, 5]
    assert [call.turn for call in (first, second, open_end)] == [0, 1, 2]
    assert len({call.id for call in (first, second, open_end)}) == 3
    assert {call.session for call in (first, second, open_end)} == {"c"}
    assert (open_end.answer, open_end.on_policy_reason) == (None, "no_answer")


def test_records_of_a_conversation_share_no_message_object():
    first, second = read({"conversations": [HUMAN, GPT, HUMAN, GPT]})
    first.messages[0].content = "scrubbed"
    assert second.messages[0].content == HUMAN["value"]


def test_tool_turns_keep_their_role():
    asked = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "name": "find"}]}
    result = {"role": "function", "content": "row 2"}
    calls = read({"messages": [USER, asked, result, ANSWER]})
    assert [call.messages[-1].role for call in calls] == ["assistant", "assistant"]
    assert calls[1].messages[2].role == "tool"


def test_system_prompt_beside_the_turns_becomes_the_first_message():
    (call,) = read({"system": "Be brief.", "conversations": [HUMAN, GPT]})
    assert call.messages[0] == Turn(role="system", content="Be brief.")


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([HUMAN, {"from": "narrator", "value": "x"}], ["unknown_role"]),
        ([HUMAN, {"from": None, "value": "x"}], ["unknown_role"]),
        ([HUMAN, {"from": "gpt", "value": ""}, HUMAN, GPT], ["empty_output", "kept"]),
        ([GPT, HUMAN, GPT], ["content_missing", "kept"]),
        ([HUMAN, GPT, GPT], ["kept", "unstable_boundary"]),
        ([{"from": "tool", "value": "3"}, GPT], ["bad_tool_order"]),
        ([HUMAN, {"from": "gpt", "value": 3}], ["unparsable"]),
        ([], ["content_missing"]),
        ("no json", ["unparsable"]),
        ({"from": "human"}, ["unparsable"]),
    ],
)
def test_unusable_turns_are_dropped_for_their_reason(turns: Any, expected: list[str]):
    assert kinds({"conversations": turns}) == expected


def test_only_whole_conversations_are_recognised():
    assert FORMAT.recognises({"conversations": [HUMAN, GPT]})
    assert FORMAT.recognises({"messages": [USER, ANSWER], "source": "x"})
    assert not FORMAT.recognises({"messages": [USER], "response": {}})
