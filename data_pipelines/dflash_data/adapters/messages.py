"""OpenAI-style messages and sampling settings: the shape most log formats carry inside.

An assistant message of the history may have null content: the gateway did not log what the
target said. It stays as `Turn(role="assistant", content=None)`, a place that `regenerate`
fills. Everywhere else missing content is a drop.
"""

from typing import Any

import orjson

from dflash_data.adapters.fields import find, find_object, find_text, parse_json
from dflash_data.drops import DropReason, UnusableError
from dflash_train.records.conversation import ROLES, Turn

SAMPLING_ALIASES = {
    "temperature": ("temperature",),
    "top_p": ("top_p",),
    "top_k": ("top_k",),
    "min_p": ("min_p",),
    "max_tokens": ("max_tokens", "max_completion_tokens", "max_new_tokens"),
    "seed": ("seed",),
    "stop": ("stop",),
    "n": ("n",),
    "presence_penalty": ("presence_penalty",),
    "frequency_penalty": ("frequency_penalty",),
    "repetition_penalty": ("repetition_penalty",),
    "logit_bias": ("logit_bias",),
    "response_format": ("response_format",),
    "reasoning_effort": ("reasoning_effort",),
    "enable_thinking": ("enable_thinking",),
}
"""Sampling key of the canonical record -> names under which requests carry it."""


def read_messages(value: Any) -> list[Turn]:
    """Read a request's message list, which must end where the target's answer begins.

    Raises:
        UnusableError: Nothing logged, not text, an unknown role, tool results without a call, or
            an assistant message at the end, which the answer would merely continue.
    """
    if isinstance(value, str):
        value = parse_json(value)
    if value is None or value == []:
        raise UnusableError(DropReason.content_missing)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UnusableError(DropReason.unparsable)
    turns = [read_message(message) for message in value]
    if not any(turn.role in ("user", "tool") for turn in turns):
        raise UnusableError(DropReason.content_missing)
    if turns[-1].role == "assistant":
        raise UnusableError(DropReason.unstable_boundary)
    _check_tool_order(turns)
    return turns


def read_message(message: dict[str, Any]) -> Turn:
    """Read one message of a request or a response.

    Raises:
        UnusableError: Its role is unknown, or its content is missing or not text.
    """
    role = find(message, "role")
    role = "tool" if role == "function" else role
    if role not in ROLES:
        raise UnusableError(DropReason.unknown_role)
    turn = Turn(
        role=role,
        content=_read_content(message.get("content")),
        reasoning=find_text(message, "reasoning", "reasoning_content"),
        tool_calls=_read_tool_calls(find(message, "tool_calls")),
        tool_call_id=find_text(message, "tool_call_id"),
        name=find_text(message, "name"),
    )
    if turn.content is None and role != "assistant":
        raise UnusableError(DropReason.content_missing)
    return turn


def read_sampling(request: dict[str, Any]) -> dict[str, Any]:
    """Give the sampling settings that were logged; an absent key means not logged."""
    nested = find_object(request, "chat_template_kwargs") or {}
    found = {key: find(request, *aliases) for key, aliases in SAMPLING_ALIASES.items()}
    found["enable_thinking"] = find({**request, **nested}, "enable_thinking")
    return {key: value for key, value in found.items() if value is not None}


def read_tools(request: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Give the tool schemas as sent, key order kept; None if there are none.

    Raises:
        UnusableError: They are no list of objects.
    """
    tools = find(request, "tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UnusableError(DropReason.unparsable)
    return tools


def _read_content(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UnusableError(DropReason.unparsable)
    return "".join(_text_of_part(part) for part in content) or None


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise UnusableError(DropReason.unparsable)
    text = part.get("text")
    if part.get("type", "text") not in ("text", "input_text", "output_text"):
        raise UnusableError(DropReason.non_text)
    if not isinstance(text, str):
        raise UnusableError(DropReason.unparsable)
    return text


def _read_tool_calls(calls: Any) -> list[dict[str, Any]] | None:
    if calls is None or calls == []:
        return None
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UnusableError(DropReason.unparsable)
    return [_read_tool_call(call) for call in calls]


def _read_tool_call(call: dict[str, Any]) -> dict[str, Any]:
    function = find_object(call, "function") or call
    arguments = find(function, "arguments")
    if arguments is not None and not isinstance(arguments, str):
        arguments = orjson.dumps(arguments).decode()
    name = find_text(function, "name")
    if name is None:
        raise UnusableError(DropReason.unparsable)
    return {"id": find_text(call, "id"), "name": name, "arguments": arguments or "{}"}


def _check_tool_order(turns: list[Turn]) -> None:
    """Let a tool result stand only in the run of results after the assistant turn that asked."""
    open_calls = False
    for turn in turns:
        if turn.role == "tool" and not open_calls:
            raise UnusableError(DropReason.bad_tool_order)
        if turn.role != "tool":
            open_calls = turn.role == "assistant" and turn.tool_calls is not None
