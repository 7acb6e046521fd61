"""A drift finding as tables for a terminal."""

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dflash_inference.drift.findings import Drift, StreamFinding
from dflash_inference.drift.payback import Payback
from dflash_inference.drift.shares import Division, Estimate, TenantShares
from dflash_inference.drift.streams import CONTENT, TRAFFIC

MOST_ROWS = 20
SMALLEST_CHANCE = 1e-9
"""A bound on chance below is shown as this: nobody's model of a log is better."""
LOWER_NOW = "lower at this look"
"""The interval holds for one look at one tenant, an alarm for all looks at all of them."""
NAMES = {TRAFFIC: "traffic: mix included", CONTENT: "content: mix taken out"}


def print_drift(drift: Drift, console: Console) -> None:
    """Print all tables and sentences."""
    console.print(Group(*_pieces(drift)))


def _pieces(drift: Drift) -> Iterator[RenderableType]:
    yield Text(
        f"{drift.num_rows} {drift.unit} with served acceptance of {drift.read} read; reference: "
        f"the first {drift.num_reference}"
    )
    dropped = ", ".join(f"{reason} {count}" for reason, count in drift.dropped.items() if count)
    if dropped:
        yield Text(f"not counted: {dropped}")
    for title, table in _tables(drift):
        yield Text(f"\n{title}", style="italic")
        yield table
    if drift.payback is not None:
        yield Text(payback_sentence(drift.payback))
    for remark in drift.remarks:
        yield Text(f"note: {remark}")
    yield Text(_verdict_sentence(drift), style="bold red" if drift.has_fallen else "bold")


def _tables(drift: Drift) -> Iterator[tuple[str, Table]]:
    """Yield tables with their titles, which are not bound to a table's width."""
    if drift.division is None:
        yield "Acceptance length, too few for a claim", _level_table(drift)
    yield "Watched, one after the other", _watched_table(drift)
    if drift.division is not None:
        yield "Acceptance length by tenant", _tenant_table(drift, drift.division)
        yield (
            f"What the change is made of, over {drift.num_current} {drift.unit}",
            _parts_table(drift.division),
        )
    if drift.positions is not None:
        yield "Steps that kept their i-th draft", _position_table(*drift.positions)


def _table(*heads: str) -> Table:
    table = Table()
    for head in heads:
        table.add_column(head, no_wrap=True)
    return table


def _level_table(drift: Drift) -> Table:
    table = _table("", "acceptance length", drift.unit)
    for level in drift.levels:
        table.add_row(level.name, f"{level.pooled:.2f}", str(level.num_rows))
    return table


def _watched_table(drift: Drift) -> Table:
    table = _table("stream", "verdict", "chance", "falls from", "since", "noticed", "after")
    for stream in _shown(drift):
        table.add_row(
            NAMES.get(stream.name, stream.name),
            _word(stream),
            *_looked_for(stream),
            _when(stream.onset_at, stream.onset_row),
            _when(stream.alarm_at, stream.alarm_row),
            "-" if stream.num_to_notice is None else f"{stream.num_to_notice} {drift.unit}",
        )
    return table


def _looked_for(stream: StreamFinding) -> tuple[str, str]:
    """Give the bound on chance and the smallest fall that is looked for."""
    watched = stream.watched
    if watched.fall is None:
        return "-", "-"
    is_tiny = watched.chance < SMALLEST_CHANCE
    chance = f"< {SMALLEST_CHANCE:g}" if is_tiny else f"{watched.chance:.2g}"
    return chance, f"{watched.fall:.0%}"


def _when(time: str | None, row: int | None) -> str:
    """Give a time to the minute, else the row."""
    if row is None:
        return "-"
    return f"row {row}" if time is None else time[:16].replace("T", " ")


def _shown(drift: Drift) -> list[StreamFinding]:
    """Give whole streams, then tenants with alarms first."""
    return sorted(drift.streams, key=lambda each: (each.name not in NAMES, not each.has_fallen))[
        :MOST_ROWS
    ]


def _tenant_table(drift: Drift, division: Division) -> Table:
    table = _table("tenant", "before", "now", "change", "share of tokens", "verdict")
    for tenant in division.tenants[:MOST_ROWS]:
        name = drift.name_of(tenant)
        shares = f"{tenant.token_share_before:.0%} -> {tenant.token_share_now:.0%}"
        table.add_row(
            name, _length(tenant.reference), _length(tenant.current), _percent(tenant.relative),
            shares, _tenant_word(tenant, drift.stream_of(name)),
        )  # fmt: skip
    table.add_row(
        "all", _length(division.reference), _length(division.current),
        _percent(division.relative), "", "",
    )  # fmt: skip
    return table


def _parts_table(division: Division) -> Table:
    table = _table("part", "tokens per step", "95 % interval", "share of the change")
    for label, part in (
        ("mix: tenants ask for other shares", division.tenant_mix),
        ("mix: a tenant's kinds of prompts do", division.kind_mix),
        ("content: the same kind, other text", division.content),
        ("all", division.change),
    ):
        share = division.share_of(part)
        low, high = part.interval.low, part.interval.high
        table.add_row(
            label, f"{part.value:+.3f}", f"{low:+.3f} to {high:+.3f}",
            "change may be chance" if share is None else f"{share:.0%}",
        )  # fmt: skip
    return table


def _position_table(before: list[float], now: list[float]) -> Table:
    table = _table("", *(str(place) for place in range(1, len(before) + 1)))
    for label, shares in (("before", before), ("now", now)):
        table.add_row(label, *(f"{share:.2f}" for share in shares))
    return table


def payback_sentence(payback: Payback) -> str:
    """Say when a tuning would pay, or what is missing to know it."""
    if payback.days is None or payback.saved_per_day is None or payback.gain is None:
        return f"When tuning pays is not known without {', '.join(payback.missing)}."
    days, saved = payback.days, payback.saved_hours_per_day
    assert saved is not None
    low, high = _days(days.interval.low), _days(days.interval.high)
    return (
        f"Tuning pays after {_days(days.value)} (95 % interval {low} to {high}): a run of "
        f"{payback.run_hours:.3g} h costs {payback.cost:.4g} and saves {saved.value:.3g} server "
        f"hours a day, worth {payback.saved_per_day.value:.4g}. Counted with "
        f"{payback.tokens_per_day:.4g} tokens a day, {payback.tpot_ms:.3g} ms per token at "
        f"{payback.requests_at_once:g} requests at once, and a gain of {payback.gain.value:.1%}, "
        f"from {payback.gain_from}."
    )


def _days(days: float) -> str:
    return "never" if days == float("inf") else f"{days:.2g} days"


def _verdict_sentence(drift: Drift) -> str:
    names = [NAMES.get(each.name, each.name) for each in drift.streams if each.has_fallen]
    return f"Verdict: {drift.verdict}" + (f": {', '.join(names[:MOST_ROWS])}" if names else "")


def _word(stream: StreamFinding) -> str:
    if stream.watched.fall is None:
        return "too few"
    return "fell" if stream.has_fallen else "no fall beyond chance"


def _tenant_word(tenant: TenantShares, stream: StreamFinding | None) -> str:
    if tenant.reference is None and tenant.current is not None:
        return "new"
    if stream is not None and (stream.has_fallen or stream.watched.fall is None):
        return _word(stream)
    if tenant.relative is not None and tenant.relative.interval.high < 0:
        return LOWER_NOW
    return "no fall beyond chance" if stream is not None else "too few to be watched"


def _length(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.value:.2f} ({estimate.interval.low:.2f} to {estimate.interval.high:.2f})"


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    low, high = estimate.interval.low, estimate.interval.high
    return f"{estimate.value:+.1%} ({low:+.1%} to {high:+.1%})"
