"""What a log format is: a name, a reader of its lines and a test that knows its own lines.

Each module of this package exports one `FORMAT`. Most formats hold a call in each line and
build their reader with `per_line`; a format whose lines belong together reads the stream.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from dflash_data.adapters.fields import parse_object
from dflash_data.drops import Call, Drop, UnusableError


class Line(NamedTuple):
    """One line of a log, or one object of a JSON document, without its line end."""

    place: str
    """File and position, like `calls.jsonl:17`; identifies the call if the log has no id."""
    text: bytes
    address: str | None = None
    """The uncompressed file in which the line can be read again; None if it cannot be."""
    offset: int = 0
    """Where the line starts in that file, bytes."""


Read = Callable[[Iterable[Line]], Iterator[Call]]


@dataclass(frozen=True, kw_only=True)
class LogFormat:
    """One format of request logs."""

    name: str
    """What `data.format` and `Conversation.source` call it."""
    read: Read
    """Gives the calls of the lines, each as a conversation or a drop; raises nothing."""
    recognises: Callable[[dict[str, Any]], bool]
    """Whether a parsed line is of this format; sees any JSON object."""
    recognises_text: Callable[[bytes], bool] | None = None
    """Whether a line that is no JSON object is of this format."""
    joins_lines: bool = False
    """Lines of a file belong together: the file is read by one reader, never divided."""
    is_request: Callable[[dict[str, Any]], bool] | None = None
    """Set where request and answer stand in lines of their own, mostly in two files: tells which
    a parsed line is. One reader then gets the lines of all files that may belong together."""


def per_line(adapt: Callable[[dict[str, Any], str], list[Call]]) -> Read:
    """Give the reader of a format whose every line stands for itself.

    Args:
        adapt: Gives the calls of one parsed line and its place; raises only `UnusableError`.
    """

    def read(lines: Iterable[Line]) -> Iterator[Call]:
        for line in lines:
            try:
                yield from adapt(parse_object(line.text), line.place)
            except UnusableError as unusable:
                yield Drop(unusable.reason)

    return read
