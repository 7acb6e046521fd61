"""OpenTelemetry GenAI spans: OTLP-JSON, nested or one span a line, or flattened spans.

    {"traceId": ..., "spanId": ..., "startTimeUnixNano": "1792000900000000000",
     "attributes": [{"key": "gen_ai.request.model", "value": {"stringValue": ...}}, ...]}

Spans of other kinds (tools, agents, embeddings, HTTP) are no calls and are passed over. Texts
are captured only where the operator opted in; a chat span without them is a drop. How texts
stand in a span is the matter of `opentelemetry_content`. Instrumentations that send each
message as a log event share a span id with the span: events wait for their span, a bounded
number of them, and stand for themselves if none comes.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from dflash_data.adapters.completion import read_usage
from dflash_data.adapters.fields import (
    find,
    find_text,
    parse_object,
    read_number,
    record_id,
    storable,
    utc_timestamp,
)
from dflash_data.adapters.log_format import Line, LogFormat
from dflash_data.adapters.messages import SAMPLING_KEYS, num_answers, read_sampling
from dflash_data.adapters.opentelemetry_attributes import read_attributes
from dflash_data.adapters.opentelemetry_content import (
    MESSAGE_EVENTS,
    event_name,
    read_answers,
    read_prompt,
    read_tool_definitions,
    with_event_attributes,
)
from dflash_data.drops import Call, Drop, DropReason, UnusableError
from dflash_train.records.conversation import Conversation

SOURCE = "opentelemetry"
TEXT_COMPLETION = "text_completion"
CHAT_OPERATIONS = ("chat", "generate_content", TEXT_COMPLETION)
CALL_MARKS = ("gen_ai.request.model", "gen_ai.prompt.0.role", "llm.model_name")
"""Attributes that only model calls carry, for dialects that name no operation."""
FAILED_CODES = (2, "2", "STATUS_CODE_ERROR", "ERROR", "Error")
START_TIMES = ("start_time_unix_nano", "start_time", "time_unix_nano", "timestamp")
SETTINGS = {
    f"gen_ai.request.{name}": key
    for name, key in (SAMPLING_KEYS | {"stop_sequences": "stop", "choice.count": "n"}).items()
}
USAGE_NAMES = {
    "gen_ai.usage.input_tokens": "prompt_tokens",
    "gen_ai.usage.prompt_tokens": "prompt_tokens",
    "llm.token_count.prompt": "prompt_tokens",
    "gen_ai.usage.output_tokens": "completion_tokens",
    "gen_ai.usage.completion_tokens": "completion_tokens",
    "llm.token_count.completion": "completion_tokens",
    "gen_ai.usage.cache_read.input_tokens": "cached_tokens",
    "gen_ai.usage.reasoning.output_tokens": "reasoning_tokens",
}
CONTAINERS = {
    "resource_spans": ("scope_spans", "instrumentation_library_spans"),
    "scope_spans": ("spans",),
    "instrumentation_library_spans": ("spans",),
    "resource_logs": ("scope_logs",),
    "scope_logs": ("log_records",),
}
"""Levels of OTLP-JSON: list of a level -> names of the lists inside each of its objects."""
MAX_WAITING = 4096
"""Spans whose message events wait for the span itself."""

Waiting = OrderedDict[str, dict[str, Any]]
"""Span id -> a span made of nothing but the events seen so far."""


def read(lines: Iterable[Line]) -> Iterator[Call]:
    """Give the calls of an export: spans, and message events that no span claims."""
    waiting: Waiting = OrderedDict()
    for line in lines:
        try:
            spans = _spans(parse_object(line.text))
        except UnusableError as unusable:
            yield Drop(unusable.reason)
            continue
        for number, span in enumerate(spans):
            place = f"{line.place}.{number}" if number else line.place
            if type(span) is dict and _is_message_event(span):
                yield from _keep_event(span, waiting)
            else:
                yield from _calls(span, place, waiting)
        while len(waiting) > MAX_WAITING:
            span_id, span = waiting.popitem(last=False)
            yield from _calls(span, span_id, waiting)
    for span_id, span in waiting.items():
        yield from _calls(span, span_id, OrderedDict())


def _calls(span: Any, place: str, waiting: Waiting) -> list[Call]:
    """Give the call of one span and its further choices; nothing if it is no model call."""
    try:
        if type(span) is not dict:
            raise UnusableError(DropReason.unparsable)
        span_id = find_text(span, "span_id") if waiting else None
        if span_id in waiting:
            events = span.get("events") or []
            span = {**span, "events": [*events, *waiting.pop(span_id)["events"]]}
        return adapt(span, place)
    except UnusableError as unusable:
        return [Drop(unusable.reason)]
    except RecursionError:  # typed values inside typed values, hundreds of levels deep
        return [Drop(DropReason.unparsable)]


def adapt(span: dict[str, Any], place: str) -> list[Call]:
    """Give the call of one span, nothing if it is no model call.

    Args:
        span: One span or event, nested or flattened.
        place: Where it stands; identifies the call if the span has no id.

    Raises:
        UnusableError: It is a model call without usable content.
    """
    attributes = with_event_attributes(read_attributes(span), span)
    if not _is_call(span, attributes):
        return []
    if _has_failed(span, attributes):
        raise UnusableError(DropReason.not_success)
    messages = read_prompt(span, attributes)
    turn = num_answers(messages)
    source_ref = find_text(span, "span_id", "id") or _first_text(attributes, "context.span_id")
    answers = read_answers(span, attributes)
    call = Conversation(
        id=record_id(SOURCE, source_ref or place, turn),
        source=SOURCE,
        source_ref=source_ref,
        ts=utc_timestamp(find(span, *START_TIMES)),
        model=_first_text(
            attributes, "gen_ai.response.model", "gen_ai.request.model", "llm.model_name"
        ),
        messages=messages,
        tools=read_tool_definitions(attributes),
        sampling=_sampling(attributes),
        usage=_usage(attributes),
        session=_first_text(attributes, "gen_ai.conversation.id", "session.id"),
        tenant=_first_text(attributes, "user.id", "enduser.id"),
        turn=turn,
        has_rendered_prompt=_is_text_completion(attributes) and len(messages) == 1,
        on_policy_reason="no_answer",
    )
    if not answers:
        return [call]
    first, finish_reason = answers[0]
    if not first.content and not first.tool_calls:
        raise UnusableError(DropReason.empty_output)
    call.messages.append(first)
    call.finish_reason = finish_reason
    call.on_policy_reason = "other_model"
    return [call, *[Drop(DropReason.extra_choice)] * (len(answers) - 1)]


def _spans(value: dict[str, Any]) -> list[Any]:
    """Give the spans and log records of a line; a line without containers is one of them."""
    if "attributes" in value:
        return [value]
    level: list[Any] = [value]
    names = [name for name in CONTAINERS if find(value, name) is not None]
    if not names:
        return [value]
    while names:
        inner_names = dict.fromkeys(inner for name in names for inner in CONTAINERS.get(name, ()))
        level = [one for outer in level for name in names for one in _inner(outer, name)]
        names = list(inner_names)
    return level


def _inner(outer: Any, name: str) -> list[Any]:
    inner = find(outer, name) if isinstance(outer, dict) else None
    if inner is None:
        return []
    if not isinstance(inner, list):
        raise UnusableError(DropReason.unparsable)
    return inner


def _is_message_event(record: dict[str, Any]) -> bool:
    has_start = find(record, "start_time_unix_nano", "start_time") is not None
    return not has_start and event_name(record) in MESSAGE_EVENTS


def _keep_event(event: dict[str, Any], waiting: Waiting) -> list[Call]:
    span_id = find_text(event, "span_id")
    if span_id is None:
        return [Drop(DropReason.content_missing)]
    span = waiting.setdefault(span_id, {"span_id": span_id, "events": []})
    span["events"].append(event)
    return []


def _is_call(span: dict[str, Any], attributes: dict[str, Any]) -> bool:
    operation = attributes.get("gen_ai.operation.name")
    if operation is not None:
        return operation in CHAT_OPERATIONS
    kind = attributes.get("openinference.span.kind")
    if kind is not None:
        return kind == "LLM"
    if any(mark in attributes for mark in CALL_MARKS):
        return True
    events = span.get("events")
    return isinstance(events, list) and any(
        isinstance(event, dict) and event_name(event) in MESSAGE_EVENTS for event in events
    )


def _is_text_completion(attributes: dict[str, Any]) -> bool:
    """Say whether a completion API was called: its one message is the prompt as it was fed."""
    return attributes.get("gen_ai.operation.name") == TEXT_COMPLETION


def _has_failed(span: dict[str, Any], attributes: dict[str, Any]) -> bool:
    status = span.get("status")
    code = find(status, "code", "status_code") if isinstance(status, dict) else status
    code = find(span, "status_code") if code is None else code
    return code in FAILED_CODES or attributes.get("error.type") is not None


def _sampling(attributes: dict[str, Any]) -> dict[str, Any]:
    invocation = attributes.get("llm.invocation_parameters")
    sampling = read_sampling(parse_object(invocation)) if isinstance(invocation, str) else {}
    for name, value in attributes.items():
        key = SETTINGS.get(name)
        if key is not None and value is not None:
            sampling[key] = storable(read_number(value))
    if attributes.get("gen_ai.output.type") not in (None, "text"):
        sampling.setdefault("response_format", {"type": storable(attributes["gen_ai.output.type"])})
    return sampling


def _usage(attributes: dict[str, Any]) -> dict[str, int]:
    logged = {
        key: attributes[name]
        for name, key in USAGE_NAMES.items()
        if name in attributes and attributes[name] is not None
    }
    return read_usage(logged)


def _first_text(attributes: dict[str, Any], *names: str) -> str | None:
    for name in names:
        value = attributes.get(name)
        if isinstance(value, str) and value:
            return value
    return None


def recognises(line: dict[str, Any]) -> bool:
    """Tell whether a line is OTLP-JSON, a span or a message event."""
    if any(find(line, name) is not None for name in CONTAINERS):
        return True
    is_span = find(line, "span_id") is not None and find(line, "trace_id") is not None
    return is_span or any(name.startswith(("gen_ai.", "attributes.gen_ai.")) for name in line)


FORMAT = LogFormat(name=SOURCE, read=read, recognises=recognises, joins_lines=True)
