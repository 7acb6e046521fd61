"""Tolerant look-up in logged JSON: snake_case or camelCase, JSON or JSON inside a string."""

import hashlib
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson

from dflash_data.drops import DropReason, UnusableError

MAX_DEPTH = 64
"""Deepest nesting of a logged value; orjson cannot write much deeper ones."""


def parse_json(text: bytes | str) -> Any:
    """Give the JSON value of a text.

    Raises:
        UnusableError: It is no JSON, or nested deeper than any real request.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise UnusableError(DropReason.unparsable) from None
    if isinstance(value, (dict, list)) and _is_deeper(value, MAX_DEPTH):
        raise UnusableError(DropReason.unparsable)
    return value


def parse_object(text: bytes | str) -> dict[str, Any]:
    """Give the JSON object of a text, for example a log line.

    Raises:
        UnusableError: It is no JSON object.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise UnusableError(DropReason.unparsable)
    return value


def find(mapping: Mapping[str, Any], *names: str) -> Any:
    """Give the first value that is present and not null under any spelling of the names."""
    for name in names:
        for spelling in (name, _camel_case(name)):
            if mapping.get(spelling) is not None:
                return mapping[spelling]
    return None


def find_object(mapping: Mapping[str, Any], *names: str) -> dict[str, Any] | None:
    """Give a nested object, read from a string if the log holds it as one; None if absent.

    Raises:
        UnusableError: The value is there but is no object.
    """
    value = find(mapping, *names)
    if value is None or isinstance(value, dict):
        return value
    if isinstance(value, str):
        return parse_object(value)
    raise UnusableError(DropReason.unparsable)


def find_text(mapping: Mapping[str, Any], *names: str) -> str | None:
    """Give an identifier or name as text; None if it is absent or no string or whole number."""
    value = find(mapping, *names)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value else None


def utc_timestamp(value: Any) -> str | None:
    """Give a logged time as RFC 3339 UTC; None if it is absent or cannot be read.

    Numbers are seconds since 1970, or milliseconds if they are that large. A text without a
    zone is taken as UTC.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return _rfc3339(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return None
    seconds = value / 1000 if value > 1e11 else value
    try:
        return _utc_text(datetime.fromtimestamp(seconds, UTC))
    except (ValueError, OverflowError, OSError):
        return None


def record_id(source: str, source_id: str, turn: int) -> str:
    """Give `sha256:` over source, source id and turn: the same on every run over the same log."""
    digest = hashlib.sha256(orjson.dumps([source, source_id, turn])).hexdigest()
    return f"sha256:{digest}"


def _rfc3339(text: str) -> str | None:
    try:
        moment = datetime.fromisoformat(text)
        return _utc_text(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except (ValueError, OverflowError):
        return None


def _utc_text(moment: datetime) -> str:
    precision = "microseconds" if moment.microsecond else "seconds"
    return moment.astimezone(UTC).isoformat(timespec=precision).replace("+00:00", "Z")


def _camel_case(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _is_deeper(value: Any, limit: int) -> bool:
    level: list[Any] = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True
