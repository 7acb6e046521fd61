"""The bytes of a log file, stored or decompressed, local or remote, through fsspec.

Compression is told by content: transports unpack files and keep their names.
"""

import contextlib
import gzip
import sys
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

from fsspec.core import url_to_fs

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

REMOTE_BLOCK_BYTES = 8 << 20
"""What one request to a remote store asks for; backends' own default is up to 50 MB."""
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError)
"""What reading a damaged compressed file raises."""
DECOMPRESSORS = (gzip.GzipFile, zstd.ZstdFile)


@contextlib.contextmanager
def open_raw(address: str) -> Iterator[BinaryIO]:
    """Open the bytes of a local or remote file as they are stored."""
    files, path = url_to_fs(address)
    with files.open(path, "rb", block_size=REMOTE_BLOCK_BYTES) as stream:
        yield cast(BinaryIO, stream)


@contextlib.contextmanager
def open_unpacked(address: str) -> Iterator[BinaryIO]:
    """Open the content of a file: gzip and zstd are decompressed."""
    with open_raw(address) as raw:
        head = raw.read(len(ZSTD_MAGIC))
        raw.seek(0)
        if head.startswith(GZIP_MAGIC):
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        elif head == ZSTD_MAGIC:
            yield cast(BinaryIO, zstd.ZstdFile(raw))
        else:
            yield raw


def read_head(address: str, num_bytes: int) -> tuple[bytes, bytes]:
    """Give the first bytes of a file as stored and as decompressed; damage gives none."""
    with open_raw(address) as raw:
        stored = raw.read(num_bytes)
    with open_unpacked(address) as stream:
        try:
            return stored, stream.read(num_bytes)
        except DAMAGE:
            return stored, b""


def is_compressed(head: bytes) -> bool:
    """Tell whether a file that begins with these bytes is gzip or zstd."""
    return head.startswith((GZIP_MAGIC, ZSTD_MAGIC))
