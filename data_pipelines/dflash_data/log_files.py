"""Finds and reads log files: a file, a folder or a glob of .jsonl, .jsonl.gz and .json.

Pickles and archives are refused by name: opening one can run code.
"""

import glob
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

LINE_SUFFIXES = (".jsonl", ".jsonl.gz")
OBJECT_SUFFIX = ".json"
"""One JSON object per file."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def find_log_files(logs: Path) -> list[Path]:
    """Give the log files in name order.

    Raises:
        ValueError: Nothing is there, or a file is of a kind that is not read.
    """
    if logs.is_dir():
        found = [path for path in logs.rglob("*") if path.is_file() and _is_readable(path)]
        wanted = "holds no .jsonl, .jsonl.gz or .json file"
    elif logs.exists():
        found, wanted = [logs], ""
    else:
        found = [
            Path(path) for path in glob.glob(str(logs), recursive=True) if Path(path).is_file()
        ]
        wanted = "does not exist and matches no file"
    if not found:
        raise ValueError(f"data.logs (={logs}) {wanted}. Give a log file, a folder or a glob.")
    for path in found:
        if not _is_readable(path):
            raise ValueError(
                f"data.logs (={path}) is not a .jsonl, .jsonl.gz or .json file. Pickles and "
                "archives are never opened: have the gateway write its log as JSON lines."
            )
    return sorted(found)


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield each line that is not blank, with its place `name:number`.

    Raises:
        ValueError: The file or its compression cannot be read.
    """
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as stream:
            lines = [stream.read()] if path.name.endswith(OBJECT_SUFFIX) else stream
            for number, line in enumerate(lines, start=1):
                content = line.removeprefix(BYTE_ORDER_MARK).strip()
                if content:
                    yield f"{path.name}:{number}", content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"data.logs (={path}) cannot be read to its end ({type(error).__name__}). "
            "Copy the file again or leave it out."
        ) from error


def _is_readable(path: Path) -> bool:
    return path.name.endswith((*LINE_SUFFIXES, OBJECT_SUFFIX)) and not path.name.startswith(".")
