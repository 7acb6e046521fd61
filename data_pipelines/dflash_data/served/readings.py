"""Readings of a server's counters -> rows: each is what happened between two of them.

A counter that fell says that the server was started anew: then all that it shows has happened
since, and what came between the last reading and the stop is lost. A server's totals do not tell
requests apart, so a row is an interval, and its tenant is the engine.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dflash_data.served.prometheus import Totals
from dflash_train.records.served import SERVED_ROW, ServedRows

IDLE = "idle_interval"
"""An interval in which no drafts were verified."""


@dataclass(kw_only=True)
class Reading:
    """What a server showed at one time."""

    moment: float
    """Seconds since 1970."""
    server: str
    """Which one, so that two are never compared."""
    engines: dict[str, Totals]

    def as_plain(self) -> dict[str, Any]:
        """Give JSON values; unknown numbers are null."""
        return asdict(self)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Reading":
        """Read what `as_plain` gave and JSON kept.

        Raises:
            KeyError: A field is missing.
            TypeError: A field is of another kind.
        """
        engines: dict[str, Totals] = {}
        for name, totals in plain["engines"].items():
            known = {key: value for key, value in totals.items() if value is not None}
            engines[name] = Totals(**known)
        return cls(moment=float(plain["moment"]), server=str(plain["server"]), engines=engines)


def rows_of_readings(readings: Iterable[Reading], *, num_unreadable: int = 0) -> ServedRows:
    """Give the intervals between readings of the same engine, in order of time.

    Args:
        readings: In order of time.
        num_unreadable: Lines or pages that were none; they are counted.
    """
    last: dict[tuple[str, str], Totals] = {}
    names: dict[str, int] = {}
    found: list[tuple[Any, ...]] = []
    positions: list[list[float]] = []
    dropped = {"unparsable": num_unreadable, IDLE: 0}
    for reading in readings:
        for engine, totals in reading.engines.items():
            before = last.get((reading.server, engine))
            last[reading.server, engine] = totals
            if before is None:
                continue
            happened = _between(before, totals)
            steps = _steps(happened)
            if not steps > 0:
                dropped[IDLE] += 1
                continue
            name = f"{reading.server} {engine}".strip()
            place = names.setdefault(name, len(names))
            tokens = steps + happened.accepted if happened.drafts > 0 else happened.tokens
            found.append(
                (reading.moment, tokens, steps, happened.decode_s, math.nan, -1, place, 0, 0, 0)
            )
            positions.append(happened.accepted_at)
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


def _between(before: Totals, now: Totals) -> Totals:
    """Give what was counted between two readings; all of the later one after a new start."""
    is_new_start = (
        now.drafts < before.drafts or now.accepted < before.accepted or now.tokens < before.tokens
    )
    if is_new_start:
        return now
    return Totals(
        drafts=now.drafts - before.drafts,
        draft_tokens=now.draft_tokens - before.draft_tokens,
        accepted=now.accepted - before.accepted,
        accepted_at=[
            count - (before.accepted_at[place] if place < len(before.accepted_at) else 0.0)
            for place, count in enumerate(now.accepted_at)
        ],
        decode_s=now.decode_s - before.decode_s,
        tokens=now.tokens - before.tokens,
        length=now.length,
    )


def _steps(happened: Totals) -> float:
    """Give verify steps: as counted, or tokens over the gauge that stands at the end."""
    return happened.drafts if happened.drafts > 0 else happened.tokens / happened.length
