"""Seconds of a draft and of a verify pass at any width and batch, read off a measured table."""

from collections.abc import Callable

import numpy as np

from dflash_inference.serving_costs import CostRow, CostTable


class StepCosts:
    """Reads a cost table between and beyond its measured points."""

    def __init__(self, table: CostTable) -> None:
        """Sort the rows into one curve per batch."""
        self._batches = sorted({row.batch for row in table.rows})
        self._rows = {
            batch: sorted(
                (row for row in table.rows if row.batch == batch), key=lambda row: row.width
            )
            for batch in self._batches
        }

    def verify_s(self, width: float, *, batch: int) -> float:
        """Give seconds of one verify pass of `batch` requests, `width` tokens each on average."""
        return self._at(batch, lambda rows: _line(width, rows, [row.verify_s for row in rows]))

    def draft_s(self, *, batch: int) -> float:
        """Give seconds of one draft of `batch` whole blocks."""
        return self._at(batch, lambda rows: rows[-1].draft_s)

    def _at(self, batch: int, read: Callable[[list[CostRow]], float]) -> float:
        """Read between batches; beyond the largest, requests cost what they cost there."""
        largest = self._batches[-1]
        if batch > largest:
            return read(self._rows[largest]) * batch / largest
        return float(np.interp(batch, self._batches, [read(self._rows[b]) for b in self._batches]))


def _line(width: float, rows: list[CostRow], seconds: list[float]) -> float:
    """Interpolate; beyond the widest row the last stretch goes on."""
    widths = [row.width for row in rows]
    if width <= widths[-1] or len(rows) == 1:
        return float(np.interp(width, widths, seconds))
    slope = (seconds[-1] - seconds[-2]) / (widths[-1] - widths[-2])
    return seconds[-1] + max(0.0, slope) * (width - widths[-1])
