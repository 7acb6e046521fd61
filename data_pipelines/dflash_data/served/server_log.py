"""vLLM's own log -> rows: it tells the acceptance of all requests together every few seconds.

    INFO 09-16 05:26:57 [metrics.py:120] SpecDecoding metrics: Mean acceptance length: 2.25, ...,
    Accepted: 90 tokens, Drafted: 504 tokens, Per-position acceptance rate: 0.7, ..., Avg Draft ...

Its request lines carry no acceptance, so a row is one such interval. Steps are drafted tokens over
positions; where a server changes its depth they follow from the rounded mean.
"""

import math
import re
from collections.abc import Iterable

from dflash_data.adapters.fields import utc_timestamp
from dflash_data.adapters.log_format import Line
from dflash_data.adapters.vllm_log import FULL_TIME
from dflash_data.drops import Drop
from dflash_data.served.intervals import Intervals
from dflash_train.config import parse_moment
from dflash_train.records.served import ServedRows

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
    intervals = Intervals()
    for line in lines:
        if isinstance(line, Drop):
            intervals.num_unparsable += 1
            continue
        start = line.text.find(SPEC_DECODING)
        if start < 0:
            continue
        told = FIELDS.search(line.text, start)
        if told is None:
            intervals.num_unparsable += 1
            continue
        rates = [float(rate) for rate in told["rates"].split(b",")]
        steps = _steps(told, len(rates))
        if steps <= 0:
            intervals.num_idle += 1
            continue
        engine = ENGINE.search(line.text)
        intervals.add(
            f"engine {int(engine[1])}" if engine else "engine",
            moment=_moment(line.text, start),
            tokens=steps + int(told["accepted"]),
            steps=steps,
            accepted_at=[rate * steps for rate in rates],
        )
    return intervals.rows()


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
