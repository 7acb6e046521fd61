from typing import Any

import orjson
import pytest

from dflash_data.adapters import opentelemetry
from dflash_data.adapters.log_format import Line
from dflash_data.adapters.opentelemetry import FORMAT
from dflash_data.drops import Drop
from dflash_train.records.conversation import Conversation, Turn


def text(value: Any) -> str:
    return orjson.dumps(value).decode()


SYSTEM = [{"type": "text", "content": "Stay polite."}]
INPUT = [{"role": "user", "parts": [{"type": "text", "content": "Is the lift fixed?"}]}]
OUTPUT = [
    {
        "role": "assistant",
        "parts": [{"type": "text", "content": "Not yet."}],
        "finish_reason": "stop",
    }
]
MESSAGES = [
    Turn(role="system", content="Stay polite."),
    Turn(role="user", content="Is the lift fixed?"),
    Turn(role="assistant", content="Not yet."),
]
ATTRIBUTES = {
    "gen_ai.operation.name": "chat",
    "gen_ai.request.model": "support-small",
    "gen_ai.request.temperature": 0.2,
    "gen_ai.request.max_tokens": 64,
    "gen_ai.conversation.id": "c-1",
    "gen_ai.system_instructions": text(SYSTEM),
    "gen_ai.input.messages": text(INPUT),
    "gen_ai.output.messages": text(OUTPUT),
    "gen_ai.usage.output_tokens": 4,
}


def typed(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    return {"arrayValue": {"values": [typed(one) for one in value]}}


def pairs(attributes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": typed(value)} for key, value in attributes.items()]


def span(attributes: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "traceId": "0af7",
        "spanId": "b9c7",
        "name": "chat support-small",
        "startTimeUnixNano": "1792000900000000000",
        "attributes": pairs(ATTRIBUTES if attributes is None else attributes),
    } | changes


def changed(**changes: Any) -> dict[str, Any]:
    """The span with attributes changed; `__` stands for a dot, None takes out."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return span({key: value for key, value in (ATTRIBUTES | named).items() if value is not None})


def read(*lines: Any) -> list[Any]:
    return list(FORMAT.read(Line(f"log:{n}", orjson.dumps(line)) for n, line in enumerate(lines)))


def only(*lines: Any) -> Conversation:
    (call,) = read(*lines)
    assert isinstance(call, Conversation), call
    return call


def kinds(*lines: Any) -> list[str]:
    return [call.reason.value if isinstance(call, Drop) else "kept" for call in read(*lines)]


def test_documented_span_maps_every_field():
    call = only(span())
    assert call.messages == MESSAGES
    assert (call.source, call.source_ref, call.session) == ("opentelemetry", "b9c7", "c-1")
    assert (call.model, call.finish_reason) == ("support-small", "stop")
    assert call.ts == "2026-10-14T18:01:40Z"
    assert call.sampling == {"temperature": 0.2, "max_tokens": 64}
    assert call.usage == {"completion_tokens": 4}


def test_nested_and_flattened_exports_read_the_same():
    nested = {"resourceSpans": [{"scopeSpans": [{"spans": [span()]}]}]}
    plain = span(attributes=None) | {"attributes": ATTRIBUTES}
    flat = {"span_id": "b9c7", "start_time": "2026-10-14T18:01:40Z"} | {
        f"attributes.{key}": value for key, value in ATTRIBUTES.items()
    }
    assert only(nested) == only(plain) == only(flat) == only(span())


def test_export_of_several_spans_gives_each_call_and_passes_other_spans_over():
    http = span({"http.request.method": "POST"}, spanId="1")
    tool = span({"gen_ai.operation.name": "execute_tool"}, spanId="2")
    scope = {"spans": [span(), http, tool, span(spanId="3"), "broken"]}
    lines = {"resource_spans": [{"scope_spans": [scope]}]}
    assert kinds(lines) == ["kept", "kept", "unparsable"]


def test_the_prompt_of_a_completion_api_is_marked_as_rendered():
    completion = {"gen_ai__operation__name": "text_completion"}
    assert only(changed(gen_ai__system_instructions=None, **completion)).has_rendered_prompt
    assert not only(changed(gen_ai__system_instructions=None)).has_rendered_prompt
    assert not only(changed(**completion)).has_rendered_prompt, "two messages are a chat"


def test_parts_become_content_reasoning_tool_calls_and_tool_results():
    asked = {
        "role": "assistant",
        "parts": [
            {"type": "reasoning", "content": "Look it up."},
            {"type": "tool_call", "id": "1", "name": "find", "arguments": {"lift": 2}},
        ],
    }
    results = {
        "role": "tool",
        "parts": [{"type": "tool_call_response", "id": "1", "response": {"fixed": False}}],
    }
    call = only(changed(gen_ai__input__messages=text([*INPUT, asked, results])))
    assert call.messages[2].reasoning == "Look it up."
    assert call.messages[2].tool_calls == [{"id": "1", "name": "find", "arguments": '{"lift":2}'}]
    assert call.messages[3] == Turn(role="tool", content='{"fixed":false}', tool_call_id="1")
    assert call.turn == 1


def test_tool_definitions_get_the_nested_form_of_requests():
    flat = [{"type": "function", "name": "find", "parameters": {"type": "object"}}]
    name = "gen_ai.tool.definitions"
    call = only(span({**ATTRIBUTES, name: text(flat)}))
    function = {"name": "find", "parameters": {"type": "object"}}
    assert call.tools == [{"type": "function", "function": function}]


def test_finish_reason_of_the_span_stands_in_for_that_of_the_message():
    output = [{key: OUTPUT[0][key] for key in ("role", "parts")}]
    attributes = {**ATTRIBUTES, "gen_ai.output.messages": text(output)}
    assert only(span(attributes)).finish_reason is None
    reasons = {"gen_ai.response.finish_reasons": ["length"]}
    assert only(span(attributes | reasons)).finish_reason == "length"


REQUEST_ONLY = {"gen_ai.request.model": "support-small"}
INDEXED = {
    **REQUEST_ONLY,
    "gen_ai.prompt.0.role": "system",
    "gen_ai.prompt.0.content": "Stay polite.",
    "gen_ai.prompt.1.role": "user",
    "gen_ai.prompt.1.content": "Is the lift fixed?",
    "gen_ai.completion.0.role": "assistant",
    "gen_ai.completion.0.content": "Not yet.",
    "gen_ai.completion.0.finish_reason": "stop",
}
OPEN_INFERENCE = {
    "openinference.span.kind": "LLM",
    "llm.model_name": "support-small",
    "llm.invocation_parameters": '{"temperature": 0.2}',
    "llm.input_messages.0.message.role": "system",
    "llm.input_messages.0.message.content": "Stay polite.",
    "llm.input_messages.1.message.role": "user",
    "llm.input_messages.1.message.contents.0.message_content.type": "text",
    "llm.input_messages.1.message.contents.0.message_content.text": "Is the lift fixed?",
    "llm.output_messages.0.message.role": "assistant",
    "llm.output_messages.0.message.content": "Not yet.",
    "llm.token_count.completion": 4,
}
EVENTS = [
    {"name": "gen_ai.system.message", "attributes": pairs({"content": "Stay polite."})},
    {
        "name": "gen_ai.user.message",
        "attributes": {"gen_ai.event.content": text({"content": "Is the lift fixed?"})},
    },
    {
        "name": "gen_ai.choice",
        "attributes": pairs(
            {"index": 0, "finish_reason": "stop", "message": text({"content": "Not yet."})}
        ),
    },
]
CONTENT_EVENTS = [
    {
        "name": "gen_ai.content.prompt",
        "attributes": {
            "gen_ai.prompt": text(
                [{"role": turn.role, "content": turn.content} for turn in MESSAGES[:2]]
            )
        },
    },
    {
        "name": "gen_ai.content.completion",
        "attributes": {"gen_ai.completion": text([{"role": "assistant", "content": "Not yet."}])},
    },
]


@pytest.mark.parametrize(
    "line",
    [
        span(INDEXED),
        span(OPEN_INFERENCE),
        span(REQUEST_ONLY, events=EVENTS),
        span(REQUEST_ONLY, events=CONTENT_EVENTS),
    ],
)
def test_older_dialects_give_the_same_messages(line: dict[str, Any]):
    call = only(line)
    assert (call.messages, call.model) == (MESSAGES, "support-small")


def test_indexed_tool_calls_are_read():
    asked = {
        "gen_ai.completion.0.content": "",
        "gen_ai.completion.0.tool_calls.0.id": "1",
        "gen_ai.completion.0.tool_calls.0.name": "find",
        "gen_ai.completion.0.tool_calls.0.arguments": '{"lift":2}',
    }
    calls = [{"id": "1", "name": "find", "arguments": '{"lift":2}'}]
    assert only(span(INDEXED | asked)).messages[-1].tool_calls == calls


def log_record(event: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "timeUnixNano": "1792000900000000000",
        "spanId": "b9c7",
        "eventName": event["name"],
        "attributes": event["attributes"],
    } | changes


def test_message_events_in_lines_of_their_own_join_the_span():
    call = only(*map(log_record, EVENTS), span(REQUEST_ONLY))
    assert (call.messages, call.model) == (MESSAGES, "support-small")
    records = {"resourceLogs": [{"scopeLogs": [{"logRecords": list(map(log_record, EVENTS))}]}]}
    assert only(records).messages == MESSAGES


def test_waiting_events_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(opentelemetry, "MAX_WAITING", 2)
    lines = [log_record(EVENTS[1], spanId=f"s{number}") for number in range(4)]
    first = next(FORMAT.read(Line("log", orjson.dumps(line)) for line in lines))
    assert isinstance(first, Conversation)
    assert first.source_ref == "s0"


@pytest.mark.parametrize("kind", ["blob", "file", "uri"])
def test_parts_that_are_no_text_are_dropped(kind: str):
    parts = [{"role": "user", "parts": [{"type": kind, "content": "x"}]}]
    assert kinds(changed(gen_ai__input__messages=text(parts))) == ["non_text"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (span({"gen_ai.operation.name": "chat"}), "content_missing"),
        (changed(gen_ai__input__messages=None), "content_missing"),
        (span(status={"code": 2}), "not_success"),
        (changed(error__type="timeout"), "not_success"),
        (changed(gen_ai__output__messages=text([OUTPUT[0] | {"parts": []}])), "empty_output"),
        (
            changed(gen_ai__output__messages=text([OUTPUT[0] | {"finish_reason": "error"}])),
            "not_success",
        ),
        (changed(gen_ai__output__messages=text(INPUT)), "unknown_role"),
        (changed(gen_ai__input__messages="[{"), "unparsable"),
        (span(attributes=None) | {"attributes": "x"}, "unparsable"),
        (log_record(EVENTS[0], spanId=None), "content_missing"),
    ],
)
def test_unusable_span_is_dropped_for_its_reason(line: dict[str, Any], reason: str):
    assert kinds(line) == [reason]


def test_missing_output_is_kept_for_regeneration_and_further_ones_are_drops():
    assert only(changed(gen_ai__output__messages=None)).on_policy_reason == "no_answer"
    assert kinds(changed(gen_ai__output__messages=text(OUTPUT * 2))) == ["kept", "extra_choice"]


def test_only_telemetry_is_recognised():
    assert FORMAT.recognises(span())
    assert FORMAT.recognises({"resourceSpans": []})
    assert FORMAT.recognises({"gen_ai.request.model": "m"})
    assert not FORMAT.recognises({"trace_id": "t", "messages": []})
