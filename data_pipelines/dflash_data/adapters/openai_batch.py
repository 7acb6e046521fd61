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
from dflash_data.adapters.fields import find_text, parse_object
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
                yield from _call_of_one_side(line)


def recognises(row: dict[str, Any]) -> bool:
    """Tell whether an object is a line of a batch's input or output."""
    return find_text(row, "custom_id") is not None and (is_request(row) or "response" in row)


def is_request(row: dict[str, Any]) -> bool:
    """Tell whether a line of a batch is of its input."""
    return row.get("body") is not None


FORMAT = LogFormat(
    name=SOURCE, read=read, recognises=recognises, joins_lines=True, is_request=is_request
)


def _join(line: Line, requests: WaitingLines, answers: WaitingLines) -> list[Call]:
    """Give the call of a line and its partner; nothing, if that is still to come."""
    row = parse_object(line.text)
    custom_id = find_text(row, "custom_id")
    if custom_id is None:
        raise UnusableError(DropReason.unparsable)
    is_asked = is_request(row)
    own, other = (requests, answers) if is_asked else (answers, requests)
    partner = other.take(custom_id)
    if partner is not None:
        other_row = parse_object(partner)
        request, answer = (row, other_row) if is_asked else (other_row, row)
        return _call_of(request, answer, line.place)
    return [] if own.put(custom_id, line) else [Drop(DropReason.content_missing)]


def _call_of_one_side(line: Line | None) -> list[Call]:
    """Give the call of a line without partner; no line stands for an id that several had."""
    if line is None:
        return [Drop(DropReason.content_missing)]
    try:
        row = parse_object(line.text)
        request, answer = (row, {}) if is_request(row) else ({}, row)
        return _call_of(request, answer, line.place)
    except UnusableError as unusable:
        return [Drop(unusable.reason)]


def _call_of(request: dict[str, Any], answer: dict[str, Any], place: str) -> list[Call]:
    pair = {
        "id": answer.get("id"),
        "request": request.get("body"),
        "response": answer.get("response"),
        "error": answer.get("error"),
    }
    return openai.read_pair(pair, place, source=SOURCE)
