"""OpenAI-style messages and sampling settings: the shape most log formats carry inside.

An assistant message of the history may have null content: the gateway did not log what the
target said. It stays as `Turn(role="assistant", content=None)`, a place that `regenerate`
fills. Everywhere else missing content is a drop.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from dflash_data.adapters.fields import (
    CONTAINERS,
    as_text,
    find,
    find_object,
    find_text,
    parse_json,
    spellings,
    storable,
)
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
    "tool_choice": ("tool_choice",),
}
"""Sampling key of the canonical record -> names under which requests carry it."""
SAMPLING_KEYS = {
    spelling: key for key, names in SAMPLING_ALIASES.items() for spelling in spellings(names)
}
"""The same table turned round: requests hold few settings, so reading walks the request."""
CONSTRAINTS = spellings(
    (
        "structured_outputs", "guided_decoding", "guided_json", "guided_regex", "guided_choice",
        "guided_grammar", "json_schema", "regex", "ebnf", "grammar", "structural_tag",
    )
)  # fmt: skip
"""What vLLM, SGLang and llama.cpp call settings that restrict which tokens come next."""
CONSTRAINED_BY = "constrained by"
_SETTINGS = SAMPLING_KEYS | dict.fromkeys(CONSTRAINTS, CONSTRAINED_BY)
EXTRA_BODY = spellings(("extra_body",))
TEMPLATE_ARGUMENTS = "chat_template_kwargs"
NESTED_SETTINGS = frozenset((*EXTRA_BODY, *spellings((TEMPLATE_ARGUMENTS,))))
"""One look tells whether any of these is there, which is rare."""
PLAIN_ROLES = frozenset(ROLES) - {"tool"}
TEXT_PARTS = ("text", "input_text", "output_text")


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
    if not isinstance(value, list):
        raise UnusableError(DropReason.unparsable)
    turns: list[Turn] = []
    for message in value:
        if type(message) is dict and len(message) == 2 and "content" in message:
            content, role = message["content"], message.get("role")
            if type(content) is str and type(role) is str and role in PLAIN_ROLES:
                turns.append(Turn(role=role, content=content))
                continue
        turns.append(read_message(message))
    check_prompt(turns)
    return turns


def read_message(message: Any) -> Turn:
    """Read one message of a request or a response.

    Raises:
        UnusableError: It is no object, its role is unknown, or its content is missing or not text.
    """
    if type(message) is not dict:
        raise UnusableError(DropReason.unparsable)
    if len(message) > 2:
        message = {name: value for name, value in message.items() if value is not None}
    content, role = message.get("content"), message.get("role")
    if type(role) is not str:
        raise UnusableError(DropReason.unknown_role)
    if type(content) is str and len(message) == 2 and role in PLAIN_ROLES:
        return Turn(role=role, content=content)
    role = "tool" if role == "function" else role
    if role not in ROLES:
        raise UnusableError(DropReason.unknown_role)
    turn = Turn(
        role=role,
        content=content if type(content) is str else _read_content(content),
        reasoning=find_text(message, "reasoning", "reasoning_content"),
        tool_calls=read_tool_calls(find(message, "tool_calls")),
        tool_call_id=find_text(message, "tool_call_id"),
        name=find_text(message, "name"),
    )
    if turn.content is None and role != "assistant":
        raise UnusableError(DropReason.content_missing)
    return turn


def check_prompt(turns: Sequence[Turn]) -> None:
    """Check that the target can answer these messages.

    Raises:
        UnusableError: Nobody asks, a tool result stands outside the run of results after the
            assistant turn that asked for it, or an assistant turn comes last.
    """
    roles = [turn.role for turn in turns]
    if "tool" in roles:
        _check_tool_order(turns)
    elif "user" not in roles:
        raise UnusableError(DropReason.content_missing)
    if roles[-1] == "assistant":
        raise UnusableError(DropReason.unstable_boundary)


def _check_tool_order(turns: Sequence[Turn]) -> None:
    open_calls = False
    for turn in turns:
        if turn.role != "tool":
            open_calls = turn.role == "assistant" and turn.tool_calls is not None
        elif not open_calls:
            raise UnusableError(DropReason.bad_tool_order)


def num_answers(turns: Iterable[Turn]) -> int:
    """Give the turn number of the answer to these messages: the assistant turns among them."""
    return [turn.role for turn in turns].count("assistant")


def read_sampling(request: dict[str, Any]) -> dict[str, Any]:
    """Give the sampling settings that were logged; an absent key means not logged.

    A setting under its own name wins over an alias. `extra_body`, what OpenAI clients send beyond
    OpenAI's own settings, wins over both, and so do the arguments of the chat template, of which
    thinking alone is a setting. A grammar, by whichever name, is the `response_format`.

    Raises:
        UnusableError: A setting is nested deeper than any real one.
    """
    found = _own_settings(request)
    if not NESTED_SETTINGS.isdisjoint(request):
        found |= _nested_settings(request)
    if CONSTRAINED_BY in found:
        found["response_format"] = {"type": found.pop(CONSTRAINED_BY)}
    return found


def read_tools(request: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Give the tool schemas as sent, key order kept; None if there are none.

    Raises:
        UnusableError: They are no list of objects.
    """
    tools = request.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UnusableError(DropReason.unparsable)
    return storable(tools)


def read_tool_calls(calls: Any) -> list[dict[str, Any]] | None:
    """Read the calls of an assistant message: id, name and the arguments as text.

    Raises:
        UnusableError: They are no list of named calls.
    """
    if calls is None or calls == []:
        return None
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UnusableError(DropReason.unparsable)
    return [_read_tool_call(call) for call in calls]


def _own_settings(request: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in request.items():
        key = _SETTINGS.get(name)
        if key is None or value is None:
            continue
        if key == CONSTRAINED_BY:
            if value is not False:
                found[key] = name
        elif key not in found or key == name:
            found[key] = storable(value) if type(value) in CONTAINERS else value
    return found


def _nested_settings(request: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in EXTRA_BODY:
        extra = find_object(request, name) or {}
        found |= _own_settings(extra) | _template_settings(extra)
    return found | _template_settings(request)


def _template_settings(request: dict[str, Any]) -> dict[str, Any]:
    template = find_object(request, TEMPLATE_ARGUMENTS)
    thinking = find(template, "enable_thinking") if template else None
    return {} if thinking is None else {"enable_thinking": storable(thinking)}


def _read_content(content: Any) -> str | None:
    if content is None:
        return None
    if not isinstance(content, list):
        raise UnusableError(DropReason.unparsable)
    return "".join(_text_of_part(part) for part in content) or None


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise UnusableError(DropReason.unparsable)
    text = part.get("text")
    if part.get("type", "text") not in TEXT_PARTS:
        raise UnusableError(DropReason.non_text)
    if not isinstance(text, str):
        raise UnusableError(DropReason.unparsable)
    return text


def _read_tool_call(call: dict[str, Any]) -> dict[str, Any]:
    function = find_object(call, "function") or call
    arguments = function.get("arguments")
    name = find_text(function, "name")
    if name is None:
        raise UnusableError(DropReason.unparsable)
    text = "" if arguments is None else as_text(arguments)
    return {"id": find_text(call, "id"), "name": name, "arguments": text or "{}"}
