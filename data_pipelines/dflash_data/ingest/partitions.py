"""Temporary files of scrubbed records: written once by a task, read bucket by bucket.

A reading task appends each record to one of many buckets; a later task wants one bucket of all
reading tasks. So a partition file is a row of zstd frames, each with lines of one bucket, and
beside it stands an index (bucket, offset, length, size). Memory is bounded: the collected lines
are flushed as frames whenever they exceed `MAX_COLLECTED_BYTES`. Only scrubbed content comes here.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from dflash_train.records.manifest import atomic_path

MAX_COLLECTED_BYTES = 32 << 20
"""Bytes of lines that one writer collects before it writes them out."""
FRAME = np.dtype([("bucket", "u4"), ("offset", "u8"), ("length", "u8"), ("size", "u8")])
"""One frame: whose lines, where in the file, bytes there, bytes once decompressed."""


def _codec() -> pa.Codec:
    return pa.Codec("zstd", compression_level=1)


class PartitionWriter:
    """Writes one partition file and, on a clean end, its index; a failure leaves neither."""

    def __init__(self, path: Path) -> None:
        """Open nothing yet; `path` ends in `.zst`."""
        self._path = path
        self._lines: dict[int, list[bytes]] = defaultdict(list)
        self._num_bytes = 0
        self._frames: list[tuple[int, int, int, int]] = []
        self._codec = _codec()

    def __enter__(self) -> "PartitionWriter":
        self._atomic = atomic_path(self._path)
        self._stream = self._atomic.__enter__().open("wb")
        return self

    def add(self, bucket: int, line: bytes) -> None:
        """Append one line, without its line end, to a bucket."""
        self._lines[bucket].append(line)
        self._num_bytes += len(line)
        if self._num_bytes >= MAX_COLLECTED_BYTES:
            self._flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._flush()
            with atomic_path(index_path(self._path)) as partial:
                np.save(partial, np.array(self._frames, dtype=FRAME))
        self._stream.close()
        self._atomic.__exit__(kind, error, trace)

    def _flush(self) -> None:
        for bucket, lines in sorted(self._lines.items()):
            content = b"\n".join(lines)
            frame: bytes = self._codec.compress(content, asbytes=True)
            self._frames.append((bucket, self._stream.tell(), len(frame), len(content)))
            self._stream.write(frame)
        self._lines.clear()
        self._num_bytes = 0


def read_lines_of(paths: Iterable[Path], bucket: int) -> Iterator[bytes]:
    """Yield the lines of one bucket from several partition files, in their order."""
    codec = _codec()
    for path in paths:
        frames = np.load(index_path(path), mmap_mode="r")
        mine = frames[frames["bucket"] == bucket]
        if not len(mine):
            continue
        with path.open("rb") as stream:
            for frame in mine:
                stream.seek(int(frame["offset"]))
                packed = stream.read(int(frame["length"]))
                content = codec.decompress(packed, int(frame["size"]), asbytes=True)
                yield from content.split(b"\n")


def index_path(path: Path) -> Path:
    """Give where the index of a partition file lies."""
    return path.with_suffix(".index.npy")
