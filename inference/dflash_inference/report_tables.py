"""The figures of a report as flat tables, for trackers that draw their own pictures."""

from dataclasses import dataclass, field
from typing import Any

from dflash_inference.slices import Findings

Row = list[Any]


@dataclass(kw_only=True)
class Table:
    """A table of plain values; None where nothing was measured."""

    columns: list[str]
    rows: list[Row] = field(default_factory=list)


_ESTIMATE = ["pooled", "low", "high", "per_request", "requests", "steps"]


def report_tables(findings: Findings) -> dict[str, Table]:
    """Give acceptance by slice, draft and length, speed, concurrency and predictions, by name.

    Tables without a row are left out.
    """
    tables = {
        "acceptance_length": Table(
            columns=["cut", "slice", *_ESTIMATE, "prompt_lookup"], rows=_length_rows(findings)
        ),
        "draft_positions": Table(
            columns=["draft", "offered", "kept", "joint", "conditional"],
            rows=_position_rows(findings["positions"]),
        ),
        "num_accepted": Table(
            columns=["num_accepted", "steps"],
            rows=[[number, steps] for number, steps in enumerate(findings["steps_by_length"])],
        ),
        "speed": Table(
            columns=["decoding", "tokens_per_s", "speed_up", "low", "high", "tokens_per_step",
                     "draft_ms", "verify_ms", "bookkeeping_ms"],
            rows=_speed_rows(findings["speed"]["ways"]),
        ),
        "concurrency": Table(
            columns=["concurrency", "plain_tokens_per_s", "speculative_tokens_per_s", "speed_up",
                     "step_cost"],
            rows=_concurrency_rows(findings),
        ),
        "predictions": Table(
            columns=["hardware", "batch", "speed_up", "low", "high", "step_cost"],
            rows=_prediction_rows(findings),
        ),
    }  # fmt: skip
    return {name: table for name, table in tables.items() if table.rows}


def _length_rows(findings: Findings) -> list[Row]:
    def row(cut: str, label: str, found: Findings | None, lookup: Findings | None) -> list[Row]:
        if found is None:
            return []
        other = None if lookup is None else lookup["pooled"]
        return [
            [cut, label, found["pooled"], *found["interval"], found["per_request"],
             found["num_requests"], found["num_steps"], other]
        ]  # fmt: skip

    def compared(found: Findings | None) -> Findings | None:
        return None if found is None else found["acceptance_length"]

    lookup = compared(findings["prompt_lookup"])
    rows = row("traffic", "all", findings["acceptance_length"], lookup)
    rows += row("traffic", "unseen", findings["views"]["unseen"]["acceptance_length"], None)
    for each in findings["slices"]:
        found, other = each["acceptance_length"], compared(each["prompt_lookup"])
        rows += row("tenant", each["label"], found, other)
    for cut, members in findings["cuts"].items():
        for each in members:
            rows += row(cut, each["label"], each["acceptance_length"], each["prompt_lookup"])
    for each in findings["eval_sets"].values():
        found, other = each["acceptance_length"], compared(each["prompt_lookup"])
        rows += row("evaluation set", each["title"], found, other)
    return rows


def _position_rows(positions: Findings) -> list[Row]:
    names = ("offered", "reached", "joint", "conditional")
    columns = [positions[name] for name in names]
    return [[place, *each] for place, each in enumerate(zip(*columns, strict=True), start=1)]


def _speed_rows(ways: Findings) -> list[Row]:
    def milliseconds(each: Findings) -> list[float]:
        return [1000 * seconds for seconds in each["seconds_per_token"].values()]

    return [
        [way, each["tokens_per_second"], each["speed_up"], *each["speed_up_interval"],
         each["tokens_per_step"], *milliseconds(each)]
        for way, each in ways.items()
        if each["speed_up"] is not None
    ]  # fmt: skip


def _concurrency_rows(findings: Findings) -> list[Row]:
    if findings["concurrency"] is None:
        return []
    names = ("concurrency", "plain_tokens_per_s", "speculative_tokens_per_s", "speed_up",
             "step_cost")  # fmt: skip
    return [[point[name] for name in names] for point in findings["concurrency"]["points"]]


def _prediction_rows(findings: Findings) -> list[Row]:
    return [
        [each["hardware"], found["batch"], found["speed_up"], *found["speed_up_interval"],
         found["step_cost"]]
        for each in findings["predictions"]
        for found in each["batches"]
    ]  # fmt: skip
