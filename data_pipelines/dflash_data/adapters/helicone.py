"""Helicone's request export: an OpenAI request and its response, with the gateway's fields.

    {"request_id": ..., "request_created_at": ..., "request_user_id": ...,
     "request_body": {"model": ..., "messages": [...]}, "response_body": {"choices": [...]},
     "response_status": 200, "cache_enabled": false, "request_properties": {...}}

`cache_enabled` says that a cache may answer, not that it did; a hit names the cached answer.
"""

from typing import Any

from dflash_data.adapters.completion import read_usage, with_answer
from dflash_data.adapters.fields import (
    find,
    find_flag,
    find_object,
    find_text,
    record_id,
    utc_timestamp,
)
from dflash_data.adapters.log_format import LogFormat, per_line
from dflash_data.adapters.messages import num_answers, read_messages, read_sampling, read_tools
from dflash_data.drops import Call, DropReason, UnusableError
from dflash_train.records.conversation import Conversation

SOURCE = "helicone"
NO_CACHED_ANSWER = "00000000-0000-0000-0000-000000000000"
SESSION_PROPERTY = "Helicone-Session-Id"


def adapt(export: dict[str, Any], place: str) -> list[Call]:
    """Give the call of one exported request; further choices are drops.

    Args:
        export: One exported object.
        place: Where it stands; identifies the call if the export has no id.

    Raises:
        UnusableError: There is no usable call in it.
    """
    _check_success(export)
    request = find_object(export, "request_body") or {}
    response = find_object(export, "response_body") or {}
    properties = find_object(export, "request_properties") or {}
    messages = read_messages(request.get("messages"))
    turn = num_answers(messages)
    source_ref = find_text(export, "request_id") or find_text(response, "id")
    call = Conversation(
        id=record_id(SOURCE, source_ref or place, turn),
        source=SOURCE,
        source_ref=source_ref,
        ts=utc_timestamp(find(export, "request_created_at", "created_at")),
        model=find_text(response, "model")
        or find_text(request, "model")
        or find_text(export, "request_model"),
        messages=messages,
        tools=read_tools(request),
        sampling=read_sampling(request),
        usage=read_usage(find_object(response, "usage") or {}),
        session=find_text(properties, SESSION_PROPERTY),
        tenant=find_text(export, "request_user_id") or find_text(request, "user"),
        turn=turn,
        on_policy_reason="no_answer",
    )
    if find(response, "streamed_data", "streaming_data") is not None and "choices" not in response:
        raise UnusableError(DropReason.stream_fragment)
    return with_answer(call, response)


def _check_success(export: dict[str, Any]) -> None:
    status = find(export, "response_status")
    if status is not None and status not in (200, "200"):
        raise UnusableError(DropReason.not_success)
    cached = find(export, "cache_reference_id")
    if find_flag(export, "cache_hit") or cached not in (None, "", NO_CACHED_ANSWER):
        raise UnusableError(DropReason.cache_hit)


def recognises(line: dict[str, Any]) -> bool:
    """Tell whether a line is an exported request: both bodies under Helicone's names."""
    return bool(find(line, "request_body")) and (
        find(line, "response_status", "request_created_at", "request_model") is not None
    )


FORMAT = LogFormat(name=SOURCE, read=per_line(adapt), recognises=recognises)
