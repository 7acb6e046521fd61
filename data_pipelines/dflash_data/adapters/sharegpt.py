"""Files that hold whole conversations: ShareGPT turns or OpenAI messages, one object a line.

    {"id": ..., "conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}

Each assistant turn becomes a record of its own with the messages before it. Nobody knows which
model wrote them, when, or how, so they are public data and never on-policy.
"""

from typing import Any

from msgspec.structs import replace

from dflash_data.adapters.fields import find, find_text, parse_json, record_id
from dflash_data.adapters.log_format import LogFormat, per_line
from dflash_data.adapters.messages import (
    check_prompt,
    num_answers,
    read_message,
    read_tools,
)
from dflash_data.drops import Call, Drop, DropReason, UnusableError
from dflash_train.records.conversation import ROLES, Conversation, Turn

SOURCE = "sharegpt"
SPEAKERS = {"human": "user", "gpt": "assistant", "function": "tool"} | {
    role: role for role in ROLES
}
"""Who speaks in a ShareGPT turn -> role; anybody else is unknown, never the assistant."""
OTHER_FORMATS = ("request", "response", "choices", "input", "output", "inputs", "custom_id")
"""Keys of lines that hold a served call: those are no whole conversations."""


def adapt(line: dict[str, Any], place: str) -> list[Call]:
    """Give one record for each assistant turn, and one for a question left at the end.

    Args:
        line: One conversation.
        place: Where it stands; identifies the conversation if it has no id.

    Raises:
        UnusableError: The conversation as a whole cannot be read.
    """
    turns = _read_turns(line)
    tools = read_tools(line)
    source_ref = find_text(line, "id", "conversation_id")
    ends = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    if turns[-1].role != "assistant":
        ends.append(len(turns))
    records: list[Call] = []
    for end in ends:
        try:
            messages = _messages_up_to(turns, end)
        except UnusableError as unusable:
            records.append(Drop(unusable.reason))
            continue
        turn = num_answers(turns[:end])
        records.append(
            Conversation(
                id=record_id(SOURCE, source_ref or place, turn),
                source=SOURCE,
                source_ref=source_ref,
                messages=messages,
                tools=tools,
                session=source_ref or place,
                turn=turn,
                origin="public",
                on_policy_reason="other_model" if end < len(turns) else "no_answer",
            )
        )
    return records


def _read_turns(line: dict[str, Any]) -> list[Turn]:
    turns = find(line, "conversations", "conversation", "messages")
    turns = parse_json(turns) if isinstance(turns, str) else turns
    if turns is None or turns == []:
        raise UnusableError(DropReason.content_missing)
    if not isinstance(turns, list):
        raise UnusableError(DropReason.unparsable)
    read = [_read_turn(turn) for turn in turns]
    system = find_text(line, "system", "system_prompt")
    if system and read[0].role != "system":
        read.insert(0, Turn(role="system", content=system))
    return read


def _read_turn(turn: Any) -> Turn:
    """Read a ShareGPT turn, or a message."""
    if type(turn) is not dict or "from" not in turn:
        return read_message(turn)
    speaker, content = turn["from"], turn.get("value")
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if isinstance(content, str) and role is not None:
        return Turn(role=role, content=content)
    return read_message({"role": role, "content": content})


def _messages_up_to(turns: list[Turn], end: int) -> list[Turn]:
    """Give the messages of the record whose answer is turn `end`, or that has none yet."""
    check_prompt(turns[:end])
    answer = turns[end : end + 1]
    if answer and not answer[0].content and not answer[0].tool_calls:
        raise UnusableError(DropReason.empty_output)
    # Own objects for each record, because later steps rewrite messages in place.
    return [_copy(turn) for turn in turns[: end + 1]]


def _copy(turn: Turn) -> Turn:
    return replace(turn, tool_calls=[dict(call) for call in turn.tool_calls or ()] or None)


def recognises(line: dict[str, Any]) -> bool:
    """Tell whether a line is a conversation without any key of a served call."""
    turns = find(line, "conversations", "messages")
    return turns is not None and not any(key in line for key in OTHER_FORMATS)


FORMAT = LogFormat(name=SOURCE, read=per_line(adapt), recognises=recognises)
