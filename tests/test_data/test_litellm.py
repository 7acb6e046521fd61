from typing import Any

import orjson
import pytest

from dflash_data.adapters.litellm import FORMAT
from dflash_data.adapters.log_format import Line
from dflash_data.drops import Drop
from dflash_train.records.conversation import Conversation, Turn

USER: dict[str, Any] = {"role": "user", "content": "Which port does the sync use?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "It uses port 8443."}


def payload(**changes: Any) -> dict[str, Any]:
    """The documented payload with some keys changed; `...` takes a key out."""
    choice = {"index": 0, "finish_reason": "stop", "message": ANSWER}
    logged = {
        "id": "chatcmpl-b2",
        "trace_id": "tr-55",
        "call_type": "acompletion",
        "status": "success",
        "cache_hit": False,
        "model": "support-small",
        "model_group": "helpdesk",
        "startTime": 1792000801.2,
        "endTime": 1792000802.0,
        "prompt_tokens": 17,
        "completion_tokens": 6,
        "messages": [USER],
        "response": {"id": "chatcmpl-b2", "choices": [choice]},
        "model_parameters": {"temperature": 0.0},
        "metadata": {"user_api_key_team_id": "team-west"},
        "end_user": "u-81",
    } | changes
    return {key: value for key, value in logged.items() if value is not ...}


def read(*lines: Any) -> list[Any]:
    return list(FORMAT.read(Line(f"log:{n}", orjson.dumps(line)) for n, line in enumerate(lines)))


def only(line: Any) -> Conversation:
    (call,) = read(line)
    assert isinstance(call, Conversation), call
    return call


def test_documented_payload_maps_every_field():
    call = only(payload())
    assert call.messages == [Turn(**USER), Turn(**ANSWER)]
    assert (call.source, call.source_ref) == ("litellm", "chatcmpl-b2")
    assert (call.session, call.tenant) == ("tr-55", "team-west")
    assert (call.model, call.finish_reason, call.turn) == ("support-small", "stop", 0)
    assert call.ts == "2026-10-14T18:00:01.200000Z"
    assert call.sampling == {"temperature": 0.0}
    assert call.usage == {"prompt_tokens": 17, "completion_tokens": 6}
    assert (call.on_policy, call.on_policy_reason) == (False, "other_model")


def test_end_user_is_the_tenant_where_no_team_is_logged():
    assert only(payload(metadata={})).tenant == "u-81"


def test_strings_of_json_and_camel_case_read_the_same():
    text = {
        key: orjson.dumps(payload()[key]).decode()
        for key in ("messages", "response", "model_parameters", "metadata")
    }
    camel = {"trace_id": ..., "traceId": "tr-55", "end_user": ..., "endUser": "u-81"}
    assert only(payload(**text, **camel)) == only(payload())


def test_earlier_turns_tools_and_further_settings_are_kept():
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    parameters = {
        "max_tokens": 64,
        "tools": tools,
        "tool_choice": "auto",
        "extra_body": {"top_k": 20, "chat_template_kwargs": {"enable_thinking": False}},
    }
    call = only(payload(messages=[USER, ANSWER, USER], model_parameters=parameters))
    assert (call.turn, call.tools) == (1, tools)
    assert call.sampling == {
        "max_tokens": 64,
        "tool_choice": "auto",
        "top_k": 20,
        "enable_thinking": False,
    }


@pytest.mark.parametrize("response", [None, "", {}])
def test_call_without_response_is_kept_for_regeneration(response: Any):
    call = only(payload(response=response))
    assert (call.answer, call.on_policy_reason) == (None, "no_answer")


@pytest.mark.parametrize(
    ("mode", "status", "edited"),
    [
        ("post_call", "guardrail_intervened", True),
        ("pre_call", "guardrail_intervened", None),
        ("post_call", "success", None),
    ],
)
def test_guardrail_that_steps_in_after_the_answer_marks_it_edited(
    mode: str, status: str, edited: bool | None
):
    run = {"guardrail_mode": mode, "guardrail_status": status}
    assert only(payload(guardrail_information=[run])).sampling.get("edited") is edited


REDACTED = "redacted-by-litellm"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status": "failure"}, "not_success"),
        ({"cache_hit": True}, "cache_hit"),
        ({"cache_hit": "True"}, "cache_hit"),
        ({"call_type": "aembedding"}, "content_missing"),
        ({"call_type": "atext_completion"}, "content_missing"),
        ({"messages": REDACTED}, "content_missing"),
        ({"messages": [{"role": "user", "content": REDACTED}]}, "content_missing"),
        ({"response": REDACTED}, "content_missing"),
        ({"response": {"text": REDACTED}}, "content_missing"),
        ({"response": {"choices": [{"message": {"content": REDACTED}}]}}, "content_missing"),
        ({"response": {"choices": [{"delta": {"content": "It"}}]}}, "stream_fragment"),
        ({"response": {"object": "chat.completion.chunk"}}, "stream_fragment"),
        ({"response": {"error": {"code": 429}}}, "not_success"),
        ({"response": {"choices": [{"message": {"content": ""}}]}}, "empty_output"),
        ({"messages": ...}, "content_missing"),
        ({"metadata": "west"}, "unparsable"),
    ],
)
def test_unusable_payload_is_dropped_for_its_reason(changes: dict[str, Any], reason: str):
    (call,) = read(payload(**changes))
    assert isinstance(call, Drop)
    assert call.reason.value == reason


def test_only_payloads_are_recognised():
    assert FORMAT.recognises(payload())
    assert not FORMAT.recognises({"request": {"messages": [USER]}, "response": None})
    assert not FORMAT.recognises({"messages": [USER, ANSWER]})
