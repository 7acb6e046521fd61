"""Readings of a server's counters -> rows: each is what happened between two of them.

A counter that fell says that the server was started anew: then all that it shows has happened
since, and what came between the last reading and the stop is lost. A server's totals do not tell
requests apart, so a row is an interval, and its tenant is the engine.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from dflash_data.served.intervals import Intervals
from dflash_data.served.prometheus import Totals
from dflash_train.records.served import ServedRows


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
    intervals = Intervals(num_unparsable=num_unreadable)
    for reading in readings:
        for engine, totals in reading.engines.items():
            before = last.get((reading.server, engine))
            last[reading.server, engine] = totals
            if before is None:
                continue
            happened = _between(before, totals)
            steps = _steps(happened)
            if not steps > 0:
                intervals.num_idle += 1
                continue
            intervals.add(
                f"{reading.server} {engine}".strip(),
                moment=reading.moment,
                tokens=steps + happened.accepted if happened.drafts > 0 else happened.tokens,
                steps=steps,
                accepted_at=happened.accepted_at,
                decode_s=happened.decode_s,
            )
    return intervals.rows()


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
