"""Finds log files by address and refuses what is never opened: pickles and archives.

Opening a pickle can run code, and there is no override. A file is judged by its name and by
its first bytes, so that a renamed pickle is refused, too.
"""

import sys
from dataclasses import dataclass
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

LOG_SUFFIXES = (".jsonl", ".ndjson", ".json", ".log", ".txt", ".parquet")
COMPRESSED_SUFFIXES = (".gz", ".zst")
PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".dill")
ARCHIVE_SUFFIXES = (".tar", ".tgz", ".tzst", ".zip", ".7z", ".rar", ".whl")
PACKED_SUFFIXES = (".bz2", ".xz", ".lz4", ".lzma", ".z", ".br", ".snappy")

ZIP_MAGIC = b"PK\x03\x04"  # PyTorch's .pt files, too
TAR_MAGIC, TAR_MAGIC_OFFSET = b"ustar", 257
OTHER_ARCHIVES = (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07")
PARQUET_MAGIC = b"PAR1"
HEAD_BYTES = 512
"""Enough of a file to tell what it is."""

PICKLE_RULE = (
    "is a pickle, and opening one can run code. Have the server write its log as JSON lines: "
    "SGLang's --log-requests --log-requests-level 3 --log-requests-format json in place of "
    "--dump-requests-folder."
)
ARCHIVE_RULE = "is an archive. Unpack it into a folder of its own and give that folder."


@dataclass(frozen=True, kw_only=True)
class LogFile:
    """One file of a log."""

    address: str
    """Local path, or address with its protocol."""
    name: str
    """Path below the folder that was given; the same wherever that folder is."""
    num_bytes: int


def find_log_files(logs: str) -> list[LogFile]:
    """Give the files of a file, folder, glob or fsspec address, in name order; empty ones left out.

    Raises:
        ValueError: Nothing is there, its store is unknown, or a file is never opened.
    """
    files, path = _file_system(logs)
    if files.isfile(path):
        root, found = path.rpartition("/")[0], {path: files.info(path)}
    elif files.isdir(path):
        root, found = path.rstrip("/"), _logs_below(files, path)
    else:
        root = path[: _first_magic(path)].rpartition("/")[0]
        found = _visible(files.glob(path, detail=True), root)
    is_local = isinstance(files, LocalFileSystem)
    listed = [
        LogFile(
            address=place if is_local else files.unstrip_protocol(place),
            name=place.removeprefix(root).lstrip("/"),
            num_bytes=info["size"],
        )
        for place, info in sorted(found.items())
        if info["type"] == "file" and info["size"]
    ]
    if not listed:
        raise ValueError(
            f"data.logs (={logs}) holds or matches no log file ({', '.join(LOG_SUFFIXES)}; each "
            "also .gz or .zst). Give a log file, a folder, a glob or an address."
        )
    for file in listed:
        _refuse_by_name(file.address)
    return listed


def refuse_by_content(address: str, head: bytes) -> None:
    """Stop at a pickle or archive, whatever its name.

    Args:
        address: What the message names.
        head: First `HEAD_BYTES` of the file, or of what it decompresses to.

    Raises:
        ValueError: It is one.
    """
    if _is_pickle(head):
        raise ValueError(f"data.logs (={address}) {PICKLE_RULE}")
    is_tar = head[TAR_MAGIC_OFFSET:].startswith(TAR_MAGIC)
    if is_tar or head.startswith((ZIP_MAGIC, *OTHER_ARCHIVES)):
        raise ValueError(f"data.logs (={address}) {ARCHIVE_RULE}")


def has_suffix(address: str, *suffixes: str) -> bool:
    """Tell whether a file is named so, compressed or not."""
    name = address.lower()
    for packing in COMPRESSED_SUFFIXES:
        name = name.removesuffix(packing)
    return name.endswith(suffixes)


def _file_system(logs: str) -> tuple[Any, str]:
    try:
        return url_to_fs(logs)
    except ImportError as error:
        raise ValueError(
            f"data.logs (={logs}) needs a package for its store ({error}). Install the extra: "
            "pip install 'dflash-train[s3]' or 'dflash-train[gcs]'."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"data.logs (={logs}) names a store that fsspec does not know. Give a path or an "
            "address such as s3://bucket/folder, gs://bucket/folder or hf://datasets/ID."
        ) from error


def _logs_below(files: Any, folder: str) -> dict[str, dict[str, Any]]:
    """Give the log files of a folder, and those that make it refused."""
    wanted = (*LOG_SUFFIXES, *PICKLE_SUFFIXES, *ARCHIVE_SUFFIXES)
    below = _visible(files.find(folder, detail=True), folder)
    found = {
        path: info
        for path, info in below.items()
        if has_suffix(path, *wanted) or path.lower().endswith(PACKED_SUFFIXES)
    }
    if ignored := len(below) - len(found):
        tqdm.write(f"ingest: {ignored} files of {folder} are no logs by name", file=sys.stderr)
    return found


def _visible(found: dict[str, dict[str, Any]], root: str) -> dict[str, dict[str, Any]]:
    """Leave out files and folders whose name begins with a dot."""
    return {path: info for path, info in found.items() if "/." not in path.removeprefix(root)}


def _refuse_by_name(address: str) -> None:
    if has_suffix(address, *PICKLE_SUFFIXES):
        raise ValueError(f"data.logs (={address}) {PICKLE_RULE}")
    if has_suffix(address, *ARCHIVE_SUFFIXES):
        raise ValueError(f"data.logs (={address}) {ARCHIVE_RULE}")
    if address.lower().endswith(PACKED_SUFFIXES):
        raise ValueError(
            f"data.logs (={address}) is compressed in a way that is not read. Compress it with "
            "gzip or zstd, or leave it out."
        )


def _is_pickle(head: bytes) -> bool:
    """Tell pickles of protocol 2 to 5 by their header, older ones by how containers begin."""
    has_header = len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5
    return has_header or head.startswith((b"(dp", b"(lp", b"ccopy_reg\n", b"c__builtin__\n"))


def _first_magic(path: str) -> int:
    return min((path.index(sign) for sign in "*?[{" if sign in path), default=len(path))
