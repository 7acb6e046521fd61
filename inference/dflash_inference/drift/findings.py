"""What is said about a log of served requests: levels, alarms, shares, and whether tuning pays."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import orjson

from dflash_inference.drift.alarm import FEWEST_OF_REFERENCE, Alarm, Watched
from dflash_inference.drift.cells import Ints
from dflash_inference.drift.payback import Payback, weigh
from dflash_inference.drift.shares import Division, Estimate, TenantShares, divide_change
from dflash_inference.drift.streams import (
    CONTENT,
    TRAFFIC,
    Stream,
    kinds_of,
    streams_of,
)
from dflash_inference.statistics import FEWEST_FOR_A_CLAIM
from dflash_train.config import DriftConfig, EvaluateConfig, require
from dflash_train.records.served import Rows, ServedRows

MOST_RESAMPLES = 2000
"""Of every cell; an interval's ends need no more."""
DAY_S = 86_400.0
SMALL_TENANTS = "small tenants"
MOST_LEVELS = 20


@dataclass(kw_only=True)
class StreamFinding:
    """What watching one stream came to."""

    name: str
    has_fallen: bool
    watched: Watched
    alarm_row: int | None
    """Row of the whole log with which the fall was certain."""
    alarm_at: str | None
    """RFC 3339 time of that row, where the log has times."""
    onset_row: int | None
    """Row from which on the fall is most likely."""
    onset_at: str | None
    num_to_notice: int | None
    """Rows of the whole log from the one to the other."""


@dataclass(kw_only=True)
class Level:
    """Pooled acceptance length of some rows."""

    name: str
    pooled: float
    num_rows: int


@dataclass(kw_only=True)
class Drift:
    """All that was found."""

    unit: str
    num_rows: int
    num_reference: int
    read: int
    dropped: dict[str, int]
    levels: list[Level]
    """Of all rows, then of each of the largest tenants."""
    streams: list[StreamFinding]
    tenant_names: list[str]
    division: Division | None
    """From the reference to the rows since the fall began, or to all behind it if none was found;
    None where there are too few."""
    num_current: int
    positions: tuple[list[float], list[float]] | None
    """Share of steps that kept their first, second, ... draft, before and now."""
    payback: Payback | None
    remarks: list[str]

    @property
    def has_fallen(self) -> bool:
        """Whether any stream raised an alarm."""
        return any(stream.has_fallen for stream in self.streams)

    @property
    def verdict(self) -> str:
        """Say what is known: `fell`, `no fall beyond chance`, or `too few requests`."""
        if self.has_fallen:
            return "fell"
        is_watched = any(stream.watched.fall is not None for stream in self.streams)
        return "no fall beyond chance" if is_watched else f"too few {self.unit}"

    def name_of(self, tenant: TenantShares) -> str:
        """Give the name of a tenant, a keyed hash where a log named it."""
        return SMALL_TENANTS if tenant.tenant < 0 else self.tenant_names[tenant.tenant]

    def stream_of(self, name: str) -> StreamFinding | None:
        """Give what watching came to; None for a tenant too small to be watched."""
        return next((stream for stream in self.streams if stream.name == name), None)

    def as_json(self) -> dict[str, Any]:
        """Give everything as JSON values; days without end are null."""
        plain = orjson.loads(orjson.dumps(self, option=orjson.OPT_SERIALIZE_NUMPY))
        for index, tenant in enumerate(self.division.tenants if self.division else []):
            plain["division"]["tenants"][index]["name"] = self.name_of(tenant)
        if self.division is not None:
            plain["shares"] = {
                name: self.division.share_of(getattr(self.division, name))
                for name in ("tenant_mix", "kind_mix", "content")
            }
        del plain["tenant_names"]
        return plain | {"has_fallen": self.has_fallen, "verdict": self.verdict}


def find_drift(
    served: ServedRows,
    *,
    config: DriftConfig,
    evaluate: EvaluateConfig,
    planned_hours: Callable[[], float | None] = lambda: None,
    measured_gain: Estimate | None = None,
) -> Drift:
    """Watch a log and say what is there.

    Args:
        served: The log, in order.
        config: How to watch, and what a tuning costs.
        evaluate: Resamples and seed of the bootstrap.
        planned_hours: Gives those of a tuning, where the settings leave them out.
        measured_gain: Of an earlier tuning, as a share of the acceptance length.

    Raises:
        ValueError: No row tells how well it was drafted for.
    """
    rows = served.rows
    require(
        len(rows) > 0,
        f"drift: none of {served.read} {served.unit} that were read tells how well it was drafted "
        "for. vLLM says so with --per-request-spec-decode-metrics summary, SGLang in its request "
        "log; or give drift.pages or drift.metrics_url, a server's counts.",
    )
    num_reference = min(config.reference_requests, len(rows) // 2)
    kinds = kinds_of(rows, config.kinds, num_reference=num_reference)
    streams = list(streams_of(served, kinds, num_reference=num_reference, config=config))
    first = _first_alarm(streams)
    start = _start_of_current(first, num_reference, len(rows))
    division = _division(rows, kinds, num_reference, start, evaluate)
    return Drift(
        unit=served.unit,
        num_rows=len(rows),
        num_reference=num_reference,
        read=served.read,
        dropped=served.dropped,
        levels=list(_levels(served)),
        streams=[_described(stream, rows) for stream in streams],
        tenant_names=served.tenants,
        division=division,
        num_current=len(rows) - start,
        positions=_positions(served, num_reference, start),
        payback=None
        if division is None
        else weigh(
            config,
            tokens_per_day=_tokens_per_day(rows[start:]),
            tpot_ms=_tpot_ms(rows[start:]),
            content_of_steps=division.content_of_steps,
            has_fallen=first is not None,
            planned_hours=planned_hours,
            measured_gain=measured_gain,
        ),
        remarks=list(_remarks(served, config, streams, num_reference, first)),
    )


def _levels(served: ServedRows) -> Iterator[Level]:
    rows = served.rows
    tokens, steps = float(rows["tokens"].sum()), float(rows["steps"].sum())
    yield Level(name="all", pooled=tokens / steps, num_rows=len(rows))
    by_tenant = [np.bincount(rows["tenant"], rows[name]) for name in ("tokens", "steps")]
    counts = np.bincount(rows["tenant"])
    for tenant in np.argsort(-by_tenant[0], kind="stable")[:MOST_LEVELS]:
        if counts[tenant]:
            yield Level(
                name=served.tenants[tenant],
                pooled=float(by_tenant[0][tenant] / by_tenant[1][tenant]),
                num_rows=int(counts[tenant]),
            )


def _first_alarm(streams: list[Stream]) -> Stream | None:
    """Give the stream that noticed first."""
    raised = [stream for stream in streams if stream.alarm_place is not None]
    return min(raised, key=lambda stream: stream.alarm_place or 0, default=None)


def _start_of_current(first: Stream | None, num_reference: int, num_rows: int) -> int:
    """Give the row with which the present begins: the onset of a fall, else the reference's end."""
    onset = None if first is None else first.onset_place
    if onset is None or num_rows - onset < FEWEST_FOR_A_CLAIM:
        return num_reference
    return onset


def _division(
    rows: Rows, kinds: Ints, num_reference: int, start: int, evaluate: EvaluateConfig
) -> Division | None:
    if min(num_reference, len(rows) - start) < FEWEST_OF_REFERENCE:
        return None
    return divide_change(
        rows[:num_reference],
        rows[start:],
        (kinds[:num_reference], kinds[start:]),
        resamples=min(evaluate.resamples, MOST_RESAMPLES),
        seed=evaluate.seed,
    )


def _described(stream: Stream, rows: Rows) -> StreamFinding:
    alarm, onset = stream.alarm_place, stream.onset_place
    return StreamFinding(
        name=stream.name,
        has_fallen=alarm is not None,
        watched=stream.watched,
        alarm_row=alarm,
        alarm_at=_time(rows, alarm),
        onset_row=onset,
        onset_at=_time(rows, onset),
        num_to_notice=None if alarm is None or onset is None else alarm - onset + 1,
    )


def _time(rows: Rows, place: int | None) -> str | None:
    if place is None or np.isnan(rows["moment"][place]):
        return None
    moment = datetime.fromtimestamp(float(rows["moment"][place]), UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def _positions(
    served: ServedRows, num_reference: int, start: int
) -> tuple[list[float], list[float]] | None:
    if served.accepted_at is None:
        return None
    before, now = (
        served.accepted_at[part].sum(axis=0) / served.rows["steps"][part].sum()
        for part in (slice(0, max(1, num_reference)), slice(start, None))
    )
    return before.tolist(), now.tolist()


def _tokens_per_day(rows: Rows) -> float | None:
    """Give the rate over the time that rows cover; None without times or in no time."""
    moments = rows["moment"]
    if np.isnan(moments).any():
        return None
    span = float(moments.max() - moments.min())
    return float(rows["tokens"].sum()) / span * DAY_S if span > 0 else None


def _tpot_ms(rows: Rows) -> float | None:
    """Give decode time per token of the rows that know theirs; None if none does."""
    known = rows[~np.isnan(rows["decode_s"])]
    tokens = float(known["tokens"].sum())
    return 1000 * float(known["decode_s"].sum()) / tokens if tokens > 0 else None


def _remarks(
    served: ServedRows,
    config: DriftConfig,
    streams: list[Stream],
    num_reference: int,
    first: Stream | None,
) -> Iterator[str]:
    """Yield what a reader must know before believing the figures."""
    if np.isnan(served.rows["moment"]).any():
        yield "some rows have no time, so all are taken in the order in which they stand"
    if num_reference < config.reference_requests:
        yield (
            f"the reference is the first half, {num_reference} {served.unit}, fewer than "
            f"drift.reference_requests (={config.reference_requests})"
        )
    for stream in streams:
        fall = stream.watched.fall
        if stream.name in (CONTENT, TRAFFIC) and fall and fall > 1.001 * config.smallest_fall:
            yield (
                f"{stream.name}: {served.unit} differ too much for this reference, so falls from "
                f"{fall:.0%} on are looked for, not from {config.smallest_fall:.0%}"
            )
    if first is not None and _is_fresh(first.watched.alarm, first.watched.num_watched):
        yield (
            "the fall was noticed just now: its size and its shares rest on the rows that raised "
            "the alarm, and such rows overstate it"
        )


def _is_fresh(alarm: Alarm | None, num_watched: int) -> bool:
    return alarm is not None and num_watched - alarm.row < alarm.row - alarm.onset
