"""OpenAI request/response pairs, as any compatible gateway logs them.

    {"id": "req-1", "created": 1792000800, "request": {"model": ..., "messages": [...]},
     "response": {"choices": [...]} or null}

`created` may stand in the response instead; `model_revision` and `session_id`, if the gateway
knows them, stand beside the request. Token ids that an engine returned with a chat's answer
(`return_token_ids`) are kept: `prompt_token_ids` in the response, `token_ids` in the choice.

A request that failed is a drop. A request whose answer was not logged (`response` null or
without choices) is kept: off-policy, reason `no_answer`, so `regenerate` writes it. Such a
log also cannot show earlier answers: there the history's assistant messages hold null.

Legacy completions (`prompt`, `choices[].text`) have no messages. They are kept only with the
engine's token ids, which then rule, and with the prompt's text, without which ids cannot be
scrubbed: one raw user message stands for the prompt, marked so that no template is applied to it.
"""

from typing import Any

from dflash_data.adapters.completion import read_finish_reason, read_usage, with_answer
from dflash_data.adapters.fields import (
    find,
    find_object,
    find_text,
    record_id,
    spellings,
    utc_timestamp,
)
from dflash_data.adapters.log_format import LogFormat, per_line
from dflash_data.adapters.messages import num_answers, read_messages, read_sampling, read_tools
from dflash_data.adapters.served_acceptance import read_served_acceptance
from dflash_data.adapters.token_ids import read_token_ids
from dflash_data.drops import Call, Drop, DropReason, UnusableError
from dflash_train.records.conversation import Conversation, Turn

SOURCE = "openai"
HELICONE_KEYS = ("request_created_at", "request_model", "request_user_id", "request_properties")
SESSION_NAMES = ("session_id", "conversation_id", "thread_id")
SESSION_KEYS = frozenset(spellings(SESSION_NAMES))
"""One look tells whether any of these is there, which is rare."""
STATUS_NAMES = ("status", "status_code", "response_status")
FAILURE_KEYS = frozenset(spellings(("error", *STATUS_NAMES)))
FAILURES = ("error", "failed", "failure", "cancelled")
FIRST_FAILURE_STATUS = 400


def adapt(envelope: dict[str, Any], place: str) -> list[Call]:
    """Give the call of one log line; further choices are drops beside it.

    Args:
        envelope: The parsed line.
        place: Where the line stands; identifies the call if the log has no request id.

    Raises:
        UnusableError: The line holds no usable call.
    """
    return read_pair(envelope, place, source=SOURCE)


def read_pair(envelope: dict[str, Any], place: str, *, source: str) -> list[Call]:
    """Give the call of a request and its response; further choices are drops beside it.

    Args:
        envelope: Holds `request` and `response`, or the bodies under Helicone's names.
        place: Where the line stands; identifies the call if the log has no request id.
        source: Name of the format that the pair was logged in.

    Raises:
        UnusableError: The pair holds no usable call.
    """
    request = find_object(envelope, "request", "request_body") or {}
    outer = find_object(envelope, "response", "response_body") or {}
    response = find_object(outer, "body") or outer
    if _has_failed(envelope) or _has_failed(outer) or _has_failed(response):
        raise UnusableError(DropReason.not_success)
    is_legacy = request.get("messages") is None and request.get("prompt") is not None
    messages = [_raw_prompt(request)] if is_legacy else read_messages(request.get("messages"))
    turn = num_answers(messages)
    source_ref = find_text(envelope, "id", "request_id") or find_text(response, "id")
    created = find(envelope, "created", "created_at", "timestamp", "ts")
    call = Conversation(
        id=record_id(source, source_ref or place, turn),
        source=source,
        source_ref=source_ref,
        ts=utc_timestamp(response.get("created") if created is None else created),
        model=find_text(response, "model") or find_text(request, "model"),
        model_revision=find_text(envelope, "model_revision"),
        messages=messages,
        tools=read_tools(request),
        sampling=read_sampling(request),
        usage=read_usage(find_object(response, "usage") or {}),
        session=_read_session(envelope, request),
        tenant=find_text(request, "user"),
        turn=turn,
        has_rendered_prompt=is_legacy,
        on_policy_reason="no_answer",
    )
    if is_legacy:
        return _with_text_answer(call, response)
    calls = with_answer(call, response)
    if response.get("prompt_token_ids") is not None:
        _add_token_ids(call, response)
    return calls


def recognises(envelope: dict[str, Any]) -> bool:
    """Tell whether an object is a pair; one with Helicone's own keys is Helicone's."""
    if envelope.get("request") is not None:
        return True
    return find(envelope, "request_body") is not None and find(envelope, *HELICONE_KEYS) is None


FORMAT = LogFormat(name=SOURCE, read=per_line(adapt), recognises=recognises)


def _raw_prompt(request: dict[str, Any]) -> Turn:
    prompt = request.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    if not isinstance(prompt, str):
        raise UnusableError(DropReason.content_missing)
    return Turn(role="user", content=prompt)


def _add_token_ids(call: Conversation, response: dict[str, Any]) -> None:
    """Take the ids that `return_token_ids` (vLLM, our own `serve`) puts beside a chat's answer."""
    first = _first_choice(response.get("choices") or [])
    call.prompt_token_ids = read_token_ids(response["prompt_token_ids"])
    call.output_token_ids = read_token_ids(first.get("token_ids"))


def _first_choice(choices: list[dict[str, Any]]) -> dict[str, Any]:
    return next((choice for choice in choices if choice.get("index") in (None, 0)), {})


def _with_text_answer(call: Conversation, response: dict[str, Any]) -> list[Call]:
    """Add the text and the token ids of a legacy completion's first choice."""
    choices = response.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise UnusableError(DropReason.content_missing)
    first = _first_choice(choices)
    text = first.get("text")
    prompt_ids = find(first, "prompt_token_ids") or find(response, "prompt_token_ids")
    call.prompt_token_ids = read_token_ids(prompt_ids)
    call.output_token_ids = read_token_ids(find(first, "token_ids", "output_token_ids"))
    if call.prompt_token_ids is None or call.output_token_ids is None or not isinstance(text, str):
        raise UnusableError(DropReason.content_missing)
    call.finish_reason = read_finish_reason(find(first, "finish_reason"))
    call.messages.append(Turn(role="assistant", content=text))
    call.on_policy_reason = "other_model"
    call.served_acceptance_length = read_served_acceptance(response)
    return [call, *[Drop(DropReason.extra_choice)] * (len(choices) - 1)]


def _read_session(envelope: dict[str, Any], request: dict[str, Any]) -> str | None:
    """Give the id of the conversation: of the envelope, the request or the request's metadata."""
    metadata = find_object(request, "metadata") or {}
    for holder in (envelope, request, metadata):
        if not SESSION_KEYS.isdisjoint(holder):
            session = find_text(holder, *SESSION_NAMES)
            if session is not None:
                return session
    return None


def _has_failed(mapping: dict[str, Any]) -> bool:
    if FAILURE_KEYS.isdisjoint(mapping):
        return False
    if mapping.get("error") is not None:
        return True
    status = find(mapping, *STATUS_NAMES)
    if isinstance(status, (int, float)):
        return status >= FIRST_FAILURE_STATUS
    return isinstance(status, str) and status.lower() in FAILURES
