"""The manifest beside each output folder: what went in, what came out, what was dropped.

`manifest.json` is written last and atomically, so its presence means that the stage is
complete. It carries a hash of its own canonical content (a flipped byte is found), a hash
of the recipe parts its stage reads, and the content hash of every input manifest; a stage
whose key (`recipe_hash` and `inputs`) still matches need not run again. Nothing in it
depends on the clock: the same inputs give the same bytes.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

FILE_NAME = "manifest.json"
FORMAT = "dflash-train/manifest"
FORMAT_VERSION = 1


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary sibling of `path` that becomes `path` when the block succeeds.

    Works for a file or a folder that the block creates. On an error nothing is left behind; after
    a kill only a name that begins with `.partial-` is, and readers ignore it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=path.parent)) / path.name
    try:
        yield partial
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial.parent, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically and durably."""
    with atomic_path(path) as partial, partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def canonical_json(value: Any) -> bytes:
    """Give the one JSON text of a value: sorted keys, no spaces."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def content_hash(value: Any) -> str:
    """Give `sha256:` over the canonical JSON of a value."""
    return "sha256:" + hashlib.sha256(canonical_json(value)).hexdigest()


def file_hash(path: Path) -> str:
    """Give `sha256:` over a file's bytes."""
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def _pretty_json(content: Any) -> bytes:
    """Give the one text of a manifest file, so that a change of white space is a change."""
    return orjson.dumps(content, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2) + b"\n"


@dataclass(kw_only=True)
class FileEntry:
    """One file of a stage: path relative to the manifest's folder, its hash and size."""

    path: str
    sha256: str
    bytes: int
    rows: int | None = None
    tokens: int | None = None

    @classmethod
    def of(
        cls, path: Path, folder: Path, *, rows: int | None = None, tokens: int | None = None
    ) -> "FileEntry":
        """Describe an existing file."""
        return cls(
            path=os.path.relpath(path, folder),
            sha256=file_hash(path),
            bytes=path.stat().st_size,
            rows=rows,
            tokens=tokens,
        )


@dataclass(kw_only=True)
class Counts:
    """The books of a data stage; `read = kept + sum(dropped)` is checked on writing."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def check(self) -> None:
        """Raise RuntimeError if records went missing without a reason."""
        if self.read != self.kept + sum(self.dropped.values()):
            raise RuntimeError(
                f"counts do not balance: read {self.read}, kept {self.kept}, dropped "
                f"{self.dropped}. "
                "This is an error in the stage, please report it."
            )


@dataclass(kw_only=True)
class Manifest:
    """What one stage read, wrote and dropped."""

    stage: str
    recipe_hash: str
    inputs: dict[str, str] = field(default_factory=dict)
    """Content hash of each input, by name: an upstream manifest, a file or a package's weights."""
    outputs: list[FileEntry] = field(default_factory=list)
    counts: Counts | None = None
    target: dict[str, Any] | None = None
    """Name, revision, tokenizer hash, chat-template hash and `target_layer_ids`."""
    command: str = ""
    code: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    """Stage-specific facts: measured costs, settings resolved at run time."""
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    @property
    def key(self) -> str:
        """Hash of what decides whether the stage must run again: stage, recipe parts, inputs."""
        return content_hash([self.stage, self.recipe_hash, self.inputs, self.format_version])

    @property
    def hash(self) -> str:
        """Hash that a later stage stores as its input.

        It covers what was produced, not by which command line or commit, so that a rerun with the
        same result leaves everything downstream valid.
        """
        produced = asdict(self)
        for fact in ("command", "code", "versions", "details"):
            del produced[fact]
        return content_hash(produced)

    def write(self, folder: Path) -> None:
        """Write `folder/manifest.json` last and atomically."""
        if self.counts is not None:
            self.counts.check()
        content = asdict(self)
        content["content_hash"] = content_hash(asdict(self))
        write_bytes(folder / FILE_NAME, _pretty_json(content))

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """Read the manifest of a folder; None if the stage is not complete.

        Raises:
            ValueError: The file exists but is damaged, or another version wrote it.
        """
        path = folder / FILE_NAME
        if not path.exists():
            return None
        try:
            written = path.read_bytes()
            content = orjson.loads(written)
            if _pretty_json(content) != written:
                raise ValueError("its bytes are not as they were written")
            stored_hash = content.pop("content_hash")
            if content_hash(content) != stored_hash:
                raise ValueError("its content hash does not match")
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(
                    f"format_version {content['format_version']} is not {FORMAT_VERSION}"
                )
            content["outputs"] = [FileEntry(**entry) for entry in content["outputs"]]
            content["counts"] = Counts(**content["counts"]) if content["counts"] else None
            return cls(**content)
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged or foreign: {error}. Delete the folder and run its stage again."
            ) from error

    def has_outputs(self, folder: Path) -> bool:
        """Say whether every file is there with its size; contents are checked where they are
        read."""
        return all(
            (folder / entry.path).is_file() and (folder / entry.path).stat().st_size == entry.bytes
            for entry in self.outputs
        )

    def verify_outputs(self, folder: Path) -> None:
        """Recompute every checksum.

        Raises:
            ValueError: A file is missing or changed; the message names it.
        """
        for entry in self.outputs:
            path = folder / entry.path
            if not path.exists():
                raise ValueError(f"{path} is missing. Run the stage {self.stage!r} again.")
            if path.stat().st_size != entry.bytes or file_hash(path) != entry.sha256:
                raise ValueError(
                    f"{path} does not match its checksum in {folder / FILE_NAME}: it was changed "
                    f"or damaged. Delete it and run the stage {self.stage!r} again, or `run`."
                )
