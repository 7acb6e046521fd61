from typing import Any

import pytest

from dflash_data.adapters.fields import (
    as_text,
    find,
    find_flag,
    find_object,
    find_text,
    parse_json,
    read_count,
    read_number,
    storable,
    utc_timestamp,
)
from dflash_data.drops import UnusableError


def test_first_name_that_is_not_null_wins_in_either_spelling():
    assert find({"a": None, "traceId": 3, "b": 4}, "a", "trace_id", "b") == 3
    assert find({"trace_id": 1, "traceId": 2}, "trace_id") == 1
    assert find({}, "trace_id") is None


@pytest.mark.parametrize(
    ("logged", "expected"),
    [
        ("2026-10-14T08:40:00Z", "2026-10-14T08:40:00Z"),
        ("2026-10-14T08:40:00.250Z", "2026-10-14T08:40:00.250000Z"),
        ("2026-10-14 08:40:00.000000", "2026-10-14T08:40:00Z"),
        ("2026-10-14T08:40:00+02:00", "2026-10-14T06:40:00Z"),
        ("2026-10-14", "2026-10-14T00:00:00Z"),
        ("20261014T084000.000Z", "2026-10-14T08:40:00Z"),
        ("2026-W42-3T08:40:00Z", "2026-10-14T08:40:00Z"),
        (1791967200, "2026-10-14T08:40:00Z"),
        (1791967200.25, "2026-10-14T08:40:00.250000Z"),
        (1791967200000, "2026-10-14T08:40:00Z"),
        ("1791967200000000000", "2026-10-14T08:40:00Z"),
        ("2026-13-14T08:40:00Z", None),
        ("0001-01-01T00:00:00+05:00", None),
        ("yesterday", None),
        (float("inf"), None),
        (1e300, None),
        (True, None),
        (None, None),
    ],
)
def test_times_of_every_form_become_rfc_3339_utc(logged: Any, expected: str | None):
    assert utc_timestamp(logged) == expected


def test_identifiers_counts_and_flags_tolerate_other_types():
    logged = {"a": "", "b": 7, "c": True, "d": "12", "e": "-1", "f": "True", "g": 1}
    assert [find_text(logged, key) for key in "abc"] == [None, "7", None]
    assert [read_count(logged.get(key)) for key in "bcde"] == [7, None, 12, None]
    assert [find_flag(logged, key) for key in "acfg"] == [False, True, True, False]
    assert [read_number(value) for value in ("-3", "0.5", "nan", "x", None)] == [
        -3,
        0.5,
        "nan",
        "x",
        None,
    ]


@pytest.mark.parametrize("value", ["no json", "[1]", 3, [1]])
def test_value_that_is_no_object_is_refused(value: Any):
    with pytest.raises(UnusableError, match="unparsable"):
        find_object({"inner": value}, "inner")


def test_nesting_of_stored_values_is_bounded_but_their_number_is_not():
    wide = parse_json("[" + "{}," * 500 + "{}]")
    assert storable(wide) is wide
    assert len(as_text(parse_json("[" * 90 + "]" * 90))) == 180
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        deep = parse_json(opening * 97 + "1" + closing * 97)
        with pytest.raises(UnusableError, match="unparsable"):
            storable(deep)
        with pytest.raises(UnusableError, match="unparsable"):
            as_text(deep)
