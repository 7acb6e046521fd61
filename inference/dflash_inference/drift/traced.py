"""Our own traces as rows: what replay, `evaluate` or a decoder of ours wrote down step by step."""

import hashlib
import math

import numpy as np

from dflash_inference.comparison_sides import Side, read_side
from dflash_inference.trace import TRAFFIC_SPLIT
from dflash_train.records.served import SERVED_ROW, ServedRows


def rows_of_traces(places: list[str]) -> ServedRows:
    """Give a row for each request with a verify step, in the order in which they stand.

    Args:
        places: Trace files, or run folders, of which the held-out traffic is taken.

    Raises:
        ValueError: A place holds no traces, or damaged ones.
    """
    return ServedRows.joined([_rows_of(read_side(place)) for place in places])


def _rows_of(side: Side) -> ServedRows:
    tenants: dict[str, int] = {}
    found: list[tuple[float | int, ...]] = []
    others = 0
    for row in side.rows.values():
        if side.splits.get(row.id, TRAFFIC_SPLIT) != TRAFFIC_SPLIT:
            others += 1
            continue
        trace = side.traces.get(row.id)
        decode_s = math.nan if trace is None or not trace.decode_s else trace.decode_s
        found.append(
            (
                math.nan, row.tokens * row.weight, row.steps * row.weight, decode_s * row.weight,
                math.nan, -1 if trace is None else trace.prompt_length,
                tenants.setdefault(row.group, len(tenants)), 0, _number(row.conversation), 0,
            )
        )  # fmt: skip
    return ServedRows(
        rows=np.array(found, SERVED_ROW),
        tenants=list(tenants),
        read=len(side.rows),
        dropped={"evaluation_set": others} if others else {},
    )


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) or 1
