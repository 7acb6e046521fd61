"""W&B Weave's call export: operations whose name ends in a chat-completion call.

    {"id": ..., "op_name": ".../op/openai.chat.completions.create:1f9", "trace_id": ...,
     "parent_id": null, "started_at": ..., "exception": null,
     "inputs": {"model": ..., "messages": [...]}, "output": {"choices": [...]}}

Other operations of a trace are passed over. Weave logs a call at each layer that it knows:
a client library and the gateway library around it both report the same completion. The
second report within one trace is a duplicate, unless the completions have ids that differ.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import sha256
from typing import Any

import orjson

from dflash_data.adapters.completion import read_usage, with_answer
from dflash_data.adapters.fields import (
    find,
    find_object,
    find_text,
    parse_object,
    record_id,
    utc_timestamp,
)
from dflash_data.adapters.log_format import Line, LogFormat
from dflash_data.adapters.messages import num_answers, read_messages, read_sampling, read_tools
from dflash_data.drops import Call, Drop, DropReason, UnusableError
from dflash_train.records.conversation import Conversation

SOURCE = "weave"
CHAT_OPERATION = re.compile(
    r"(?:chat\.completions?\.(?:create|parse|stream)|chat\.complete|chat_completion|\ba?completion)"
    r"(?::[\w*-]+)?$",
    re.IGNORECASE,
)
"""Ends of operation names that are chat completions, with the version that Weave appends."""
MAX_REMEMBERED = 16_384
"""Latest completions that are remembered; the layers of one call are logged close together."""


def adapt(call: dict[str, Any], place: str) -> list[Call]:
    """Give the completion of one Weave call, nothing if it is another operation.

    Args:
        call: One exported object.
        place: Where it stands; identifies the call if the export has no id.

    Raises:
        UnusableError: It is a chat completion without usable content.
    """
    operation = find(call, "op_name")
    if not isinstance(operation, str):
        raise UnusableError(DropReason.unparsable)
    if not _is_chat(operation):
        return []
    if call.get("exception") is not None:
        raise UnusableError(DropReason.not_success)
    request = find_object(call, "inputs") or {}
    response = find_object(call, "output") or {}
    messages = read_messages(request.get("messages"))
    turn = num_answers(messages)
    source_ref = find_text(call, "id")
    record = Conversation(
        id=record_id(SOURCE, source_ref or place, turn),
        source=SOURCE,
        source_ref=source_ref,
        ts=utc_timestamp(find(call, "started_at")),
        model=find_text(response, "model") or find_text(request, "model"),
        messages=messages,
        tools=read_tools(request),
        sampling=read_sampling(request),
        usage=_usage(call, response),
        session=find_text(call, "thread_id"),
        tenant=find_text(request, "user"),
        turn=turn,
        on_policy_reason="no_answer",
    )
    return with_answer(record, response)


def read(lines: Iterable[Line]) -> Iterator[Call]:
    """Give the calls of an export; a completion that its trace repeats is a duplicate."""
    reported: OrderedDict[bytes, str | None] = OrderedDict()
    for line in lines:
        try:
            call = parse_object(line.text)
            records = adapt(call, line.place)
            if records and _is_repeat(call, records[0], reported):
                records = [Drop(DropReason.duplicate)] * len(records)
            yield from records
        except UnusableError as unusable:
            yield Drop(unusable.reason)


def _is_repeat(
    call: dict[str, Any], record: Call, reported: OrderedDict[bytes, str | None]
) -> bool:
    """Tell whether the trace reported this completion before; remember it if not.

    Args:
        call: The exported object.
        record: What was read from it.
        reported: Hash of trace, last message and answer -> id of the completion, if it had one.
    """
    trace = find_text(call, "trace_id")
    if trace is None or isinstance(record, Drop):
        return False
    last = [[turn.role, turn.content, turn.tool_calls] for turn in record.messages[-2:]]
    key = sha256(orjson.dumps([trace, record.turn, last])).digest()
    completion_id = find_text(find_object(call, "output") or {}, "id")
    if key in reported:
        known_ids = {reported[key], completion_id} - {None}
        return len(known_ids) < 2
    reported[key] = completion_id
    if len(reported) > MAX_REMEMBERED:
        reported.popitem(last=False)
    return False


@lru_cache(maxsize=1024)
def _is_chat(operation: str) -> bool:
    """Tell whether an operation is a chat completion; a trace has few different ones."""
    return CHAT_OPERATION.search(operation) is not None


def _usage(call: dict[str, Any], response: dict[str, Any]) -> dict[str, int]:
    usage = find_object(response, "usage")
    if usage:
        return read_usage(usage)
    by_model = find(find_object(call, "summary") or {}, "usage")
    models = list(by_model.values()) if isinstance(by_model, dict) else []
    return read_usage(models[0]) if len(models) == 1 and isinstance(models[0], dict) else {}


def recognises(line: dict[str, Any]) -> bool:
    """Tell whether a line is a call of an operation."""
    return find(line, "op_name") is not None and "inputs" in line


FORMAT = LogFormat(name=SOURCE, read=read, recognises=recognises, joins_lines=True)
