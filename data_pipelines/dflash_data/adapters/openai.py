"""OpenAI request/response pairs, as any compatible gateway logs them.

    {"id": "req-1", "created": 1792000800, "request": {"model": ..., "messages": [...]},
     "response": {"choices": [...]} or null}

A request that failed is a drop. A request whose answer was not logged (`response` null or
without choices) is kept: off-policy, reason `no_answer`, so `regenerate` writes it. Such a
log also cannot show earlier answers: there the history's assistant messages hold null.

An answer counts as the target's own only if the recipe names the target's served aliases
and sampling; without those keys every logged answer is `other_model` and is rewritten.
"""

from typing import Any

from dflash_data.adapters.fields import (
    find,
    find_object,
    find_text,
    parse_object,
    record_id,
    utc_timestamp,
)
from dflash_data.adapters.messages import (
    read_message,
    read_messages,
    read_sampling,
    read_tools,
)
from dflash_data.drops import Drop, DropReason, UnusableError
from dflash_train.records.conversation import Conversation

SOURCE = "openai"
FINISH_REASONS = {"stop": "stop", "length": "length", "tool_calls": "tool_calls"} | {
    "function_call": "tool_calls"
}
USAGE_KEYS = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")
FIRST_FAILURE_STATUS = 400


def adapt(line: bytes, source_id: str) -> list[Conversation | Drop]:
    """Give the call of one log line, or why there is none; further choices are drops, too.

    Args:
        line: One JSON object.
        source_id: Where the line stands; identifies the call if the log has no request id.
    """
    try:
        envelope = parse_object(line)
        choices, extra_choices = _read_choices(envelope)
        call = _read_request(envelope, source_id)
        if choices:
            _add_answer(call, choices[0])
        return [call, *extra_choices]
    except UnusableError as unusable:
        return [Drop(unusable.reason)]


def _read_request(envelope: dict[str, Any], source_id: str) -> Conversation:
    request = find_object(envelope, "request", "request_body") or {}
    response = _response(envelope)
    messages = read_messages(find(request, "messages"))
    source_ref = find_text(envelope, "id", "request_id") or find_text(response, "id")
    turn = sum(message.role == "assistant" for message in messages)
    metadata = find_object(request, "metadata") or {}
    created = find(envelope, "created", "created_at", "timestamp", "ts")
    return Conversation(
        id=record_id(SOURCE, source_ref or source_id, turn),
        source=SOURCE,
        source_ref=source_ref,
        ts=utc_timestamp(find(response, "created") if created is None else created),
        model=find_text(response, "model") or find_text(request, "model"),
        messages=messages,
        tools=read_tools(request),
        sampling=read_sampling(request),
        usage=_read_usage(response),
        session=_session(envelope) or _session(request) or _session(metadata),
        tenant=find_text(request, "user"),
        turn=turn,
        on_policy_reason="no_answer",
    )


def _read_choices(envelope: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Drop]]:
    """Give the first choice, if an answer was logged, and a drop for each further one."""
    response = _response(envelope)
    outer = find_object(envelope, "response", "response_body") or {}
    if any(map(_has_failed, (envelope, outer, response))):
        raise UnusableError(DropReason.not_success)
    if str(find(response, "object") or "").endswith(".chunk"):
        raise UnusableError(DropReason.stream_fragment)
    choices = find(response, "choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise UnusableError(DropReason.unparsable)
    first = [choice for choice in choices if find(choice, "index") in (None, 0)][:1]
    if choices and not first:
        raise UnusableError(DropReason.extra_choice)
    return first, [Drop(DropReason.extra_choice)] * (len(choices) - len(first))


def _add_answer(call: Conversation, choice: dict[str, Any]) -> None:
    message = find_object(choice, "message")
    if message is None:
        raise UnusableError(DropReason.content_missing)
    answer = read_message({"role": "assistant", **message})
    if answer.role != "assistant":
        raise UnusableError(DropReason.unknown_role)
    call.finish_reason = _read_finish_reason(find(choice, "finish_reason"))
    if not answer.content and not answer.tool_calls:
        raise UnusableError(DropReason.empty_output)
    call.messages.append(answer)
    call.on_policy, call.on_policy_reason = False, "other_model"


def _read_finish_reason(value: Any) -> str | None:
    if value == "content_filter":
        raise UnusableError(DropReason.content_filter)
    if value is None:
        return None
    if not isinstance(value, str) or value not in FINISH_REASONS:
        raise UnusableError(DropReason.not_success)
    return FINISH_REASONS[value]


def _read_usage(response: dict[str, Any]) -> dict[str, int]:
    usage = find_object(response, "usage") or {}
    counts = {key: find(usage, key) for key in USAGE_KEYS}
    return {key: count for key, count in counts.items() if type(count) is int}


def _response(envelope: dict[str, Any]) -> dict[str, Any]:
    response = find_object(envelope, "response", "response_body") or {}
    return find_object(response, "body") or response


def _session(mapping: dict[str, Any]) -> str | None:
    return find_text(mapping, "session_id", "conversation_id", "thread_id")


def _has_failed(mapping: dict[str, Any]) -> bool:
    if find(mapping, "error") is not None:
        return True
    status = find(mapping, "status", "status_code", "response_status")
    if isinstance(status, (int, float)):
        return status >= FIRST_FAILURE_STATUS
    return isinstance(status, str) and status.lower() in ("error", "failed", "failure", "cancelled")
