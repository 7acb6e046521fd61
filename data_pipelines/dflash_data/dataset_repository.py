"""The conversations of a run as a dataset repository: what `datasets.load_dataset` reads.

    README.md            the dataset card: licence, splits and the counts of the data card
    data/SPLIT-00000.parquet, ...
    data_card.json       the same counts for programs
    manifest.json        checksums of all of it, last

Parquet carries the type of each column, so a column that is empty in one file has the same type
as in all others. What has no fixed shape (tool schemas, tool calls, sampling settings, usage,
redactions) stands there as JSON text; `record_of` turns a row back into its record. Evaluation
prompts are public sets of others and stay out.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from dflash_data.drops import all_reasons
from dflash_data.ingest.data_card import NAME as CARD_NAME
from dflash_data.ingest.data_card import as_markdown
from dflash_train.config import require
from dflash_train.records.conversation import SPLITS, Conversation, read_split
from dflash_train.records.manifest import (
    Counts,
    FileEntry,
    Manifest,
    atomic_path,
    write_bytes,
)

STAGE = "export-dataset"
GROUP_ROWS = 1000
FILE_BYTES = 512 * 2**20
"""Bytes of one Parquet file before compression, at most and one group of rows more."""
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_JSON_FIELDS = ("tools", "sampling", "usage")
_MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("reasoning", pa.string()),
        ("tool_calls", pa.string()),  # JSON
        ("tool_call_id", pa.string()),
        ("name", pa.string()),
    ]
)
_SPAN = pa.struct(
    [("message", pa.int64()), ("start", pa.int64()), ("end", pa.int64()), ("kind", pa.string())]
)
_PRIVACY = pa.struct(
    [
        ("scrubbed", pa.bool_()),
        ("policy", pa.string()),
        ("redactions", pa.string()),  # JSON
        ("spans", pa.list_(_SPAN)),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("tools", pa.string()),  # JSON
        ("ts", pa.string()),
        ("session", pa.string()),
        ("tenant", pa.string()),
        ("turn", pa.int64()),
        ("source", pa.string()),
        ("source_ref", pa.string()),
        ("origin", pa.string()),
        ("model", pa.string()),
        ("model_revision", pa.string()),
        ("adapter", pa.string()),
        ("sampling", pa.string()),  # JSON
        ("finish_reason", pa.string()),
        ("usage", pa.string()),  # JSON
        ("prompt_token_ids", pa.list_(pa.int64())),
        ("output_token_ids", pa.list_(pa.int64())),
        ("tokenizer", pa.string()),
        ("served_acceptance_length", pa.float64()),
        ("on_policy", pa.bool_()),
        ("on_policy_reason", pa.string()),
        ("weight", pa.int64()),
        ("cluster", pa.string()),
        ("has_rendered_prompt", pa.bool_()),
        ("seen_in_train", pa.bool_()),
        ("privacy", _PRIVACY),
    ]
)
"""The columns of every file; all but those that a record always has may be null."""


def check_license(license_id: str) -> None:
    """Raise ValueError unless a text can be the licence of a dataset card."""
    require(
        _LICENSE.fullmatch(license_id) is not None,
        f"license (={license_id}) must be set to a licence as the Hub names it, in small letters: "
        "add license=apache-2.0, or license=other for data that only you may use.",
    )


def export_dataset(
    conversations: Path, out: Path, *, license_id: str, excluded: frozenset[str]
) -> Manifest:
    """Write a dataset repository of a run's conversations and give its manifest.

    Args:
        conversations: The folder that `ingest` wrote.
        out: A new folder, or one that this function wrote before.
        license_id: Of the dataset card.
        excluded: Pseudonyms of customers who opted out.

    Raises:
        ValueError: `ingest` is not complete or its files are damaged, a record is not scrubbed or
            belongs to a customer who opted out, or `out` holds something else.
    """
    check_license(license_id)
    _check_place(out)
    source = Manifest.read(conversations)
    if source is None:
        raise ValueError(f"{conversations} is not complete. Run `dflash-train ingest` first.")
    source.verify_outputs(conversations)
    card = orjson.loads((conversations / f"{CARD_NAME}.json").read_bytes())
    manifest = Manifest(stage=STAGE, recipe_hash=source.recipe_hash, inputs={"ingest": source.hash})
    with atomic_path(out) as folder:
        (folder / "data").mkdir(parents=True)
        for split in SPLITS:
            records = _checked(read_split(conversations, split), excluded)
            manifest.outputs += _write_split(records, folder, split)
        num_rows = sum(entry.rows or 0 for entry in manifest.outputs)
        write_bytes(folder / "README.md", _readme(card, license_id, num_rows).encode())
        shutil.copyfile(conversations / f"{CARD_NAME}.json", folder / f"{CARD_NAME}.json")
        others = [folder / "README.md", folder / f"{CARD_NAME}.json"]
        manifest.outputs += [FileEntry.of(path, folder) for path in others]
        manifest.counts = Counts(read=num_rows, kept=num_rows, dropped=all_reasons({}))
        manifest.write(folder)
    return manifest


def row_of(record: Conversation) -> dict[str, Any]:
    """Give a record as one row of `SCHEMA`."""
    row: dict[str, Any] = msgspec.to_builtins(record)
    for name in _JSON_FIELDS:
        row[name] = _as_json(row[name])
    for message in row["messages"]:
        message["tool_calls"] = _as_json(message["tool_calls"])
    privacy, names = row["privacy"], [field.name for field in _SPAN]
    privacy["redactions"] = _as_json(privacy["redactions"])
    privacy["spans"] = [dict(zip(names, span, strict=True)) for span in privacy["spans"]]
    return row


def record_of(row: Mapping[str, Any]) -> Conversation:
    """Give the record of a row, as `datasets` reads it."""
    fields = {**row, **{name: _from_json(row[name]) for name in _JSON_FIELDS}}
    fields["messages"] = [
        {**message, "tool_calls": _from_json(message["tool_calls"])} for message in row["messages"]
    ]
    privacy = row["privacy"]
    spans = [[span[field.name] for field in _SPAN] for span in privacy["spans"]]
    redactions = _from_json(privacy["redactions"])
    fields["privacy"] = {**privacy, "redactions": redactions, "spans": spans}
    return msgspec.convert(fields, Conversation)


def _as_json(value: Any) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


def _from_json(text: str | None) -> Any:
    return None if text is None else msgspec.json.decode(text)


def _check_place(out: Path) -> None:
    """Refuse a folder whose content somebody else put there: it would be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    written = Manifest.read(out) if out.is_dir() else None
    require(
        written is not None and written.stage == STAGE,
        f"out (={out}) holds something that is no exported dataset. Name a new folder.",
    )


def _checked(records: Iterator[Conversation], excluded: frozenset[str]) -> Iterator[Conversation]:
    for place, record in enumerate(records):
        require(
            record.privacy.scrubbed is True,
            f"record {place} of the split {record.split} has privacy.scrubbed=false: it may hold "
            "private values and is not published. Run `dflash-train ingest` again.",
        )
        require(
            record.tenant is None or record.tenant not in excluded,
            f"record {place} of the split {record.split} belongs to a customer in "
            "data.excluded_tenants. Run `dflash-train ingest` again, which leaves them out.",
        )
        yield record


def _write_split(records: Iterator[Conversation], folder: Path, split: str) -> list[FileEntry]:
    """Write one split in files of bounded size, the first one even if it is empty."""
    entries: list[FileEntry] = []
    group = _group(records)
    while not entries or len(group):
        path = folder / "data" / f"{split}-{len(entries):05d}.parquet"
        num_rows = num_bytes = 0
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            while len(group) and num_bytes < FILE_BYTES:
                writer.write_table(group)
                num_rows, num_bytes = num_rows + len(group), num_bytes + group.nbytes
                group = _group(records)
        entries.append(FileEntry.of(path, folder, rows=num_rows))
    return entries


def _group(records: Iterator[Conversation]) -> pa.Table:
    rows = [row_of(record) for record in islice(records, GROUP_ROWS)]
    return pa.Table.from_pylist(rows, SCHEMA)


def _readme(card: Mapping[str, Any], license_id: str, num_rows: int) -> str:
    """Give the dataset card: header for the Hub, how to read a row, counts. No value of the log."""
    files = "\n".join(f"  - split: {s}\n    path: data/{s}-*.parquet" for s in SPLITS)
    return f"""---
license: {license_id}
task_categories:
- text-generation
tags:
- speculative-decoding
- dflash
size_categories:
- {_size_category(num_rows)}
configs:
- config_name: default
  data_files:
{files}
---

# Served conversations for training a drafter

Calls to a language model, one a row: `messages` up to the answer, and the answer as last message
where one was kept. Private values gave way to placeholders such as `EMAIL_1` before anything was
written; `privacy.spans` says where they stand. Names, postal addresses and what is private by its
meaning are not detected: this data is scrubbed, not anonymous. Sessions, customers and requests
are keyed hashes. `tools`, `sampling`, `usage`, `privacy.redactions` and each message's `tool_calls`
are JSON text.

```python
from datasets import load_dataset
calls = load_dataset("FOLDER OR REPOSITORY", split="train")
```

{as_markdown(card).replace("# Data card", "## Data card", 1)}"""


def _size_category(num_rows: int) -> str:
    """Give the size as the Hub names it."""
    steps = {"n<1K": 10**3, "1K<n<10K": 10**4, "10K<n<100K": 10**5, "100K<n<1M": 10**6}
    return next((name for name, limit in steps.items() if num_rows < limit), "1M<n<10M")
