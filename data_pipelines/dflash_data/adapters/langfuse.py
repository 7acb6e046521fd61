"""Langfuse's blob export: `observations_v2`, legacy `observations`, and interface exports.

    {"id": ..., "type": "GENERATION", "start_time": "2026-10-14 08:41:10.000000",
     "provided_model_name": ..., "model_parameters": "{...}", "input": "[...]",
     "output": "{...}", "usage_details": {...}, "level": "DEFAULT", "session_id": ...}

Only generations are calls; spans and events of a trace are passed over. `input` and `output`
are what the application handed in, so each has several shapes, as JSON or JSON in a string.
A text that merely looks like JSON, because the target was asked for JSON, stays text.
"""

from typing import Any

from dflash_data.adapters.completion import add_answer, read_usage, with_answer
from dflash_data.adapters.fields import (
    find,
    find_object,
    find_text,
    parse_json,
    record_id,
    utc_timestamp,
)
from dflash_data.adapters.log_format import LogFormat, per_line
from dflash_data.adapters.messages import num_answers, read_messages, read_sampling, read_tools
from dflash_data.drops import Call, Drop, DropReason, UnusableError
from dflash_train.records.conversation import ROLES, Conversation

SOURCE = "langfuse"
GENERATION = "GENERATION"
CUT_MARKS = ('"role"', '"messages"')
"""What a string begins with if it held messages once, even when its end is missing."""


def adapt(observation: dict[str, Any], place: str) -> list[Call]:
    """Give the call of one observation, nothing if it is no generation.

    Args:
        observation: One exported object.
        place: Where it stands; identifies the call if the export has no id.

    Raises:
        UnusableError: It is a generation without a usable call.
    """
    kind = observation.get("type")
    if kind != GENERATION:
        if isinstance(kind, str):
            return []
        raise UnusableError(DropReason.unparsable)
    if observation.get("level") == "ERROR":
        raise UnusableError(DropReason.not_success)
    request = _read_input(observation.get("input"))
    parameters = find_object(observation, "model_parameters") or {}
    messages = read_messages(request.get("messages"))
    turn = num_answers(messages)
    source_ref = find_text(observation, "id")
    call = Conversation(
        id=record_id(SOURCE, source_ref or place, turn),
        source=SOURCE,
        source_ref=source_ref,
        ts=utc_timestamp(find(observation, "start_time")),
        model=find_text(observation, "provided_model_name", "model"),
        messages=messages,
        tools=read_tools(request) or read_tools(parameters),
        sampling=read_sampling(parameters),
        usage=read_usage(find_object(observation, "usage_details", "usage") or {}),
        session=find_text(observation, "session_id"),
        tenant=find_text(observation, "user_id"),
        turn=turn,
        on_policy_reason="no_answer",
    )
    return _with_output(call, observation.get("output"))


def _read_input(value: Any) -> dict[str, Any]:
    """Give the request: an object with messages, from any shape in which `input` comes."""
    parsed = _parse_if_json(value)
    if isinstance(parsed, str) and parsed:
        return {"messages": [{"role": "user", "content": parsed}]}
    if isinstance(parsed, list):
        return {"messages": parsed}
    if isinstance(parsed, dict) and "role" in parsed:
        return {"messages": [parsed]}
    if isinstance(parsed, dict):
        return parsed
    raise UnusableError(DropReason.content_missing)


def _with_output(call: Conversation, value: Any) -> list[Call]:
    if value is None:
        return [call]
    parsed = _parse_if_json(value)
    further: list[Call] = []
    if isinstance(parsed, list) and parsed and all(isinstance(one, dict) for one in parsed):
        further = [Drop(DropReason.extra_choice)] * (len(parsed) - 1)
        parsed = parsed[0]
    if isinstance(parsed, dict) and "choices" in parsed:
        return with_answer(call, parsed)
    if isinstance(parsed, dict) and (_is_message(parsed) or not isinstance(value, str)):
        add_answer(call, parsed, find(parsed, "finish_reason"))
        return [call, *further]
    if isinstance(value, str):
        add_answer(call, {"content": value}, None)
        return [call]
    raise UnusableError(DropReason.unparsable)


def _parse_if_json(value: Any) -> Any:
    """Parse a string that holds a JSON object or list; any other string stays as it is.

    Raises:
        UnusableError: It held messages, but is cut.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    try:
        return parse_json(value)
    except UnusableError:
        if any(mark in value[:100] for mark in CUT_MARKS):
            raise
        return value


def _is_message(value: dict[str, Any]) -> bool:
    return value.get("role") in ROLES and ("content" in value or "tool_calls" in value)


def recognises(line: dict[str, Any]) -> bool:
    """Tell whether a line is an observation of a trace."""
    return (
        isinstance(line.get("type"), str)
        and find(line, "trace_id") is not None
        and find(line, "start_time") is not None
    )


FORMAT = LogFormat(name=SOURCE, read=per_line(adapt), recognises=recognises)
