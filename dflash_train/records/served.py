"""How well served requests were drafted for: one row of numbers each, and no text.

Logs, pages of counters and traces all become such rows, so that one test watches them all. A row
is a request, or, where a server tells only its totals, the time between two readings of them.
"""

import io
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from dflash_train.records.manifest import write_bytes

SERVED_ROW = np.dtype(
    [
        ("moment", "f8"), ("tokens", "f8"), ("steps", "f8"), ("decode_s", "f8"),
        ("temperature", "f4"), ("prompt_tokens", "i4"), ("tenant", "u4"), ("template", "u8"),
        ("session", "u8"), ("call", "u8"),
    ]
)  # fmt: skip
"""One row. `moment`: start, seconds since 1970. `tokens`: committed by verify steps, so without the
one that prefill gives. `steps`: verify steps. `decode_s`: seconds from the first token to the last.
`tenant`: index in the names. `template`, `session`, `call`: hashes of the system prompt, the
conversation and the request's id, 0 where there is none. Unknown numbers are nan, an unknown
`prompt_tokens` is -1."""

Rows = NDArray[np.void]
FORMAT_VERSION = 1


@dataclass(kw_only=True)
class ServedRows:
    """Rows and the names that they refer to."""

    rows: Rows
    """`[R]` of `SERVED_ROW`."""
    tenants: list[str]
    """Keyed hashes of customers, labels of a server, or groups of traces."""
    unit: str = "requests"
    """What a row is: `requests`, or `intervals` between two readings of a server's totals."""
    accepted_at: NDArray[np.float64] | None = None
    """`[R, P]`, steps that kept their first, second, ... draft; None where nobody counted."""
    read: int = 0
    """Calls that were read, those without a row included."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Calls that are no row, by reason."""

    @classmethod
    def joined(cls, pieces: list["ServedRows"], *, unit: str = "requests") -> "ServedRows":
        """Give the rows of all pieces in order of time; without times, in the order they stand in.

        A call that was logged twice, in exports that overlap, counts once.
        """
        names: dict[str, int] = {}
        arrays: list[Rows] = [np.zeros(0, SERVED_ROW)]
        dropped: dict[str, int] = {}
        for piece in pieces:
            places = [names.setdefault(name, len(names)) for name in piece.tenants]
            rows = piece.rows.copy()
            rows["tenant"] = np.array(places, "u4")[rows["tenant"]] if len(rows) else 0
            arrays.append(rows)
            for reason, count in piece.dropped.items():
                dropped[reason] = dropped.get(reason, 0) + count
        rows = np.concatenate(arrays)
        order = _first_of_each(rows["call"])
        if len(order) < len(rows):
            dropped["duplicate"] = dropped.get("duplicate", 0) + len(rows) - len(order)
        if not np.isnan(rows["moment"]).any():
            order = order[np.argsort(rows["moment"][order], kind="stable")]
        accepted_at = _padded([piece.accepted_at for piece in pieces])
        return cls(
            rows=rows[order],
            tenants=list(names),
            unit=unit,
            accepted_at=None if accepted_at is None else accepted_at[order],
            read=sum(piece.read for piece in pieces),
            dropped=dropped,
        )

    def since(self, moment: float | None) -> "ServedRows":
        """Leave out rows before a moment, and those of which nobody knows when they were."""
        if moment is None:
            return self
        is_kept = self.rows["moment"] >= moment
        left_out = {"before_since": int((~is_kept).sum())}
        return ServedRows(
            rows=self.rows[is_kept],
            tenants=self.tenants,
            unit=self.unit,
            accepted_at=None if self.accepted_at is None else self.accepted_at[is_kept],
            read=self.read,
            dropped=self.dropped | left_out,
        )

    def write(self, path: Path) -> None:
        """Write the rows of requests into one file, atomically."""
        assert self.accepted_at is None
        about = {
            "version": FORMAT_VERSION, "tenants": self.tenants, "unit": self.unit,
            "read": self.read, "dropped": self.dropped,
        }  # fmt: skip
        content = io.BytesIO()
        np.savez_compressed(
            content, rows=self.rows, about=np.frombuffer(orjson.dumps(about), np.uint8)
        )
        write_bytes(path, content.getvalue())

    @classmethod
    def read_from(cls, path: Path) -> "ServedRows | None":
        """Read a file of `write`; None if it is damaged or of another version."""
        try:
            with np.load(path) as arrays:
                about = orjson.loads(arrays["about"].tobytes())
                rows = arrays["rows"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        if about.pop("version", None) != FORMAT_VERSION or rows.dtype != SERVED_ROW:
            return None
        return cls(rows=rows, **about)


def _first_of_each(calls: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Give the places of all calls without an id and of the first with each, in order."""
    nameless = np.flatnonzero(calls == 0)
    named = np.flatnonzero(calls)
    first = named[np.unique(calls[named], return_index=True)[1]]
    return np.sort(np.concatenate([nameless, first]))


def _padded(arrays: list[NDArray[np.float64] | None]) -> NDArray[np.float64] | None:
    """Join arrays `[R, P]` of different P; a draft that a server did not make was not kept."""
    known = [array for array in arrays if array is not None]
    if not known or len(known) < len(arrays):
        return None
    width = max(array.shape[1] for array in known)
    return np.concatenate([np.pad(each, ((0, 0), (0, width - each.shape[1]))) for each in known])
