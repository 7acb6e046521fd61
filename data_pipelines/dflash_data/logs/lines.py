"""From an address to lines: byte ranges, damage, JSON documents; no other file is held whole.

A file is cut into lines chunk by chunk, which costs less than a call of `readline` each and
bounds the memory that a line may take.

What cannot be read (the damaged rest of a compressed file, a line beyond all measure) comes as
a `Drop` among the lines, so that it is counted.
"""

import sys
from collections.abc import Iterator
from typing import BinaryIO

import orjson
from tqdm import tqdm

from dflash_data.adapters.log_format import Line
from dflash_data.drops import Drop, DropReason
from dflash_data.logs.compression import BYTE_ORDER_MARK, DAMAGE, DECOMPRESSORS, open_unpacked

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 10_000_000
"""Longer lines are dropped: a million tokens of text take about half of it."""
MAX_DOCUMENT_BYTES = 64 << 20
"""Largest file that may be one JSON document, since only these are read whole."""


def read_lines(
    address: str, name: str, *, start: int = 0, end: int | None = None
) -> Iterator[Line | Drop]:
    """Yield the lines that are not blank and start in a byte range; places are byte offsets.

    So any division of a file into ranges gives every line once, at the same place.

    Args:
        address: The file.
        name: What places call the file.
        start: First byte of the range; 0 if the file is compressed.
        end: Byte after the range; None reads to the end of the file.
    """
    with open_unpacked(address) as stream:
        is_plain = not isinstance(stream, DECOMPRESSORS)
        origin = address if is_plain else None
        for offset, raw in _lines_from(stream, address, start):
            if end is not None and offset >= end:
                return
            if raw is None:
                yield Drop(DropReason.unparsable)
                continue
            text = raw.strip()
            if offset == 0:
                text = text.removeprefix(BYTE_ORDER_MARK)
            if text:
                yield Line(f"{name}:{offset}", text, origin, offset)


def read_document(address: str, name: str) -> Iterator[Line | Drop]:
    """Yield the objects of a JSON document: the items of an array, or the document itself."""
    try:
        with open_unpacked(address) as stream:
            text = stream.read(MAX_DOCUMENT_BYTES + 1)
        if len(text) > MAX_DOCUMENT_BYTES:
            raise EOFError
        value = orjson.loads(text.removeprefix(BYTE_ORDER_MARK))
    except (*DAMAGE, orjson.JSONDecodeError):
        _tell(address, "is no complete JSON document of at most 64 MiB; it counts as one call")
        yield Drop(DropReason.unparsable)
        return
    for number, item in enumerate(value if isinstance(value, list) else [value]):
        yield Line(f"{name}:{number}", orjson.dumps(item))


def _lines_from(stream: BinaryIO, address: str, start: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield offset and bytes of each line that starts at or after a byte.

    The bytes are None for a line that is too long and, at the end, for damage.
    """
    if not start:
        yield from _split(_chunks(stream, address), 0)
        return
    # The line around the byte before `start` belongs to the range before, even if it ends there.
    stream.seek(start - 1)
    lines = _split(_chunks(stream, address), start - 1)
    next(lines, None)
    yield from lines


def _chunks(stream: BinaryIO, address: str) -> Iterator[bytes | None]:
    """Yield the content piece by piece, and None at the end if the compression is damaged."""
    # read1 gives what was decompressed before the damage, which read would lose.
    read = stream.read1 if isinstance(stream, DECOMPRESSORS) else stream.read
    try:
        while chunk := read(CHUNK_BYTES):
            yield chunk
    except DAMAGE:
        _tell(address, "is damaged: its compression ends early; the calls before that are read")
        yield None


def _split(chunks: Iterator[bytes | None], offset: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield offset and bytes of each line, the first starting at `offset`."""
    tail, tail_bytes = b"", 0  # of the line whose end has not been read; b"" once it is too long
    for chunk in chunks:
        if chunk is None:
            yield offset, None
            return
        first, *others = chunk.split(b"\n")
        tail_bytes += len(first)
        tail = tail + first if tail_bytes <= MAX_LINE_BYTES else b""
        if not others:
            continue
        yield offset, tail if tail_bytes <= MAX_LINE_BYTES else None
        offset += tail_bytes + 1
        tail = others.pop()
        tail_bytes = len(tail)
        for line in others:
            yield offset, line
            offset += len(line) + 1
    if tail_bytes:
        yield offset, tail if tail_bytes <= MAX_LINE_BYTES else None


def _tell(address: str, what: str) -> None:
    tqdm.write(f"ingest: data.logs (={address}) {what}", file=sys.stderr)
