"""What can be compared: a run folder, its traces, a report, or one file of traces.

One trace format serves replay, our decoder, the official package and vLLM, so any two of these can
stand on the two sides of a comparison.
"""

from dataclasses import dataclass, field
from pathlib import Path

from dflash_inference.report_file import REPORT_FILE, read_report, report_rows
from dflash_inference.request_rows import RequestRow, rows_of
from dflash_inference.trace import TRAFFIC_SPLIT, DecodeTrace, read_traces
from dflash_train.config import require

KINDS = ("replay", "live", "plain", "lookup", "foreign")
"""Ways of decoding whose traces a run folder holds."""


@dataclass(kw_only=True)
class Side:
    """One side of a comparison."""

    place: str
    rows: dict[str, RequestRow]
    """By request id."""
    splits: dict[str, str] = field(default_factory=dict)
    """Split by request id; empty where a single file does not say."""
    traces: dict[str, DecodeTrace] = field(default_factory=dict)
    """By request id; empty if the side is a report, which holds sums only."""
    ceiling: int
    """Most tokens that a step can commit."""


def read_side(place: str, *, kind: str = "replay") -> Side:
    """Read one side of a comparison.

    Args:
        place: A run folder, its `traces` or `report` folder, a `report.json`, or a trace file.
        kind: Which traces of a run folder: one of `KINDS`.

    Raises:
        ValueError: There is nothing to compare there, or it is damaged.
    """
    require(kind in KINDS, f"kind (={kind}) must be one of {', '.join(KINDS)}.")
    path = Path(place)
    if path.is_file():
        is_report = path.suffix == ".json"
        return _side_of_report(path) if is_report else _side_of_traces(place, {"": path})
    for folder in (path / "traces", path):
        files = {split: file for split, file in _trace_files(folder, kind)}
        if files:
            return _side_of_traces(place, files)
    for report in (path / REPORT_FILE, path / "report" / REPORT_FILE):
        if report.is_file():
            return _side_of_report(report)
    raise ValueError(
        f"{place} holds no {kind} traces and no {REPORT_FILE}. Give a run folder, a report or a "
        f"trace file; kind={'|'.join(KINDS)} chooses among a run's traces."
    )


def _side_of_report(path: Path) -> Side:
    by_split = report_rows(path)
    named = [(split, row) for split, rows in by_split.items() for row in rows]
    return Side(
        place=str(path),
        rows=_by_id([row for _, row in named], path),
        splits={row.id: split for split, row in named},
        ceiling=read_report(path)["acceptance_length"]["ceiling"],
    )


def _side_of_traces(place: str, files: dict[str, Path]) -> Side:
    side = Side(place=place, rows={}, ceiling=1)
    for split, path in files.items():
        traces = read_traces(path)
        rows = _by_id(rows_of(traces), path)
        _by_id([RequestRow.of(trace) for trace in traces], path)  # those without a step, too
        side.rows |= rows
        side.traces |= {trace.id: trace for trace in traces}
        side.splits |= {trace.id: split for trace in traces if split}
        levels = (step.num_levels for trace in traces for step in trace.steps)
        side.ceiling = max(side.ceiling, 1 + max(levels, default=0))
    return side


def _trace_files(folder: Path, kind: str) -> list[tuple[str, Path]]:
    """List split and file of one way of decoding; live and plain mix the splits in one file."""
    if kind in ("live", "plain"):
        path = folder / f"{kind}.jsonl"
        return [("", path)] if path.is_file() else []
    files = sorted(folder.glob(f"{kind}-*.jsonl"))
    found = [(path.stem.removeprefix(f"{kind}-"), path) for path in files]
    return sorted(found, key=lambda each: (each[0] != TRAFFIC_SPLIT, each[0]))


def _by_id(rows: list[RequestRow], path: Path) -> dict[str, RequestRow]:
    by_id = {row.id: row for row in rows}
    require("" not in by_id, f"{path} holds a request without id: nothing says what to pair it to.")
    require(
        len(by_id) == len(rows),
        f"{path} holds {len(rows) - len(by_id)} requests whose id another one has. Each needs its "
        "own, or pairs are a matter of chance.",
    )
    return by_id
