"""An Arrow index beside conversation shards: which record stands where, without its content.

`index.arrow` opens with `datasets.Dataset.from_file` and answers in one memory-mapped read what
would otherwise take a pass over all shards: which splits and tenants there are, how long their
sessions run, which calls still need an answer, and in which line of which shard a record stands.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from dflash_train.features.store import INDEX_NAME, write_arrow
from dflash_train.records.conversation import read_shard


@dataclass(kw_only=True)
class RecordLine:
    """What the index says of one record."""

    id: str
    split: str
    shard: str
    """File name of the shard."""
    row: int
    """Line of the shard, from 0."""
    tenant: str | None
    session: str | None
    turn: int
    ts: str | None
    origin: str
    on_policy: bool


def write_record_index(folder: Path) -> Path:
    """Index every record shard of a folder, in name order, and give the index's path."""
    lines = [
        RecordLine(
            id=record.id,
            split=record.split or "",
            shard=path.name,
            row=row,
            tenant=record.tenant,
            session=record.session,
            turn=record.turn,
            ts=record.ts,
            origin=record.origin,
            on_policy=record.on_policy,
        )
        for path in sorted(folder.glob("*.jsonl.gz"))
        for row, record in enumerate(read_shard(path))
    ]
    write_arrow(folder / INDEX_NAME, lines, RecordLine)
    return folder / INDEX_NAME


def open_record_index(folder: Path) -> Dataset:
    """Open the index of `conversations/` or `regenerated/`, memory-mapped.

    Raises:
        ValueError: The folder has none; its stage is not complete.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Run the stage that writes {folder.name} first.")
    return Dataset.from_file(str(path))
