"""Intervals of servers that tell totals -> rows: one row each, whose tenant is the engine."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dflash_train.records.served import SERVED_ROW, ServedRows

IDLE = "idle_interval"
"""An interval in which no drafts were verified."""


@dataclass(kw_only=True)
class Intervals:
    """What engines did between two moments, and what told nothing, gathered one by one."""

    num_unparsable: int = 0
    """Lines or pages that were none."""
    num_idle: int = 0
    """Intervals without a verify step."""
    _engines: dict[str, int] = field(default_factory=dict)
    _rows: list[tuple[Any, ...]] = field(default_factory=list)
    _accepted_at: list[list[float]] = field(default_factory=list)

    def add(
        self,
        engine: str,
        *,
        moment: float,
        tokens: float,
        steps: float,
        accepted_at: list[float],
        decode_s: float = math.nan,
    ) -> None:
        """Add what one engine did.

        Args:
            engine: Its name.
            moment: Seconds since 1970.
            tokens: Committed by verify steps.
            steps: Verify steps, above 0.
            accepted_at: Steps that kept their first, second, ... draft; empty if nobody counted.
            decode_s: Seconds of decoding; nan if nobody measured.
        """
        place = self._engines.setdefault(engine, len(self._engines))
        self._rows.append((moment, tokens, steps, decode_s, math.nan, -1, place, 0, 0, 0))
        self._accepted_at.append(accepted_at)

    def rows(self) -> ServedRows:
        """Give all rows so far, in the order in which they came."""
        width = max((len(each) for each in self._accepted_at), default=0)
        filled = [each + [0.0] * (width - len(each)) for each in self._accepted_at]
        return ServedRows(
            rows=np.array(self._rows, SERVED_ROW),
            tenants=list(self._engines),
            unit="intervals",
            accepted_at=np.array(filled, float) if width else None,
            read=len(self._rows) + self.num_unparsable + self.num_idle,
            dropped={"unparsable": self.num_unparsable, IDLE: self.num_idle},
        )
