"""What the decisions about a record need, as one row of numbers; no content.

Repeats, clusters and caps are decided over all records of a log at once. Their texts do not fit
in memory, these rows do: 72 bytes a record, and one of 14 MinHash bands at a time.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dflash_data.ingest.decontaminate import EvaluationText, find_contaminated
from dflash_data.ingest.dedup import NUM_BANDS, ExactKeys, band_hashes, hash64, near_text
from dflash_data.ingest.explode import instant, needed_prefix, prefix_key
from dflash_train.records.conversation import SPLITS, Conversation
from dflash_train.records.manifest import atomic_path

UNDECIDED = len(SPLITS)
"""Split of a record that waits for its cluster."""

ROW = np.dtype(
    [
        ("id", "u8"),  # all u8: hashes, never 0 unless said
        ("session", "u8"),
        ("tenant", "u8"),  # 0 without a tenant
        ("prompt", "u8"),  # of session and prompt: what later turns build on
        ("needs", "u8"),  # `prompt` of the record that this one builds on; 0 for none
        ("context", "u8"),  # all before the answer, normalised
        ("answer", "u8"),  # normalised; 0 if it will be written anew
        ("moment", "f8"),  # seconds since 1970, inf without a time
        ("turn", "u4"),
        ("contaminated", "i2"),  # number of an evaluation set, -1 for none
        ("split", "u1"),  # place in SPLITS, or UNDECIDED
        ("pad", "u1"),
    ]
)


def index_records(
    records: list[Conversation], evaluation: EvaluationText
) -> tuple[NDArray[np.void], NDArray[np.uint64]]:
    """Give the rows of records `[N]`, and their MinHash bands `[14, N]`."""
    rows = np.zeros(len(records), dtype=ROW)
    keys = ExactKeys()
    for row, record in zip(rows, records, strict=True):
        _fill(row, record, keys)
    rows["contaminated"] = find_contaminated(records, evaluation)
    return rows, band_hashes([near_text(record) for record in records], rows["context"])


def _fill(row: np.void, record: Conversation, keys: ExactKeys) -> None:
    session = (record.session or record.id).encode()
    needed = needed_prefix(record)
    moment = instant(record)
    row["id"] = hash64(record.id.encode())
    row["session"] = hash64(session)
    row["tenant"] = hash64(record.tenant.encode()) if record.tenant else 0
    row["prompt"] = hash64(session, prefix_key(record.prompt, record).encode())
    row["needs"] = hash64(session, needed.encode()) if needed is not None else 0
    row["context"] = keys.context(record)
    row["answer"] = keys.answer(record)
    row["moment"] = float("inf") if moment is None else moment
    row["turn"] = record.turn
    row["split"] = SPLITS.index(record.split) if record.split else UNDECIDED


def save_rows(folder: Path, bucket: int, rows: NDArray[np.void], bands: NDArray[np.uint64]) -> None:
    """Store rows and bands of one bucket."""
    for name, array in (("rows", rows), ("bands", bands)):
        with atomic_path(folder / f"{bucket:05d}.{name}.npy") as partial:
            np.save(partial, array)


def load_rows(folder: Path, num_buckets: int) -> tuple[NDArray[np.void], list[int]]:
    """Give the rows of all buckets, and the number of each bucket's."""
    parts = [np.load(folder / f"{bucket:05d}.rows.npy") for bucket in range(num_buckets)]
    return np.concatenate(parts), [len(part) for part in parts]


def load_bands(folder: Path, num_buckets: int):
    """Yield band after band over all buckets, `[N]` each."""
    paths = [folder / f"{bucket:05d}.bands.npy" for bucket in range(num_buckets)]
    for band in range(NUM_BANDS):
        yield np.concatenate([np.load(path, mmap_mode="r")[band] for path in paths])
