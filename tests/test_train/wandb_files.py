"""What Weights & Biases wrote offline: its files hold records in LevelDB's log format."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def history(path: Path) -> list[dict[str, Any]]:
    """Give the values that each call logged."""
    found = []
    for record in _records(path):
        if record.HasField("history"):
            items = record.history.item
            found.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return found


def artifacts(path: Path) -> dict[tuple[str, str], set[str]]:
    """Give the files of each artifact, by its type and name."""
    found = {}
    for record in _records(path):
        if record.HasField("artifact"):
            entry = record.artifact
            found[entry.type, entry.name] = {file.path for file in entry.manifest.contents}
    return found


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import (
        Record,  # pyright: ignore[reportAttributeAccessIssue] made when it is imported
    )

    for data in _log_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        yield record


def _log_records(content: bytes) -> Iterator[bytes]:
    """Yield the records behind the file's header: checksum, length, kind, bytes, in blocks."""
    block, header, place, record = 32 * 1024, 7, 7, b""
    while place + header <= len(content):
        if block - place % block < header:  # the rest of a block is padding
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + header])
        record += content[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
