"""Looks for many values in every byte that a folder of files holds, packed or not.

It knows nothing of the pipelines: it reads files by their first bytes, never by their names.
Of each file it searches the bytes as stored and, layer by layer, what gzip, zstd, Arrow and
Parquet unpack to; of each path, its text. A value is looked for as it is and as JSON (once, and
inside JSON text again), addresses (percent signs) or base64 would write it.
"""

import base64
import gzip
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, quote_plus

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dflash_data.logs.compression import GZIP_MAGIC, ZSTD_MAGIC, zstd

KEY_BYTES = 6
"""Bytes of a value by which its places are found; no value may be shorter."""
HASH_BITS = 24
HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)
CHUNK_BYTES = 4 << 20
PARQUET_MAGIC, ARROW_MAGIC, ARROW_STREAM_MAGIC = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"


@dataclass
class Found:
    """What a search came upon."""

    values: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Files, relative to their folder, by the value that they hold."""
    files: Counter[str] = field(default_factory=Counter)
    """Searched files by packing: `plain`, `gzip`, `zstd`, `arrow`, `parquet`."""
    num_bytes: int = 0
    """Searched bytes, those of packed content included."""


class ByteSearch:
    """Finds any of many values in bytes, in one pass however many there are."""

    def __init__(self, values: Iterable[str]) -> None:
        """Take the values.

        Raises:
            ValueError: One is shorter than `KEY_BYTES`.
        """
        self._by_key: dict[bytes, list[tuple[bytes, str]]] = defaultdict(list)
        for value in set(values):
            for form in written_forms(value):
                if len(form) < KEY_BYTES:
                    raise ValueError(f"a value has {len(form)} bytes: at least {KEY_BYTES} needed")
                self._by_key[form[:KEY_BYTES]].append((form, value))
        self._is_key = np.zeros(1 << HASH_BITS, dtype=bool)
        self._is_key[_hashes(b"".join(self._by_key))[::KEY_BYTES]] = True

    def find(self, content: bytes) -> set[str]:
        """Give the values that some bytes hold."""
        found: set[str] = set()
        for start in range(0, len(content), CHUNK_BYTES):
            window = content[start : start + CHUNK_BYTES + KEY_BYTES - 1]
            for place in np.flatnonzero(self._is_key[_hashes(window)]).tolist():
                key = window[place : place + KEY_BYTES]
                for form, value in self._by_key.get(key, ()):
                    if content.startswith(form, start + place):
                        found.add(value)
        return found


def _hashes(content: bytes) -> np.ndarray:
    """Give a hash of the `KEY_BYTES` bytes that begin at each place."""
    codes = np.frombuffer(content, dtype=np.uint8).astype(np.uint64)
    num_places = max(0, len(codes) - KEY_BYTES + 1)
    keys = np.zeros(num_places, dtype=np.uint64)
    for place in range(KEY_BYTES):
        keys |= codes[place : place + num_places] << np.uint64(8 * place)
    return (keys * HASH_FACTOR) >> np.uint64(64 - HASH_BITS)


def written_forms(value: str) -> set[bytes]:
    """Give the bytes of a value as it is and as common formats write it."""
    once = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
    twice = {json.dumps(text, ensure_ascii=False)[1:-1] for text in once}
    packed = value.encode()
    coded = {base64.b64encode(packed), base64.urlsafe_b64encode(packed)}
    texts = once | twice | {text.replace("/", "\\/") for text in once}
    texts |= {quote(value, safe=""), quote(value), quote_plus(value)}
    return {text.encode() for text in texts} | {code.rstrip(b"=") for code in coded}


def search_folder(folder: Path, search: ByteSearch) -> Found:
    """Search all files below a folder, whatever they are called."""
    found = Found()
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = str(path.relative_to(folder))
        content = path.read_bytes()
        found.files[packing_of(content)] += 1
        for layer in [name.encode(), *layers(content)]:
            found.num_bytes += len(layer)
            for value in search.find(layer):
                found.values[value].add(name)
    return found


def layers(content: bytes) -> Iterator[bytes]:
    """Yield some bytes, what they unpack to, and what that unpacks to."""
    yield content
    packing = packing_of(content)
    if packing in ("arrow", "parquet"):
        yield from _buffers(_table(content, packing))
    elif packing != "plain":
        yield from layers((gzip if packing == "gzip" else zstd).decompress(content))


def packing_of(content: bytes) -> str:
    """Name the packing of a file by its first bytes."""
    magics = {
        "gzip": GZIP_MAGIC, "zstd": ZSTD_MAGIC, "parquet": PARQUET_MAGIC,
        "arrow": (ARROW_MAGIC, ARROW_STREAM_MAGIC),
    }  # fmt: skip
    return next((name for name, magic in magics.items() if content.startswith(magic)), "plain")


def _table(content: bytes, packing: str) -> pa.Table:
    if packing == "parquet":
        return pq.read_table(io.BytesIO(content))
    is_file = content.startswith(ARROW_MAGIC)
    with (pa.ipc.open_file if is_file else pa.ipc.open_stream)(content) as reader:
        return reader.read_all()


def _buffers(table: pa.Table) -> Iterator[bytes]:
    """Yield the decompressed memory of every column; texts lie end to end in it."""
    yield str(table.schema).encode()
    for column in table.columns:
        for chunk in column.chunks:
            values = chunk.dictionary_decode() if pa.types.is_dictionary(chunk.type) else chunk
            yield from (buffer.to_pybytes() for buffer in values.buffers() if buffer is not None)
