"""What a comparison needs of each request, and how a report keeps it.

A report holds one row per request, so that a later one can be paired with it: without the pairs a
difference between two drafters drowns in the difference between requests. In `report.json` the
rows of a split stand as columns.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from dflash_inference.statistics import RequestSums
from dflash_inference.trace import DecodeTrace


@dataclass(frozen=True, kw_only=True)
class RequestRow:
    """One request with at least one verify step."""

    id: str
    group: str
    """Tenant or evaluation set."""
    conversation: str
    """Unit of the bootstrap."""
    weight: int
    """How many logged calls it stands for."""
    tokens: int
    """`sum (num_accepted + 1)` over its steps."""
    steps: int

    @classmethod
    def of(cls, trace: DecodeTrace) -> "RequestRow":
        """Sum up one trace."""
        return cls(
            id=trace.id,
            group=trace.group,
            conversation=trace.conversation or trace.id,
            weight=trace.weight,
            tokens=sum(step.acceptance_length for step in trace.steps),
            steps=len(trace.steps),
        )


def rows_of(traces: Iterable[DecodeTrace]) -> list[RequestRow]:
    """Give the rows of traces; a request that prefill alone finished has no step and no row."""
    return [RequestRow.of(trace) for trace in traces if trace.steps]


def sums_of(rows: list[RequestRow]) -> RequestSums:
    """Give what the statistics work on."""
    return RequestSums(
        tokens=np.array([row.tokens for row in rows], float),
        steps=np.array([row.steps for row in rows], float),
        weights=np.array([row.weight for row in rows], float),
        conversations=[row.conversation for row in rows],
    )


def to_columns(rows: list[RequestRow]) -> dict[str, list[Any]]:
    """Give rows as a report holds them: one list per field."""
    plain = [asdict(row) for row in rows]
    return {field.name: [row[field.name] for row in plain] for field in fields(RequestRow)}


def from_columns(columns: dict[str, list[Any]]) -> list[RequestRow]:
    """Read rows back.

    Raises:
        ValueError: The columns are of different lengths.
    """
    names = [field.name for field in fields(RequestRow)]
    if len({len(columns[name]) for name in names}) > 1:
        raise ValueError(
            "the columns of `requests` are of different lengths: the report was changed by hand. "
            "Run the stage 'report' again with --force."
        )
    values = zip(*(columns[name] for name in names), strict=True)
    return [RequestRow(**dict(zip(names, each, strict=True))) for each in values]
