"""Attributes of OpenTelemetry spans and events as one flat dict, whatever the exporter wrote.

OTLP-JSON has a list of keys with typed values, where whole numbers are strings; flattened
exports have an object, or the attributes beside the span's own fields.
"""

from collections import defaultdict
from typing import Any

from dflash_data.adapters.fields import read_number
from dflash_data.drops import DropReason, UnusableError

PREFIX = "attributes."
MAX_INDEX_DIGITS = 6


def read_attributes(holder: dict[str, Any]) -> dict[str, Any]:
    """Give the attributes of a span or an event by name.

    Raises:
        UnusableError: They are in no known form.
    """
    attributes = holder.get("attributes")
    if isinstance(attributes, list):
        return _read_pairs(attributes)
    if isinstance(attributes, dict):
        return attributes
    if attributes is not None:
        raise UnusableError(DropReason.unparsable)
    return {name.removeprefix(PREFIX): value for name, value in holder.items()}


def read_value(value: Any) -> Any:
    """Give the plain value of OTLP's typed one, like `{"intValue": "4"}`; others stay.

    Raises:
        UnusableError: A list or object inside is in no known form.
    """
    if type(value) is not dict or len(value) != 1:
        return value
    ((kind, inner),) = value.items()
    if kind in ("stringValue", "string_value", "boolValue", "bool_value"):
        return inner
    if kind in ("intValue", "int_value", "doubleValue", "double_value"):
        return read_number(inner)
    if kind in ("arrayValue", "array_value"):
        return [read_value(one) for one in _values(inner)]
    if kind in ("kvlistValue", "kvlist_value"):
        return _read_pairs(_values(inner))
    return value


def read_indexed(attributes: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    """Give the objects that were flattened as `prefix.0.name`, in the order of their index."""
    start = prefix + "."
    objects: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for name, value in attributes.items():
        if name.startswith(start):
            index, _, inner = name[len(start) :].partition(".")
            if inner and index.isdecimal() and len(index) <= MAX_INDEX_DIGITS:
                objects[int(index)][inner] = value
    return [objects[index] for index in sorted(objects)]


def _read_pairs(pairs: list[Any]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for pair in pairs:
        name = pair.get("key") if type(pair) is dict else None
        if type(name) is not str:
            raise UnusableError(DropReason.unparsable)
        value = pair.get("value")
        # Nearly every attribute is a string: no call for those.
        if type(value) is dict and len(value) == 1 and "stringValue" in value:
            read[name] = value["stringValue"]
        else:
            read[name] = read_value(value)
    return read


def _values(inner: Any) -> list[Any]:
    values = inner.get("values") if isinstance(inner, dict) else None
    if values is not None and not isinstance(values, list):
        raise UnusableError(DropReason.unparsable)
    return values or []
