"""vLLM's own log -> rows: it tells the acceptance of all requests together every few seconds.

    INFO 09-16 05:26:57 [metrics.py:120] SpecDecoding metrics: Mean acceptance length: 2.25, ...,
    Accepted: 90 tokens, Drafted: 504 tokens, Per-position acceptance rate: 0.7, ..., Avg Draft ...

Its request lines carry no acceptance, so a row is one such interval. Steps are drafted tokens over
positions; where a server changes its depth they follow from the rounded mean.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from dflash_data.adapters.fields import utc_timestamp
from dflash_data.adapters.log_format import Line
from dflash_data.adapters.vllm_log import FULL_TIME
from dflash_data.drops import Drop
from dflash_data.served.readings import IDLE
from dflash_train.config import parse_moment
from dflash_train.records.served import SERVED_ROW, ServedRows

SPEC_DECODING = b"SpecDecoding metrics: "
FIELDS = re.compile(
    rb"Mean acceptance length: (?P<length>[\d.]+),.*?"
    rb"\bAccepted: (?P<accepted>\d+) tokens, Drafted: (?P<drafted>\d+) tokens, "
    rb"Per-position acceptance rate: (?P<rates>[\d., ]*\d)"
)
ENGINE = re.compile(rb"Engine (\d+)")
ROUNDING = 0.0051
"""The mean is printed with two decimals."""


def rows_of_server_log(lines: Iterable[Line | Drop]) -> ServedRows:
    """Give the intervals that the lines of a vLLM log tell; other lines are passed over."""
    found: list[tuple[Any, ...]] = []
    positions: list[list[float]] = []
    names: dict[str, int] = {}
    dropped = {"unparsable": 0, IDLE: 0}
    for line in lines:
        if isinstance(line, Drop):
            dropped["unparsable"] += 1
            continue
        start = line.text.find(SPEC_DECODING)
        if start < 0:
            continue
        told = FIELDS.search(line.text, start)
        if told is None:
            dropped["unparsable"] += 1
            continue
        rates = [float(rate) for rate in told["rates"].split(b",")]
        steps = _steps(told, len(rates))
        if steps <= 0:
            dropped[IDLE] += 1
            continue
        engine = ENGINE.search(line.text)
        name = f"engine {int(engine[1])}" if engine else "engine"
        place = names.setdefault(name, len(names))
        tokens = steps + int(told["accepted"])
        moment = _moment(line.text, start)
        found.append((moment, tokens, steps, math.nan, math.nan, -1, place, 0, 0, 0))
        positions.append([rate * steps for rate in rates])
    width = max((len(each) for each in positions), default=0)
    counted = np.array([each + [0.0] * (width - len(each)) for each in positions], float)
    return ServedRows(
        rows=np.array(found, SERVED_ROW),
        tenants=list(names),
        unit="intervals",
        accepted_at=counted if width else None,
        read=len(found) + sum(dropped.values()),
        dropped=dropped,
    )


def _steps(told: re.Match[bytes], num_positions: int) -> float:
    accepted, length = int(told["accepted"]), float(told["length"])
    full = int(told["drafted"]) / num_positions
    if full and abs(1 + accepted / full - length) <= ROUNDING:
        return full
    return accepted / (length - 1) if length > 1 else full


def _moment(text: bytes, end: int) -> float:
    """Give the time before the message where it has a year; else nan."""
    found = FULL_TIME.search(text, 0, end)
    moment = utc_timestamp(found[0].decode().replace(",", ".")) if found else None
    return math.nan if moment is None else parse_moment(moment).timestamp()
