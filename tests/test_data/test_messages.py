from typing import Any

import pytest

from dflash_data.adapters.messages import (
    check_prompt,
    num_answers,
    read_message,
    read_messages,
    read_sampling,
)
from dflash_data.drops import UnusableError
from dflash_data.ingest.on_policy import judge
from dflash_train.config import DataConfig
from dflash_train.records.conversation import Conversation, Turn

USER: dict[str, Any] = {"role": "user", "content": "Is bay 4 free?"}


def test_message_with_empty_keys_reads_like_one_without():
    empty = {"tool_calls": None, "name": None, "refusal": None}
    assert read_message(USER | empty) == read_message(USER) == Turn(**USER)


def test_parts_of_text_are_joined_and_other_parts_refused():
    parts = [{"type": "text", "text": "Is bay "}, {"type": "input_text", "text": "4 free?"}]
    assert read_message({"role": "user", "content": parts}) == Turn(**USER)
    with pytest.raises(UnusableError, match="non_text"):
        read_message({"role": "user", "content": [*parts, {"type": "image_url"}]})


def test_tool_results_stand_only_in_the_run_after_the_turn_that_asked():
    asked = Turn(role="assistant", tool_calls=[{"id": "1", "name": "find", "arguments": "{}"}])
    result, user = Turn(role="tool", content="row 2"), Turn(**USER)
    check_prompt([user, asked, result, result])
    for turns in ([user, result], [user, asked, user, result]):
        with pytest.raises(UnusableError, match="bad_tool_order"):
            check_prompt(turns)
    assert num_answers([user, asked, result]) == 1


def test_prompt_needs_someone_who_asks_and_no_answer_at_its_end():
    with pytest.raises(UnusableError, match="content_missing"):
        read_messages([{"role": "system", "content": "Be brief."}])
    with pytest.raises(UnusableError, match="unstable_boundary"):
        read_messages([USER, {"role": "assistant", "content": "Yes"}])


def test_settings_are_found_under_every_name_and_level():
    request = {
        "maxTokens": 5,
        "max_new_tokens": 7,
        "top_p": None,
        "toolChoice": "required",
        "extra_body": {"top_k": 2, "chat_template_kwargs": {"enable_thinking": True}},
        "chat_template_kwargs": '{"enable_thinking": false, "temperature": 9}',
        "unknown": 1,
    }
    assert read_sampling(request) == {
        "max_tokens": 5,
        "tool_choice": "required",
        "top_k": 2,
        "enable_thinking": False,
    }


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("structured_outputs", {"json": {"type": "object"}}),
        ("guided_json", {}),
        ("guided_regex", "[0-9]+"),
        ("guided_choice", ["yes", "no"]),
        ("guided_grammar", "root ::= digit"),
        ("guidedJson", "{}"),
        ("ebnf", "root ::= digit"),
    ],
)
def test_answers_under_a_grammar_are_constrained_by_whichever_name(
    name: str, value: Any, extra: bool
):
    grammar = {name: value, "response_format": {"type": "text"}}
    request = {"extra_body": grammar} if extra else grammar
    assert read_sampling(request) == {"response_format": {"type": name}}
    record = Conversation(
        id="sha256:1", source="openai", model="small", sampling=read_sampling(request),
        messages=[Turn(**USER), Turn(role="assistant", content="4")],
    )  # fmt: skip
    judge(record, DataConfig(target_aliases=["small"], trust_unknown_sampling=True))
    assert (record.on_policy, record.on_policy_reason) == (False, "constrained")


def test_a_grammar_that_is_switched_off_is_none():
    off = {"guided_json": None, "guided_choice": False, "guided_whitespace_pattern": " "}
    assert read_sampling(off) == {}
