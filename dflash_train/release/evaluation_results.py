"""What a report measured, as the model card shows it: acceptance lengths with their intervals.

`report.json` itself stays at home: it names customers by pseudonym and requests by id. A card shows
all traffic together and the public evaluation sets.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from dflash_train.config import require

REPORT_FORMAT, REPORT_VERSION = "dflash-train/report", 1


@dataclass(frozen=True, kw_only=True)
class AcceptanceRow:
    """The acceptance length on one kind of requests, in tokens per verify step."""

    label: str
    key: str
    """Name of the set, `traffic` for held-out requests."""
    num_requests: int
    num_steps: int
    pooled: float
    interval: tuple[float, float]
    """95 % bootstrap interval of `pooled`."""
    per_request: float
    per_request_interval: tuple[float, float]
    prompt_lookup: float | None
    """Pooled length of prompt lookup on the same requests; None where it was not run."""


@dataclass(frozen=True, kw_only=True)
class PositionRow:
    """How often the draft at one place of the block was kept."""

    draft: int
    """Counted from 1, the first behind the anchor."""
    joint: float | None
    """Share of steps that kept this draft and all before it; None if none was offered."""
    conditional: float | None
    """Share among the steps that kept all before it."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that a card says about acceptance."""

    rows: list[AcceptanceRow]
    """Held-out traffic first."""
    positions: list[PositionRow]
    ceiling: int
    """Longest acceptance length that a step can reach, in tokens."""
    token_match_rate: float | None
    """Share of greedy live output equal to plain decoding; None if nothing was decoded live."""
    num_live: int
    """Prompts decoded live."""
    num_identical: int
    """Those among them whose whole output was equal."""
    speed_up: float | None
    """Speculative over plain tokens per second, one request at a time; None if not measured."""
    machine: str
    """Where it was measured."""


def read_evaluation(path: Path, *, weights_hash: str) -> Evaluation:
    """Read `report.json` of the drafter whose weights are given.

    Args:
        path: The report.
        weights_hash: `sha256:` of the weights that are to be published.

    Raises:
        ValueError: It cannot be read, has another version, or measured other weights.
    """
    try:
        report = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Run `dflash-train report`.") from error
    found = report.get("format"), report.get("format_version")
    require(
        found == (REPORT_FORMAT, REPORT_VERSION),
        f"{path} (={found[0]}, version {found[1]}) must be {REPORT_FORMAT}, version "
        f"{REPORT_VERSION}. Run `dflash-train report` again.",
    )
    require(
        report["checkpoint"]["inputs"].get("checkpoint") == weights_hash,
        f"{path} measured another drafter than the one to publish. Run `dflash-train report` for "
        "it first.",
    )
    return evaluation_of(report)


def evaluation_of(report: dict[str, Any]) -> Evaluation:
    """Give what a card shows of a report; customers, request ids and paths stay behind."""
    positions, live, speed = report["positions"], report["live_check"], report["speed"]
    sets = report["eval_sets"].items()
    rows = [_row("Held-out traffic", "traffic", report), *(_row(s["title"], n, s) for n, s in sets)]
    return Evaluation(
        rows=[row for row in rows if row is not None],
        positions=[
            PositionRow(draft=place, joint=joint, conditional=conditional)
            for place, (joint, conditional) in enumerate(
                zip(positions["joint"], positions["conditional"], strict=True), start=1
            )
        ],
        ceiling=report["acceptance_length"]["ceiling"],
        token_match_rate=live["token_match_rate"],
        num_live=live["num_requests"],
        num_identical=live["num_identical"],
        speed_up=speed["speed_up"],
        machine=describe_machine(report["machine"]),
    )


def describe_machine(machine: dict[str, Any]) -> str:
    """Name a machine by what decides its speed: the accelerator, else the processor."""
    processor = f"{machine['processor']}, {machine['cores']} cores"
    accelerator = machine["accelerator"]
    return processor if accelerator in (None, "none") else f"{accelerator} ({processor})"


def _row(label: str, key: str, measured: dict[str, Any]) -> AcceptanceRow | None:
    length, lookup = measured["acceptance_length"], measured["prompt_lookup"]
    if length is None:
        return None
    return AcceptanceRow(
        label=label,
        key=key,
        num_requests=length["num_requests"],
        num_steps=length["num_steps"],
        pooled=length["pooled"],
        interval=tuple(length["interval"]),
        per_request=length["per_request"],
        per_request_interval=tuple(length["per_request_interval"]),
        prompt_lookup=None if lookup is None else lookup["acceptance_length"]["pooled"],
    )
