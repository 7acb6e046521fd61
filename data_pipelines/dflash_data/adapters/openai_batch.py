"""OpenAI Batch: output lines joined with the lines of their input file on `custom_id`.

    {"custom_id": "row-17", "response": {"status_code": 200, "body": {...}}, "error": null}
    {"custom_id": "row-17", "method": "POST", "url": "/v1/chat/completions", "body": {...}}

The reader gets the lines of all files that belong together, requests first where they have a
file of their own. Whichever side of a call comes first is put aside: as a place in its file
where that can be read again, else as a compressed line in memory. A request that stays alone
has no answer yet; an answer that stays alone has no content.

Ids are unique within one batch only. Where two lines that wait share one, nothing says which
answer is whose, so neither is used: keep such batches in folders of their own.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from dflash_data.adapters import openai
from dflash_data.adapters.fields import find, find_text, parse_object
from dflash_data.adapters.log_format import Line, LogFormat
from dflash_data.adapters.waiting_lines import WaitingLines
from dflash_data.drops import Call, Drop, DropReason, UnusableError

SOURCE = "openai_batch"


def read(lines: Iterable[Line]) -> Iterator[Call]:
    """Give the call of each pair, then of each line that found no partner."""
    with WaitingLines() as requests, WaitingLines() as answers:
        for line in lines:
            try:
                yield from _join(line, requests, answers)
            except UnusableError as unusable:
                yield Drop(unusable.reason)
        for waiting in (requests, answers):
            for line in waiting.drain():
                yield from _call_of(line, None)


def recognises(row: dict[str, Any]) -> bool:
    """Tell whether an object is a line of a batch's input or output."""
    return find_text(row, "custom_id") is not None and (is_request(row) or "response" in row)


def is_request(row: dict[str, Any]) -> bool:
    """Tell whether a line of a batch is of its input."""
    return find(row, "body") is not None


FORMAT = LogFormat(
    name=SOURCE, read=read, recognises=recognises, joins_lines=True, is_request=is_request
)


def _join(line: Line, requests: WaitingLines, answers: WaitingLines) -> list[Call]:
    """Give the call of a line and its partner; nothing, if that is still to come."""
    row = parse_object(line.text)
    custom_id = find_text(row, "custom_id")
    if custom_id is None:
        raise UnusableError(DropReason.unparsable)
    own, other = (requests, answers) if is_request(row) else (answers, requests)
    partner = other.take(custom_id)
    if partner is not None:
        return _call_of(line, partner)
    return [] if own.put(custom_id, line) else [Drop(DropReason.content_missing)]


def _call_of(line: Line | None, partner: Line | None) -> list[Call]:
    """Give the call of one or both sides; no line stands for an id that several lines had."""
    if line is None:
        return [Drop(DropReason.content_missing)]
    try:
        rows = [parse_object(side.text) for side in (line, partner) if side is not None]
        request = next((row for row in rows if is_request(row)), {})
        answer = next((row for row in rows if not is_request(row)), {})
        pair = {
            "id": find(answer, "id"),
            "request": find(request, "body"),
            "response": find(answer, "response"),
            "error": find(answer, "error"),
        }
        return openai.read_pair(pair, line.place, source=SOURCE)
    except UnusableError as unusable:
        return [Drop(unusable.reason)]
