"""The canonical record of one served call, and its JSONL shards.

Every log format becomes a `Conversation`: the messages of one request and, as last
message, the one assistant turn that is supervised. A request whose answer is not in
the log has no such message yet; `regenerate` writes it.

Shards are gzip-compressed JSON lines with a fixed gzip time stamp, so the same records
give the same bytes.

The records are msgspec structs: made four times as fast as dataclasses, read from JSON with
their types checked five times as fast, and a pipeline makes and reads millions of them. What
is read from JSON holds no cycles, so the garbage collector need not look at them (`gc=False`).
`msgspec.structs.replace` and `msgspec.structs.asdict` stand in for those of `dataclasses`.
"""

import gzip
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, field
from msgspec.structs import asdict

from dflash_train.records.manifest import atomic_path

ROLES = ("system", "developer", "user", "assistant", "tool")
SPLITS = ("train", "validation", "test")


class Turn(Struct, kw_only=True, forbid_unknown_fields=True, gc=False):
    """One message. `content` is None only for an assistant turn made of tool calls."""

    role: str
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def as_message(self) -> dict[str, Any]:
        """Give the message as chat templates and OpenAI clients expect it: no empty keys."""
        fields = asdict(self)
        return {
            key: value for key, value in fields.items() if value is not None or key == "content"
        }


class Privacy(Struct, kw_only=True, forbid_unknown_fields=True, gc=False):
    """What the scrubber did: counts by kind, and where placeholders stand.

    Each span is `(message index, start, end, kind)` in characters of the scrubbed content.
    """

    scrubbed: bool = False
    policy: str = "1"
    redactions: dict[str, int] = field(default_factory=dict)
    spans: list[tuple[int, int, int, str]] = field(default_factory=list)


class Conversation(Struct, kw_only=True, forbid_unknown_fields=True, gc=False):
    """One served call: everything before the answer, and the answer if there is one."""

    id: str
    source: str
    messages: list[Turn]
    source_ref: str | None = None
    ts: str | None = None
    """Request start, RFC 3339 UTC; None keeps the record out of time-based splits."""
    model: str | None = None
    model_revision: str | None = None
    adapter: str | None = None
    tools: list[dict[str, Any]] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    """Sampling keys as logged; an absent key means not logged, never the default."""
    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    session: str | None = None
    tenant: str | None = None
    turn: int = 0
    prompt_token_ids: list[int] | None = None
    output_token_ids: list[int] | None = None
    tokenizer: str | None = None
    served_acceptance_length: float | None = None
    origin: str = "logged"
    """`logged`, `regenerated` or `public`."""
    on_policy: bool = False
    on_policy_reason: str | None = None
    weight: int = 1
    """How many logged calls this record stands for."""
    cluster: str | None = None
    privacy: Privacy = field(default_factory=Privacy)
    split: str | None = None
    has_rendered_prompt: bool = False
    """Whether the prompt is one user message with the text as the engine was fed it: a rendered
    chat, or what a client of a completion API wrote. No chat template is applied to it."""
    seen_in_train: bool | None = None
    """Of test records: whether their session has a near-duplicate in train; None elsewhere."""

    @property
    def answer(self) -> Turn | None:
        """The supervised assistant turn, or None while the target still has to write it."""
        last = self.messages[-1] if self.messages else None
        return last if last is not None and last.role == "assistant" else None

    @property
    def prompt(self) -> list[Turn]:
        """All messages before the answer."""
        return self.messages[:-1] if self.answer is not None else self.messages

    def to_json(self) -> bytes:
        """Give one JSON line, without the newline."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, line: bytes | str) -> "Conversation":
        """Read one line written by `to_json`.

        Raises:
            ValueError: The line is no JSON object of this format; the text never enters the
            message.
        """
        try:
            return _DECODER.decode(line)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise ValueError(
                f"a conversation record could not be read ({type(error).__name__}): "
                "it was not written by this version. Run the stage that wrote it again."
            ) from error


_DECODER = msgspec.json.Decoder(Conversation)


def write_shard(path: Path, conversations: Iterable[Conversation]) -> int:
    """Write a `.jsonl.gz` shard atomically and give its number of records."""
    return write_lines(path, (conversation.to_json() for conversation in conversations))


def write_lines(path: Path, lines: Iterable[bytes]) -> int:
    """Write a shard of records that are JSON already; give their number."""
    num_records = 0
    with atomic_path(path) as partial, partial.open("wb") as raw:
        # Level 1 takes a third of the time of the default and a fifth more space.
        with gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as stream:
            for line in lines:
                stream.write(line + b"\n")
                num_records += 1
        raw.flush()
        os.fsync(raw.fileno())
    return num_records


def read_shard(path: Path) -> Iterator[Conversation]:
    """Yield the records of one shard in order.

    Raises:
        ValueError: A line or the compression is broken; the message names file and line.
    """
    num_read = 0
    try:
        with gzip.open(path, "rb") as stream:
            for line in stream:
                yield Conversation.from_json(line)
                num_read += 1
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged after record {num_read}: {error}. "
            "Delete its folder and run the stage that wrote it again."
        ) from error


def read_split(folder: Path, split: str) -> Iterator[Conversation]:
    """Yield all records of one split, shards in name order; none if the split is empty."""
    for path in sorted(folder.glob(f"{split}-*.jsonl.gz")):
        yield from read_shard(path)
