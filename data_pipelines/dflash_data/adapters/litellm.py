"""LiteLLM's standard logging payload, as its callbacks write it to files and buckets.

    {"id": ..., "trace_id": ..., "call_type": "acompletion", "status": "success",
     "cache_hit": false, "startTime": 1792000801.2, "messages": [...], "response": {...},
     "model_parameters": {...}, "metadata": {"user_api_key_team_id": ...}, "end_user": ...}

With message logging turned off the texts are a placeholder, which is no content. A guardrail
that stepped in after the answer may have edited it, so the record says `edited`.
"""

import re
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

SOURCE = "litellm"
CHAT_CALL = re.compile(r"a?completion\w*|anthropic_messages")
PLACEHOLDER = "redacted-by-litellm"
GUARDRAIL_PASSED = ("success", "not_run")
BEFORE_THE_CALL = "pre_call"
"""Mode of a guardrail that edits the prompt only: the target answered what it left."""


def adapt(payload: dict[str, Any], place: str) -> list[Call]:
    """Give the call of one payload; further choices are drops.

    Args:
        payload: One logged object.
        place: Where it stands; identifies the call if the payload has no id.

    Raises:
        UnusableError: There is no usable call in it.
    """
    _check_success(payload)
    parameters = find_object(payload, "model_parameters") or {}
    metadata = find_object(payload, "metadata") or {}
    response = _response(payload)
    logged = payload.get("messages")
    if logged == PLACEHOLDER:
        raise UnusableError(DropReason.content_missing)
    messages = read_messages(logged)
    turn = num_answers(messages)
    source_ref = find_text(payload, "id") or find_text(response, "id")
    sampling = read_sampling(parameters)
    if _is_edited(payload, metadata):
        sampling["edited"] = True
    call = Conversation(
        id=record_id(SOURCE, source_ref or place, turn),
        source=SOURCE,
        source_ref=source_ref,
        ts=utc_timestamp(find(payload, "startTime", "start_time")),
        model=find_text(payload, "model") or find_text(response, "model"),
        messages=messages,
        tools=read_tools(parameters),
        sampling=sampling,
        usage=read_usage(find_object(response, "usage") or _token_counts(payload)),
        session=find_text(payload, "trace_id"),
        tenant=find_text(metadata, "user_api_key_team_id") or find_text(payload, "end_user"),
        turn=turn,
        on_policy_reason="no_answer",
    )
    calls = with_answer(call, response)
    if PLACEHOLDER in [turn.content for turn in call.messages]:
        raise UnusableError(DropReason.content_missing)
    return calls


def _check_success(payload: dict[str, Any]) -> None:
    status = payload.get("status")
    if status is not None and status != "success":
        raise UnusableError(DropReason.not_success)
    if find_flag(payload, "cache_hit"):
        raise UnusableError(DropReason.cache_hit)
    call_type = find(payload, "call_type")
    if isinstance(call_type, str) and not CHAT_CALL.fullmatch(call_type):
        # Embeddings, images, plain text completions: there are no messages to learn from.
        raise UnusableError(DropReason.content_missing)


def _response(payload: dict[str, Any]) -> dict[str, Any]:
    response = payload.get("response")
    if response == PLACEHOLDER:
        raise UnusableError(DropReason.content_missing)
    if response == "":
        return {}
    response = find_object(payload, "response") or {}
    if response.get("text") == PLACEHOLDER:
        raise UnusableError(DropReason.content_missing)
    return response


def _token_counts(payload: dict[str, Any]) -> dict[str, Any]:
    return {name: find(payload, name) for name in ("prompt_tokens", "completion_tokens")}


def _is_edited(payload: dict[str, Any], metadata: dict[str, Any]) -> bool:
    """Tell whether a guardrail stepped in at or after the answer."""
    name = "guardrail_information"
    runs = find(payload, name) or find(metadata, name)
    return bool(runs) and any(
        isinstance(run, dict)
        and find(run, "guardrail_mode") != BEFORE_THE_CALL
        and (
            find(run, "guardrail_status") not in (None, *GUARDRAIL_PASSED)
            or bool(find(run, "masked_entity_count"))
        )
        for run in (runs if isinstance(runs, list) else [runs])
    )


def recognises(line: dict[str, Any]) -> bool:
    """Tell whether a line is a standard logging payload: two of its own keys are there."""
    return find(line, "call_type") is not None and "messages" in line and "response" in line


FORMAT = LogFormat(name=SOURCE, read=per_line(adapt), recognises=recognises)
