"""The texts of a GenAI span in each dialect: prompt, answers and tool definitions.

- messages with typed parts in `gen_ai.input.messages`, `gen_ai.output.messages` and
  `gen_ai.system_instructions`, on the span or on its one details event;
- one event per message: `gen_ai.user.message`, ..., `gen_ai.choice`;
- indexed attributes: `gen_ai.prompt.0.content`, `gen_ai.completion.0.content`;
- OpenInference: `llm.input_messages.0.message.content`, `llm.output_messages...`.
"""

from typing import Any, Literal

from msgspec import DecodeError, Struct
from msgspec.json import Decoder

from dflash_data.adapters.completion import read_finish_reason
from dflash_data.adapters.fields import as_text, find, find_text, parse_json, storable
from dflash_data.adapters.messages import (
    check_prompt,
    read_message,
    read_tool_calls,
)
from dflash_data.adapters.opentelemetry_attributes import (
    read_attributes,
    read_indexed,
    read_value,
)
from dflash_data.drops import DropReason, UnusableError
from dflash_train.records.conversation import ROLES, Turn

ROLE_OF_EVENT = {
    "gen_ai.system.message": "system",
    "gen_ai.user.message": "user",
    "gen_ai.assistant.message": "assistant",
    "gen_ai.tool.message": "tool",
}
CHOICE_EVENT = "gen_ai.choice"
MESSAGE_EVENTS = frozenset([*ROLE_OF_EVENT, CHOICE_EVENT])
DETAIL_EVENTS = (
    "gen_ai.client.inference.operation.details",
    "gen_ai.content.prompt",
    "gen_ai.content.completion",
)
"""Events whose attributes are those of the span in other dialects."""
OPEN_INFERENCE = {
    "message.role": "role",
    "message.content": "content",
    "message.name": "name",
    "message.tool_call_id": "tool_call_id",
}
Answer = tuple[Turn, str | None]
"""An assistant turn and why it ended."""


class TextPart(Struct, tag_field="type", tag="text"):
    """The part that nearly every message is made of."""

    content: str


class TextMessage(Struct):
    """A message with nothing but one text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    parts: tuple[TextPart]


TEXT_MESSAGES = Decoder(list[TextMessage])


def event_name(event: dict[str, Any]) -> str | None:
    """Give the name of an event of a span or of a log record."""
    name = find(event, "event_name", "name", "event.name")
    if isinstance(name, str) and name.startswith("gen_ai."):
        return name
    attributes = event.get("attributes")
    name = attributes.get("event.name") if isinstance(attributes, dict) else None
    if isinstance(attributes, list):
        name = next(
            (
                read_value(pair.get("value"))
                for pair in attributes
                if isinstance(pair, dict) and pair.get("key") == "event.name"
            ),
            None,
        )
    return name if isinstance(name, str) else None


def with_event_attributes(attributes: dict[str, Any], span: dict[str, Any]) -> dict[str, Any]:
    """Give the attributes with those of the details events added; the span's own win."""
    for event in _events(span):
        if event_name(event) in DETAIL_EVENTS:
            attributes = read_attributes(event) | attributes
    return attributes


def read_prompt(span: dict[str, Any], attributes: dict[str, Any]) -> list[Turn]:
    """Give the messages before the answer.

    Raises:
        UnusableError: No content was captured, or it is not usable.
    """
    turns = _text_turns(attributes.get("gen_ai.input.messages"))
    if turns is None:
        messages = _prompt_messages(span, attributes)
        turns = [turn for message in messages for turn in _turns(message)]
    system = _system_instructions(attributes.get("gen_ai.system_instructions"))
    if system and (not turns or turns[0].content != system):
        turns.insert(0, Turn(role="system", content=system))
    check_prompt(turns)
    return turns


def read_answers(span: dict[str, Any], attributes: dict[str, Any]) -> list[Answer]:
    """Give what the target answered, one for each choice; empty if it was not captured.

    Raises:
        UnusableError: An answer failed or is not usable.
    """
    reasons = attributes.get("gen_ai.response.finish_reasons")
    reasons = parse_json(reasons) if isinstance(reasons, str) and reasons[:1] == "[" else reasons
    reasons = reasons if isinstance(reasons, list) else [reasons]
    answers: list[Answer] = []
    for number, message in enumerate(_answer_messages(span, attributes)):
        if type(message) is not dict:
            raise UnusableError(DropReason.unparsable)
        logged = find(message, "finish_reason")
        fallback = reasons[number] if number < len(reasons) else None
        finish_reason = read_finish_reason(fallback if logged in (None, "") else logged)
        turns = _turns(message if message.get("role") else {**message, "role": "assistant"})
        if len(turns) != 1 or turns[0].role != "assistant":
            raise UnusableError(DropReason.unknown_role)
        answers.append((turns[0], finish_reason))
    return answers


def read_tool_definitions(attributes: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Give the tools in the nested form that requests have; None if there are none.

    Raises:
        UnusableError: They are no list of objects.
    """
    tools = _json_list(attributes.get("gen_ai.tool.definitions"))
    if not tools and "llm.model_name" in attributes:
        schemas = read_indexed(attributes, "llm.tools")
        tools = [_parsed(schema.get("tool.json_schema")) for schema in schemas]
    if not tools:
        return None
    if not all(isinstance(tool, dict) for tool in tools):
        raise UnusableError(DropReason.unparsable)
    return [tool if "function" in tool else _nested(tool) for tool in storable(tools)]


def _prompt_messages(span: dict[str, Any], attributes: dict[str, Any]) -> list[Any]:
    for name in ("gen_ai.input.messages", "gen_ai.prompt"):
        if attributes.get(name) is not None:
            return _json_list(attributes[name])
    return (
        [_event_message(event) for event in _events(span) if event_name(event) in ROLE_OF_EVENT]
        or [_indexed_message(one) for one in read_indexed(attributes, "gen_ai.prompt")]
        or [_open_inference(one) for one in read_indexed(attributes, "llm.input_messages")]
    )


def _answer_messages(span: dict[str, Any], attributes: dict[str, Any]) -> list[Any]:
    for name in ("gen_ai.output.messages", "gen_ai.completion"):
        if attributes.get(name) is not None:
            return _json_list(attributes[name])
    return (
        [_event_message(event) for event in _events(span) if event_name(event) == CHOICE_EVENT]
        or [_indexed_message(one) for one in read_indexed(attributes, "gen_ai.completion")]
        or [_open_inference(one) for one in read_indexed(attributes, "llm.output_messages")]
    )


def _text_turns(messages: Any) -> list[Turn] | None:
    """Read JSON of messages with one text each, at half the cost; None if it is anything else."""
    if not isinstance(messages, str):
        return None
    try:
        read = TEXT_MESSAGES.decode(messages)
    except DecodeError:
        return None
    return [Turn(role=message.role, content=message.parts[0].content) for message in read]


def _turns(message: Any) -> list[Turn]:
    """Read a message with typed parts, or one with plain content."""
    if type(message) is not dict:
        raise UnusableError(DropReason.unparsable)
    parts, role = message.get("parts"), message.get("role")
    if parts is None:
        return [read_message(message)]
    if not isinstance(role, str) or role not in ROLES:
        raise UnusableError(DropReason.unknown_role)
    if type(parts) is not list:
        raise UnusableError(DropReason.unparsable)
    if len(parts) == 1:  # nearly always
        part = parts[0]
        if type(part) is dict and part.get("type") == "text":
            return [Turn(role=role, content=_text(part.get("content")))]
    turn = Turn(role=role)
    results: list[Turn] = []
    for part in parts:
        _add_part(part, turn, results)
    if turn.content is None and turn.tool_calls is None and (results or role == "tool"):
        return results
    if turn.content is None and role != "assistant":
        raise UnusableError(DropReason.content_missing)
    return [*results, turn]


def _add_part(part: Any, turn: Turn, results: list[Turn]) -> None:
    kind = part.get("type") if type(part) is dict else None
    if kind == "text":
        turn.content = (turn.content or "") + _text(part.get("content"))
    elif kind in ("reasoning", "thinking"):
        turn.reasoning = (turn.reasoning or "") + _text(part.get("content"))
    elif kind == "tool_call":
        turn.tool_calls = [*(turn.tool_calls or []), *(read_tool_calls([part]) or [])]
    elif kind == "tool_call_response":
        result = find(part, "response", "result", "content")
        results.append(
            Turn(role="tool", content=as_text(result), tool_call_id=find_text(part, "id"))
        )
    elif isinstance(kind, str):
        raise UnusableError(DropReason.non_text)
    else:
        raise UnusableError(DropReason.unparsable)


def _system_instructions(value: Any) -> str | None:
    """Give the system text: parts, JSON in a string, or the plain text itself."""
    if value is None:
        return None
    if isinstance(value, str) and value[:1] != "[":
        return value or None
    turn = Turn(role="system")
    for part in _json_list(value):
        _add_part(part, turn, [])
    return turn.content


def _event_message(event: dict[str, Any]) -> dict[str, Any]:
    """Give the message of an event: its body, a JSON attribute, or its own attributes."""
    attributes = read_attributes(event)
    body = event.get("body")
    body = read_value(body) if body is not None else attributes.get("gen_ai.event.content")
    fields = _parsed(body) if body is not None else attributes
    if not isinstance(fields, dict):
        raise UnusableError(DropReason.unparsable)
    inner = _parsed(fields.get("message"))
    message = {**fields, **(inner if isinstance(inner, dict) else {})}
    if isinstance(inner, str):
        message["content"] = inner
    message["tool_calls"] = _parsed(message.get("tool_calls"))
    name = event_name(event)
    role = "assistant" if name == CHOICE_EVENT else ROLE_OF_EVENT.get(name or "")
    return {**message, "role": message.get("role") or role, "name": None}


def _indexed_message(fields: dict[str, Any]) -> dict[str, Any]:
    calls = read_indexed(fields, "tool_calls")
    content = fields.get("content")
    if isinstance(content, str) and content.startswith('[{"type"'):
        content = parse_json(content)
    return {**fields, "content": content, "tool_calls": calls}


def _open_inference(fields: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {
        name: fields[key] for key, name in OPEN_INFERENCE.items() if key in fields
    }
    parts = read_indexed(fields, "message.contents")
    if parts and "content" not in message:
        message["content"] = [
            {"type": part.get("message_content.type"), "text": part.get("message_content.text")}
            for part in parts
        ]
    message["tool_calls"] = [
        {
            "id": call.get("tool_call.id"),
            "name": call.get("tool_call.function.name"),
            "arguments": call.get("tool_call.function.arguments"),
        }
        for call in read_indexed(fields, "message.tool_calls")
    ]
    return message


def _nested(tool: dict[str, Any]) -> dict[str, Any]:
    function = {key: value for key, value in tool.items() if key != "type"}
    return {"type": "function", "function": function}


def _events(span: dict[str, Any]) -> list[dict[str, Any]]:
    events = span.get("events")
    if not isinstance(events, list):
        return []
    return [event for event in events if isinstance(event, dict)]


def _json_list(value: Any) -> list[Any]:
    value = _parsed(value)
    if value is None:
        return []
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise UnusableError(DropReason.unparsable)
    return value


def _parsed(value: Any) -> Any:
    """Parse a string that holds a JSON object or list; anything else stays as it is."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        return parse_json(value)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UnusableError(DropReason.unparsable)
    return value
