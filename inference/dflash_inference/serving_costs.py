"""What a step costs elsewhere: measured concurrency, and cost tables of other hardware.

Two small JSON files that benchmarks write and a report reads.

Concurrency (`evaluate.concurrency`): tokens per second of the same prompts at 1, 2, 4, ... requests
at once, with and without the drafter. A cost grows with the batch, since verify turns from
memory-bound to compute-bound, so a speed-up at batch 1 says nothing about a loaded server:

    {"format": "dflash-train/concurrency", "format_version": 1, "setting": "2 cores, float32, fast",
     "points": [{"concurrency": 1, "plain_tokens_per_s": 30.0, "speculative_tokens_per_s": 55.0,
                 "tokens_per_step": 2.1}, ...]}

Cost table (`evaluate.cost_tables`): seconds of one draft and one verify pass against batch and
width (tokens of a request that verify reads). Width 1 is plain decoding:

    {"format": "dflash-train/costs", "format_version": 1, "hardware": "one H200, bf16",
     "rows": [{"batch": 1, "width": 1, "verify_s": 0.0081},
              {"batch": 1, "width": 8, "draft_s": 0.0012, "verify_s": 0.0085, "other_s": 0.0003}]}

From these the report computes `c`, one step in plain decodes, and `speed-up = length / c`.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec import Struct

CONCURRENCY_FORMAT = "dflash-train/concurrency"
COSTS_FORMAT = "dflash-train/costs"
FORMAT_VERSION = 1


class ConcurrencyPoint(Struct, kw_only=True, forbid_unknown_fields=True):
    """One number of requests at once. Rates count the tokens of all of them."""

    concurrency: int
    plain_tokens_per_s: float
    speculative_tokens_per_s: float
    tokens_per_step: float
    """Mean tokens committed by a request's verify step."""


class ConcurrencyMeasurement(Struct, kw_only=True, forbid_unknown_fields=True):
    """Tokens per second against concurrency, of one machine and setting."""

    setting: str
    """Machine, number format and mode, in words."""
    points: list[ConcurrencyPoint]
    format: str = CONCURRENCY_FORMAT
    format_version: int = FORMAT_VERSION


class CostRow(Struct, kw_only=True, forbid_unknown_fields=True):
    """Seconds of one step at a batch and a width."""

    batch: int
    width: int
    verify_s: float
    draft_s: float = 0.0
    other_s: float = 0.0


class CostTable(Struct, kw_only=True, forbid_unknown_fields=True):
    """Seconds of a step on some hardware."""

    hardware: str
    rows: list[CostRow]
    format: str = COSTS_FORMAT
    format_version: int = FORMAT_VERSION


_File = TypeVar("_File", ConcurrencyMeasurement, CostTable)


def read_concurrency(path: Path) -> ConcurrencyMeasurement:
    """Read a measurement of concurrency.

    Raises:
        ValueError: It is missing, of another format, or holds no positive rates.
    """
    found = _read(path, ConcurrencyMeasurement, CONCURRENCY_FORMAT, key="evaluate.concurrency")
    for point in found.points:
        rates = (point.plain_tokens_per_s, point.speculative_tokens_per_s, point.tokens_per_step)
        if point.concurrency < 1 or min(rates) <= 0:
            raise ValueError(f"evaluate.concurrency (={path}): every figure must be above 0.")
    return found


def read_cost_table(path: Path) -> CostTable:
    """Read a cost table.

    Raises:
        ValueError: It is missing, of another format, or lacks plain decoding (width 1).
    """
    table = _read(path, CostTable, COSTS_FORMAT, key="evaluate.cost_tables")
    plain = {row.batch for row in table.rows if row.width == 1 and row.verify_s > 0}
    if not plain or any(row.batch not in plain for row in table.rows):
        raise ValueError(
            f"evaluate.cost_tables (={path}) must hold a row of width 1, plain decoding, with "
            "verify_s above 0 for each batch. Measure it, too."
        )
    return table


def summarize_concurrency(measured: ConcurrencyMeasurement) -> dict[str, Any]:
    """Give speed-up and step cost at each concurrency, and up to where speculation pays."""
    points = sorted(measured.points, key=lambda point: point.concurrency)
    rows: list[dict[str, Any]] = []
    for point in points:
        speed_up = point.speculative_tokens_per_s / point.plain_tokens_per_s
        step_cost = point.tokens_per_step / speed_up
        rows.append(msgspec.to_builtins(point) | {"speed_up": speed_up, "step_cost": step_cost})
    first_loss = next((row["concurrency"] for row in rows if row["speed_up"] < 1), None)
    pays = [
        row["concurrency"] for row in rows if first_loss is None or row["concurrency"] < first_loss
    ]
    return {
        "setting": measured.setting,
        "points": rows,
        "pays_up_to": max(pays, default=None),
        "loses_from": first_loss,
        "break_even_concurrency": _break_even(rows),
    }


def predict_speed(
    table: CostTable, *, pooled: float, interval: list[float], width: int
) -> list[dict[str, Any]]:
    """Predict the speed-up of a drafter on some hardware, per batch: acceptance length / c.

    Args:
        table: Its costs; between two measured widths they are interpolated.
        pooled: Acceptance length, pooled.
        interval: Its 95 % interval.
        width: Tokens that a full step verifies.

    Returns:
        Nothing for a batch whose widths do not reach from 1 to `width`.
    """
    predicted: list[dict[str, Any]] = []
    for batch in sorted({row.batch for row in table.rows}):
        rows = sorted((row for row in table.rows if row.batch == batch), key=lambda row: row.width)
        if rows[-1].width < width:
            continue
        plain_s = rows[0].verify_s + rows[0].other_s
        drafting = [row for row in rows if row.width > 1] or rows
        draft_s = _at(width, drafting, [row.draft_s for row in drafting])
        verify_s = _at(width, rows, [row.verify_s for row in rows])
        other_s = _at(width, drafting, [row.other_s for row in drafting])
        step_cost = (draft_s + verify_s + other_s) / plain_s
        predicted.append(
            {
                "batch": batch,
                "step_cost": step_cost,
                "speed_up": pooled / step_cost,
                "speed_up_interval": [bound / step_cost for bound in interval],
                "tokens_per_second": batch * pooled / (step_cost * plain_s),
            }
        )
    return predicted


def _at(width: int, rows: list[CostRow], seconds: list[float]) -> float:
    return float(np.interp(width, [row.width for row in rows], seconds))


def _break_even(rows: list[dict[str, Any]]) -> float | None:
    """Interpolate where the speed-up crosses 1, straight over the logarithm of concurrency."""
    for before, after in pairwise(rows):
        if before["speed_up"] >= 1 > after["speed_up"]:
            share = (before["speed_up"] - 1) / (before["speed_up"] - after["speed_up"])
            ends = np.log([before["concurrency"], after["concurrency"]])
            return float(np.exp(ends[0] + share * (ends[1] - ends[0])))
    return None


def _read(path: Path, kind: type[_File], file_format: str, *, key: str) -> _File:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ValueError(f"{key} (={path}) cannot be read: {error.strerror}.") from error
    except msgspec.DecodeError as error:
        raise ValueError(f"{key} (={path}) is no such file: {error}.") from error
    if (found.format, found.format_version) != (file_format, FORMAT_VERSION):
        raise ValueError(
            f"{key} (={path}) has format {found.format!r} {found.format_version}; it must be "
            f"{file_format!r} {FORMAT_VERSION}."
        )
    return found
