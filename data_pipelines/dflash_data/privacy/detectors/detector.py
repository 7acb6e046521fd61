"""What a detector is: places to look at, a pattern, and a rule that a match must satisfy.

Patterns are ASCII and bounded: they read a plain view of the text (`text_view.py`), and no
match may take time that grows faster than the text.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from dflash_data.privacy.detectors.text_view import Span, TextView

CONTEXT_LENGTH = 40
"""Characters before a match that a rule may read, for example to find the word `phone`."""

Rule = Callable[[str, str], bool]
"""Takes the match and up to `CONTEXT_LENGTH` characters before it."""


class Finding(NamedTuple):
    """One private value: characters `start` to `end` of the text."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class Detector:
    """Finds the values of one kind that begin within a span of a text."""

    kind: str
    spans: Callable[[str, Span], Iterator[Span]]


@dataclass(frozen=True)
class Family:
    """Detectors that look at the same places; where there are none, they cost nothing."""

    places: Callable[[TextView], list[Span]]
    detectors: tuple[Detector, ...]


def everywhere_if(may_hold: Callable[[str], object]) -> Callable[[TextView], list[Span]]:
    """Look at the whole text if a cheap test says that there may be something."""
    return lambda view: view.whole if may_hold(view.text) else []


def pattern_detector(kind: str, pattern: str, holds: Rule | None = None) -> Detector:
    """Give a detector of a verbose pattern; a group `value` marks the private part of a match."""
    compiled = re.compile(pattern, re.ASCII | re.VERBOSE)
    group: str | int = "value" if "value" in compiled.groupindex else 0

    def spans(text: str, place: Span) -> Iterator[Span]:
        for match in compiled.finditer(text, *place):
            start, end = match.span(group)
            if holds is None or holds(match[group], context(text, start)):
                yield start, end

    return Detector(kind, spans)


def context(text: str, start: int) -> str:
    """Give the characters before a match."""
    return text[max(0, start - CONTEXT_LENGTH) : start]
