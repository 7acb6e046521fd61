from typing import Any

import pytest

from dflash_data.adapters.messages import (
    check_prompt,
    num_answers,
    read_message,
    read_messages,
    read_sampling,
    text_turn,
)
from dflash_data.drops import UnusableError
from dflash_train.records.conversation import Turn

USER: dict[str, Any] = {"role": "user", "content": "Is bay 4 free?"}


def test_fast_constructor_gives_what_the_slow_one_gives():
    fast, slow = text_turn("user", "Hi"), Turn(role="user", content="Hi")
    assert fast == slow
    assert vars(fast) == vars(slow)


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
