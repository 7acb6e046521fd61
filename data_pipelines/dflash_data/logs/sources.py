"""Where logs come from: a file, folder, glob, fsspec address or hub dataset, as equal parts.

`plan_parts` looks at the beginning of each file, settles its format and divides the log into
parts of about 64 MiB, a function of the files only. `read_part` gives the calls of one part, in
any process. Large files are divided, small ones gathered; compressed ones cannot be divided.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path, PurePosixPath

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from dflash_data.adapters import FORMATS
from dflash_data.adapters.log_format import Line
from dflash_data.drops import Call, Drop
from dflash_data.logs.listing import find_log_files
from dflash_data.logs.sniffing import Layout, SniffedFile, read_file, sniff_file, sniff_hub
from dflash_data.logs.tables import HUB_PREFIX, hub_revision
from dflash_train.records.manifest import content_hash, file_hash

PART_BYTES = 64 << 20
"""Size of a part, before decompression never known exactly."""


@dataclass(frozen=True, kw_only=True)
class LogSlice:
    """A file, or a range of the bytes of one."""

    address: str
    name: str
    """What places call the file: its path below the folder that was given."""
    layout: Layout
    num_bytes: int
    """Size, decompressed; estimated where the file is compressed."""
    start: int = 0
    end: int | None = None
    """Byte after the range; None for the end of the file."""


@dataclass(frozen=True, kw_only=True)
class LogPart:
    """What one task reads: slices of one format, in order."""

    format: str
    """Name in `FORMATS`."""
    slices: tuple[LogSlice, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the part, decompressed, in bytes; an estimate."""
        return sum(piece.num_bytes for piece in self.slices)


def plan_parts(
    logs: str, *, format: str | None = None, part_bytes: int = PART_BYTES
) -> list[LogPart]:
    """Divide a log into parts in the order of its file names; together they hold each line once.

    Args:
        logs: File, folder, glob, fsspec address, or `hub:ID` or `hub:ID#config/split`.
        format: Name of the format of every file; None detects that of each by its content.
        part_bytes: About how large parts are.

    Raises:
        ValueError: No log is there, a file is refused, or its format is unknown or not `format`.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(
            f"data.format (={format}) is unknown. Set one of {', '.join(FORMATS)}, or leave it "
            "out: then the format is detected."
        )
    if logs.startswith(HUB_PREFIX):
        sniffed = [sniff_hub(logs, format)]
    else:
        sniffed = [sniff_file(file, format) for file in find_log_files(logs)]
    known = [file.format for file in sniffed if file.format is not None]
    if not known:
        raise ValueError(f"data.logs (={logs}) holds no line. Give logs of calls.")
    # A file without one whole line is read all the same: its damage is counted as a drop.
    of_format: dict[str, list[SniffedFile]] = {}
    for file in sniffed:
        of_format.setdefault(file.format or known[0], []).append(file)
    parts = [
        LogPart(format=name, slices=tuple(slices))
        for name, files in of_format.items()
        for slices in _divide(name, files, part_bytes)
    ]
    return sorted(parts, key=lambda part: (part.slices[0].name, part.slices[0].start))


def read_part(part: LogPart) -> Iterator[Call]:
    """Yield the calls of a part: conversations and drops, those of unreadable lines last."""
    unreadable: list[Drop] = []
    yield from FORMATS[part.format].read(_lines_of(part.slices, unreadable))
    yield from unreadable


def parts_hash(parts: Iterable[LogPart]) -> str:
    """Give `sha256:` over names and content of all files; the same wherever they lie.

    Remote files are not read: their store's own mark of a version stands for the content.
    """
    files = {piece.address: piece for part in parts for piece in part.slices}
    return content_hash(
        sorted([piece.name, _content_mark(address)] for address, piece in files.items())
    )


def _lines_of(slices: Iterable[LogSlice], unreadable: list[Drop]) -> Iterator[Line]:
    for piece in slices:
        for line in read_file(
            piece.address, piece.name, piece.layout, start=piece.start, end=piece.end
        ):
            if isinstance(line, Drop):
                unreadable.append(line)
            else:
                yield line


def _divide(name: str, files: list[SniffedFile], part_bytes: int) -> Iterator[list[LogSlice]]:
    """Yield the slices of each part of one format."""
    form = FORMATS[name]
    if form.is_request is not None:
        yield from _batches(files)
    elif form.joins_lines:
        for file in files:
            yield [_whole(file)]
    else:
        yield from _gather(
            (piece for file in files for piece in _cut(file, part_bytes)), part_bytes
        )


def _cut(file: SniffedFile, part_bytes: int) -> Iterator[LogSlice]:
    """Yield byte ranges of a file of plain lines; other files come whole."""
    whole = _whole(file)
    if file.layout is not Layout.lines or file.is_compressed:
        yield whole
        return
    for start in range(0, whole.num_bytes, part_bytes):
        end = min(start + part_bytes, whole.num_bytes)
        # The last range is open: it ends where the file ends.
        last = end == whole.num_bytes
        yield replace(whole, num_bytes=end - start, start=start, end=None if last else end)


def _gather(slices: Iterable[LogSlice], part_bytes: int) -> Iterator[list[LogSlice]]:
    """Yield runs of slices that make a part together, so that small files share one."""
    part: list[LogSlice] = []
    for piece in slices:
        if part and sum(other.num_bytes for other in part) + piece.num_bytes > part_bytes:
            yield part
            part = []
        part.append(piece)
    if part:
        yield part


def _batches(files: list[SniffedFile]) -> Iterator[list[LogSlice]]:
    """Yield the files that are joined, requests first: a folder that holds both sides, else all."""
    rest: list[SniffedFile] = []
    for _, group in groupby(files, key=lambda file: PurePosixPath(file.address).parent):
        folder = list(group)
        if len({file.is_request for file in folder}) == 2:
            yield [_whole(file) for file in _requests_first(folder)]
        else:
            rest += folder
    if rest:
        yield [_whole(file) for file in _requests_first(rest)]


def _requests_first(files: list[SniffedFile]) -> list[SniffedFile]:
    return sorted(files, key=lambda file: not file.is_request)


def _whole(file: SniffedFile) -> LogSlice:
    return LogSlice(
        address=file.address, name=file.name, layout=file.layout, num_bytes=file.num_bytes
    )


def _content_mark(address: str) -> str:
    if address.startswith(HUB_PREFIX):
        return hub_revision(address)
    files, path = url_to_fs(address)
    return file_hash(Path(path)) if isinstance(files, LocalFileSystem) else files.ukey(path)
