"""What a log file is, by its beginning: refused, or of a layout and a format."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import chain

import orjson

from dflash_data.adapters import detect_format
from dflash_data.adapters.log_format import Line
from dflash_data.drops import Drop
from dflash_data.logs.compression import is_compressed, read_head
from dflash_data.logs.lines import MAX_DOCUMENT_BYTES, read_document, read_lines
from dflash_data.logs.listing import (
    HEAD_BYTES,
    PARQUET_MAGIC,
    LogFile,
    has_suffix,
    refuse_by_content,
)
from dflash_data.logs.tables import hub_bytes, read_hub, read_parquet

SAMPLE_BYTES = 16 << 20
"""How far to look for a line of a known format: servers log much before the first request."""
PACKED_RATIO = 6
"""Bytes of logged JSON per byte of gzip, zstd or Parquet; only sizes parts and buckets."""
UNKNOWN_HUB_BYTES = 1 << 30


class Layout(Enum):
    """How a file holds its calls."""

    lines = "lines"
    document = "document"
    parquet = "parquet"
    hub = "hub"


@dataclass(frozen=True, kw_only=True)
class SniffedFile:
    """A log file and what its beginning tells."""

    address: str
    name: str
    layout: Layout
    is_compressed: bool
    num_bytes: int
    """Size, decompressed; estimated if it is compressed."""
    format: str | None
    """None if the file has no readable line."""
    is_request: bool
    """Its first line is the request side of a format that logs the two sides apart."""


def read_file(
    address: str, name: str, layout: Layout, *, start: int = 0, end: int | None = None
) -> Iterator[Line | Drop]:
    """Yield the lines of a file of any layout; a range only where the layout is lines."""
    if layout is Layout.lines:
        return read_lines(address, name, start=start, end=end)
    if layout is Layout.document:
        return read_document(address, name)
    return read_parquet(address, name) if layout is Layout.parquet else read_hub(address)


def sniff_file(file: LogFile, format: str | None) -> SniffedFile:
    """Look at the beginning of a file.

    Raises:
        ValueError: It is refused, or its lines are of no known format or not of `format`.
    """
    stored, head = read_head(file.address, HEAD_BYTES)
    for content in (stored, head):
        refuse_by_content(file.address, content)
    packed = is_compressed(stored)
    layout = _layout_of(file, head, packed)
    is_plain = not packed and layout is not Layout.parquet
    name, is_request = _format_of(file.address, file.name, layout, format)
    return SniffedFile(
        address=file.address,
        name=file.name,
        layout=layout,
        is_compressed=packed,
        num_bytes=file.num_bytes if is_plain else file.num_bytes * PACKED_RATIO,
        format=name,
        is_request=is_request,
    )


def sniff_hub(address: str, format: str | None) -> SniffedFile:
    """Look at the first rows of a hub dataset.

    Raises:
        ValueError: It cannot be opened, or its rows are of no known format or not of `format`.
    """
    name, is_request = _format_of(address, address, Layout.hub, format)
    return SniffedFile(
        address=address,
        name=address,
        layout=Layout.hub,
        is_compressed=False,
        num_bytes=hub_bytes(address) or UNKNOWN_HUB_BYTES,
        format=name,
        is_request=is_request,
    )


def _layout_of(file: LogFile, head: bytes, packed: bool) -> Layout:
    if head.startswith(PARQUET_MAGIC):
        if packed:
            raise ValueError(
                f"data.logs (={file.address}) is Parquet inside gzip or zstd, which can only be "
                "read from its end. Unpack it: Parquet compresses its own pages."
            )
        return Layout.parquet
    if not has_suffix(file.address, ".json") or _begins_with_object(file):
        return Layout.lines
    if not packed and file.num_bytes > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"data.logs (={file.address}) is one JSON document of {file.num_bytes} bytes; at most "
            f"{MAX_DOCUMENT_BYTES} are read whole. Write it as JSON lines: jq -c '.[]' FILE."
        )
    return Layout.document


def _begins_with_object(file: LogFile) -> bool:
    """Tell whether the first line of a `.json` file is an object: then it holds JSON lines."""
    first = next(read_lines(file.address, file.name), None)
    try:
        return isinstance(first, Line) and isinstance(orjson.loads(first.text), dict)
    except orjson.JSONDecodeError:
        return False


def _format_of(
    address: str, name: str, layout: Layout, expected: str | None
) -> tuple[str | None, bool]:
    """Give the format of a file, None if it has no readable line, and whether it is requests."""
    sample = _sample(read_file(address, name, layout))
    first = next(sample, None)
    if first is None:
        return None, False
    try:
        form = detect_format(chain([first], sample), expected=expected)
    except ValueError as error:
        raise ValueError(f"data.logs (={address}) {error}") from error
    if form.is_request is None:
        return form.name, False
    return form.name, form.is_request(orjson.loads(first))


def _sample(lines: Iterable[Line | Drop]) -> Iterator[bytes]:
    """Yield texts from the beginning of a file."""
    num_bytes = 0
    for line in lines:
        if isinstance(line, Line):
            yield line.text
            num_bytes += len(line.text)
        if num_bytes > SAMPLE_BYTES:
            return
