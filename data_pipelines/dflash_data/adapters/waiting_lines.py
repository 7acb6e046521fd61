"""Lines that wait for a partner by id, in little memory: about 120 bytes each.

A line of an uncompressed file is kept as the place where it can be read again, any other one
compressed in memory; nothing goes to the disk, since no line is scrubbed yet.
"""

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO

from dflash_data.adapters.log_format import Line
from dflash_data.logs.compression import BYTE_ORDER_MARK, open_raw, zstd

AMBIGUOUS = -1
"""Stands for the lines of an id that came more than once."""
OFFSET_BITS = 48
OFFSET_MASK = (1 << OFFSET_BITS) - 1
"""A place is one number: that of the file, then the offset in these bits."""


class WaitingLines:
    """Lines by id; each can be taken once. A context: it keeps files open."""

    def __init__(self) -> None:
        # By the hash of the id, which Python keeps in half the space of the id.
        self._waiting: dict[int, int | bytes] = {}
        self._addresses: dict[str, int] = {}
        self._names: list[str] = []
        self._streams: dict[int, BinaryIO] = {}
        self._packer = zstd.ZstdCompressor(level=1)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "WaitingLines":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def put(self, line_id: str, line: Line) -> bool:
        """Keep a line; False if one of this id waits, and then neither is ever given."""
        key = hash(line_id)
        if key in self._waiting:
            self._waiting[key] = AMBIGUOUS
            return False
        self._waiting[key] = self._keep(line)
        return True

    def take(self, line_id: str) -> bytes | None:
        """Give the text of an id's line and forget it; None if none or more than one waits."""
        key = hash(line_id)
        kept = self._waiting.get(key, AMBIGUOUS)
        if kept == AMBIGUOUS:
            return None
        del self._waiting[key]
        return self._unpack(kept)[2] if isinstance(kept, bytes) else self._read_at(kept)

    def drain(self) -> Iterator[Line | None]:
        """Yield the lines that were never taken, in order; None for an id that several had."""
        for kept in self._waiting.values():
            yield None if kept == AMBIGUOUS else self._read(kept)

    def _keep(self, line: Line) -> int | bytes:
        if line.address is None:
            content = line.place.encode() + b"\n" + line.text
            return self._packer.compress(content, zstd.ZstdCompressor.FLUSH_FRAME)
        number = self._addresses.setdefault(line.address, len(self._addresses))
        if number == len(self._names):
            self._names.append(line.place.rpartition(":")[0])
        return number << OFFSET_BITS | line.offset

    def _read(self, kept: int | bytes) -> Line:
        if isinstance(kept, bytes):
            place, _, text = self._unpack(kept)
            return Line(place.decode(), text)
        name = self._names[kept >> OFFSET_BITS]
        return Line(f"{name}:{kept & OFFSET_MASK}", self._read_at(kept))

    def _read_at(self, place: int) -> bytes:
        number = place >> OFFSET_BITS
        stream = self._streams.get(number) or self._stream(number)
        stream.seek(place & OFFSET_MASK)
        return stream.readline().strip().removeprefix(BYTE_ORDER_MARK)

    @staticmethod
    def _unpack(kept: bytes) -> tuple[bytes, bytes, bytes]:
        return zstd.decompress(kept).partition(b"\n")

    def _stream(self, number: int) -> BinaryIO:
        address = list(self._addresses)[number]
        stream = self._streams[number] = self._open.enter_context(open_raw(address))
        return stream
