"""Tolerant look-up in logged JSON: snake_case or camelCase, JSON or JSON inside a string.

Adapters call these functions several times for each line of a log, so each has a short way
for what logs usually hold: spellings are computed once per name, nesting is measured only in
values that are stored as they are, and a time that is RFC 3339 UTC already is kept.
"""

import functools
import hashlib
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import orjson

from dflash_data.drops import DropReason, UnusableError

MAX_DEPTH = 96
"""Deepest nesting of a stored value; orjson writes no more than 254, our own levels included."""
CONTAINERS = (dict, list)
RFC_3339_MARKS = "--T::Z"
"""Every third character of `2026-10-14T08:40:00Z` from the first dash on."""
EPOCH = datetime(1970, 1, 1)
"""Without a zone, since a text without one is written in half the time."""
LAST_SECOND = 10**11
"""Larger numbers are finer than seconds; until the year 5138."""
NANOSECOND_DIGITS = 19
"""Digits of nanoseconds since 1970, from 2001 to 2286."""
MAX_DIGITS = 18
"""Digits of a whole number in a string that always fits the 64 bits of JSON writers."""


def parse_json(text: bytes | str) -> Any:
    """Give the JSON value of a text; it may be nested up to the 1024 levels that orjson reads.

    Raises:
        UnusableError: It is no JSON.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise UnusableError(DropReason.unparsable) from None


def parse_object(text: bytes | str) -> dict[str, Any]:
    """Give the JSON object of a text, for example a log line.

    Raises:
        UnusableError: It is no JSON object.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise UnusableError(DropReason.unparsable) from None
    if type(value) is not dict:
        raise UnusableError(DropReason.unparsable)
    return value


def storable(value: Any) -> Any:
    """Give a logged value that is stored as it is.

    Raises:
        UnusableError: It is nested deeper than any real request, so that no record could hold it.
    """
    if type(value) in CONTAINERS and _is_deeper(value, MAX_DEPTH):
        raise UnusableError(DropReason.unparsable)
    return value


def as_text(value: Any) -> str:
    """Give a text as it is, any other value as JSON.

    Raises:
        UnusableError: It is nested deeper than JSON can be written.
    """
    if isinstance(value, str):
        return value
    return orjson.dumps(storable(value)).decode()


def find(mapping: Mapping[str, Any], *names: str) -> Any:
    """Give the first value that is present and not null under any spelling of the names."""
    value = mapping.get(names[0])
    if value is not None:
        return value
    for spelling in _OTHER_SPELLINGS[names]:
        value = mapping.get(spelling)
        if value is not None:
            return value
    return None


def find_object(mapping: Mapping[str, Any], *names: str) -> dict[str, Any] | None:
    """Give a nested object, read from a string if the log holds it as one; None if absent.

    Raises:
        UnusableError: The value is there but is no object.
    """
    value = mapping.get(names[0])
    if type(value) is dict:  # nearly always
        return value
    value = find(mapping, *names)
    if value is None or isinstance(value, dict):
        return value
    if isinstance(value, str):
        return parse_object(value)
    raise UnusableError(DropReason.unparsable)


def find_text(mapping: Mapping[str, Any], *names: str) -> str | None:
    """Give an identifier or name as text; None if it is absent or no string or whole number."""
    value = mapping.get(names[0])
    if type(value) is str and value:  # nearly always
        return value
    value = find(mapping, *names)
    if isinstance(value, str):
        return value or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None


def read_count(value: Any) -> int | None:
    """Give a whole number >= 0, also from a string of digits; None for anything else."""
    if type(value) is int and value >= 0:
        return value
    if isinstance(value, str) and len(value) <= MAX_DIGITS and value.isdecimal():
        return int(value)
    return None


def find_flag(mapping: Mapping[str, Any], *names: str) -> bool:
    """Tell whether a flag is set: true, also as the string that some exporters write."""
    value = find(mapping, *names)
    return value is True or (isinstance(value, str) and value.lower() == "true")


def read_number(value: Any) -> Any:
    """Give the number that a string holds; anything else stays."""
    if not isinstance(value, str):
        return value
    try:
        if len(value) <= MAX_DIGITS and value.removeprefix("-").isdecimal():
            return int(value)
        number = float(value)
    except ValueError:
        return value
    return number if math.isfinite(number) else value


@cache
def spellings(names: tuple[str, ...]) -> tuple[str, ...]:
    """Give every spelling of the names in order: as written, then in camelCase."""
    return tuple(dict.fromkeys(form for name in names for form in (name, _camel_case(name))))


class _OtherSpellings(dict[tuple[str, ...], tuple[str, ...]]):
    """All spellings of names but the first; a look-up here costs half of a cached call."""

    def __missing__(self, names: tuple[str, ...]) -> tuple[str, ...]:
        others = self[names] = spellings(names)[1:]
        return others


_OTHER_SPELLINGS = _OtherSpellings()


def utc_timestamp(value: Any) -> str | None:
    """Give a logged time as RFC 3339 UTC; None if it is absent or cannot be read.

    Numbers are seconds since 1970, or milli-, micro- or nanoseconds if they are that large. A
    text without a zone is taken as UTC.
    """
    if type(value) is int and 0 <= value <= LAST_SECOND:
        return _at(value) + "Z"
    if isinstance(value, str):
        if value[4:5] == "-":
            return _rfc3339(value)
        if len(value) == NANOSECOND_DIGITS and value.isdecimal():  # OpenTelemetry's
            return _at(int(value[:10])) + _fraction(value[10:16]) + "Z"
        try:
            value = float(value)
        except ValueError:
            return _rfc3339(value)
    if type(value) not in (int, float) or not math.isfinite(value):
        return None
    if value > LAST_SECOND:
        value /= 1e3 if value < 1e14 else 1e6 if value < 1e17 else 1e9
    try:
        if value == (seconds := int(value)):
            return _at(seconds) + "Z"
        return (EPOCH + timedelta(0, value)).isoformat() + "Z"
    except OverflowError:
        return None


def record_id(source: str, source_id: str, turn: int) -> str:
    """Give `sha256:` over source, source id and turn: the same on every run over the same log."""
    digest = hashlib.sha256(orjson.dumps([source, source_id, turn])).hexdigest()
    return f"sha256:{digest}"


def _at(seconds: int) -> str:
    """Give the time of whole seconds since 1970, without zone."""
    minute, second = divmod(seconds, 60)
    return f"{_minute(minute)}{second:02}"


def _fraction(microseconds: str) -> str:
    return "" if microseconds == "000000" else "." + microseconds


@functools.lru_cache(maxsize=4096)
def _minute(number: int) -> str:
    """Give the time up to the seconds, `2026-11-22T10:00:`, of a minute since 1970."""
    return (EPOCH + timedelta(minutes=number)).isoformat()[:-2]


def _rfc3339(text: str) -> str | None:
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            return moment.isoformat() + "Z"
        if len(text) == 20 and text[4::3] == RFC_3339_MARKS:
            return text
        if len(text) == 24 and text[4:20:3] == RFC_3339_MARKS[:-1] + "." and text[23] == "Z":
            return text[:19] + ("" if text[20:23] == "000" else text[19:23] + "000") + "Z"
        return moment.astimezone(UTC).isoformat()[:-6] + "Z"
    except (ValueError, OverflowError):
        return None


def _camel_case(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _is_deeper(value: Any, limit: int) -> bool:
    """Tell whether lists and objects are nested more than `limit` deep, one level at a time."""
    level: list[Any] = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in CONTAINERS
        ]
        if not level:
            return False
    return True
