"""An Arrow index beside conversation shards: which record stands where, without its content.

`index.arrow` opens with `datasets.Dataset.from_file` and answers in one memory-mapped read what
would otherwise take a pass over all shards: which splits and tenants there are, how long their
sessions run, which calls still need an answer, and in which line of which shard a record stands.
It is written in batches of rows: memory does not grow with the number of records.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from msgspec.structs import asdict

from dflash_train.records.conversation import read_shard
from dflash_train.records.manifest import atomic_path

if TYPE_CHECKING:
    from datasets import Dataset

INDEX_NAME = "index.arrow"
BATCH_ROWS = 10_000
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),  # file name
        ("row", pa.int64()),  # line of the shard, from 0
        ("tenant", pa.string()),
        ("session", pa.string()),
        ("turn", pa.int64()),
        ("ts", pa.string()),
        ("origin", pa.string()),
        ("on_policy", pa.bool_()),
    ]
)
"""What the index says of one record."""


def index_line(record: Mapping[str, Any], *, shard: str, row: int) -> dict[str, Any]:
    """Give the index line of one record, from its fields."""
    line = {name: record.get(name) for name in SCHEMA.names}
    return line | {"shard": shard, "row": row, "split": record.get("split") or ""}


def write_record_index(folder: Path) -> Path:
    """Index every record shard of a folder, in name order, and give the index's path."""
    lines = (
        index_line(asdict(record), shard=path.name, row=row)
        for path in sorted(folder.glob("*.jsonl.gz"))
        for row, record in enumerate(read_shard(path))
    )
    write_index_part(folder / INDEX_NAME, lines)
    return folder / INDEX_NAME


def write_index_part(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write index lines as one Arrow stream, atomically."""
    _write(path, (pa.RecordBatch.from_pylist(rows, SCHEMA) for rows in _batches(lines)))


def join_index_parts(parts: Iterable[Path], path: Path) -> None:
    """Write one index of the lines of several, in their order."""
    _write(path, (batch for part in parts for batch in _read(part)))


def open_record_index(folder: Path) -> "Dataset":
    """Open the index of `conversations/` or `regenerated/`, memory-mapped.

    Raises:
        ValueError: The folder has none; its stage is not complete.
    """
    from datasets import Dataset  # slow to import, and no task of ingest needs it

    path = folder / INDEX_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Run the stage that writes {folder.name} first.")
    return Dataset.from_file(str(path))


def _batches(lines: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    remaining = iter(lines)
    while rows := list(islice(remaining, BATCH_ROWS)):
        yield rows


def _write(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    with atomic_path(path) as partial:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)


def _read(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        yield from reader
