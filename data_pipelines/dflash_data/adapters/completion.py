"""The answer of a logged call: a completion object, its choices, finish reason and usage.

Most formats carry the completion object of OpenAI's chat API somewhere inside; the others
carry a message and a finish reason. Both end up in `add_answer`.
"""

from typing import Any

from dflash_data.adapters.fields import find, find_object, read_count, spellings
from dflash_data.adapters.messages import read_message
from dflash_data.adapters.served_acceptance import read_served_acceptance
from dflash_data.drops import Call, Drop, DropReason, UnusableError
from dflash_train.records.conversation import Conversation

FINISH_REASONS = {
    "stop": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "eos": "stop",
    "length": "length",
    "max_tokens": "length",
    "tool_calls": "tool_calls",
    "tool_call": "tool_calls",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
}
"""Why generation ended, as providers say it -> as the canonical record says it."""
USAGE_KEYS = {
    spelling: key
    for key, names in (
        ("prompt_tokens", ("prompt_tokens", "input_tokens", "input")),
        ("completion_tokens", ("completion_tokens", "output_tokens", "output")),
        ("cached_tokens", ("cached_tokens",)),
        ("reasoning_tokens", ("reasoning_tokens",)),
    )
    for spelling in spellings(names)
}
USAGE_DETAILS = spellings(("prompt_tokens_details", "completion_tokens_details"))
"""Where OpenAI's usage object keeps cached and reasoning tokens."""
_DETAILS = frozenset(USAGE_DETAILS)


def with_answer(call: Conversation, response: dict[str, Any]) -> list[Call]:
    """Add the first choice of a completion object, if it has any; each further one is a drop.

    Raises:
        UnusableError: The completion failed, is a fragment of a stream, or is not text.
    """
    choices = _read_choices(response)
    if not choices:
        return [call]
    first = _first(choices)
    message = find_object(first, "message")
    if message is None:
        is_fragment = first.get("delta") is not None
        raise UnusableError(
            DropReason.stream_fragment if is_fragment else DropReason.content_missing
        )
    add_answer(call, message, find(first, "finish_reason"))
    call.served_acceptance_length = read_served_acceptance(response)
    if len(choices) == 1:
        return [call]
    return [call, *[Drop(DropReason.extra_choice)] * (len(choices) - 1)]


def add_answer(call: Conversation, message: dict[str, Any], finish_reason: Any) -> None:
    """Make a logged message the supervised turn of the call.

    Raises:
        UnusableError: Generation failed or was filtered, or the message is empty or not text.
    """
    if message.get("role") is None:
        message = {**message, "role": "assistant"}
    answer = read_message(message)
    if answer.role != "assistant":
        raise UnusableError(DropReason.unknown_role)
    call.finish_reason = read_finish_reason(finish_reason)
    if not answer.content and not answer.tool_calls:
        raise UnusableError(DropReason.empty_output)
    call.messages.append(answer)
    call.on_policy_reason = "other_model"


def read_finish_reason(value: Any) -> str | None:
    """Give stop, length or tool_calls; None if it was not logged, never assumed to be stop.

    Raises:
        UnusableError: The answer was filtered, or generation ended for another reason.
    """
    if value is None:
        return None
    if value == "content_filter":
        raise UnusableError(DropReason.content_filter)
    if not isinstance(value, str) or value not in FINISH_REASONS:
        raise UnusableError(DropReason.not_success)
    return FINISH_REASONS[value]


def read_usage(usage: dict[str, Any]) -> dict[str, int]:
    """Give the token counts that were logged, under their own name before an alias."""
    counts = _own_counts(usage)
    if _DETAILS.isdisjoint(usage):
        return counts
    for place in USAGE_DETAILS:
        details = usage.get(place)
        if type(details) is dict:
            counts = _own_counts(details) | counts
    return counts


def _own_counts(usage: dict[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, value in usage.items():
        key = USAGE_KEYS.get(name)
        if key is not None and (key not in counts or key == name):
            count = value if type(value) is int and value >= 0 else read_count(value)
            if count is not None:
                counts[key] = count
    return counts


def _read_choices(response: dict[str, Any]) -> list[dict[str, Any]]:
    kind = response.get("object")
    if isinstance(kind, str) and kind.endswith(".chunk"):
        raise UnusableError(DropReason.stream_fragment)
    if response.get("error") is not None:
        raise UnusableError(DropReason.not_success)
    choices = response.get("choices")
    if choices is None or choices == []:
        return []
    if not isinstance(choices, list) or set(map(type, choices)) != {dict}:
        raise UnusableError(DropReason.unparsable)
    return choices


def _first(choices: list[dict[str, Any]]) -> dict[str, Any]:
    for choice in choices:
        if choice.get("index") in (None, 0):
            return choice
    raise UnusableError(DropReason.extra_choice)
