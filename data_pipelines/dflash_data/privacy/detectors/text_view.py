r"""A view of a text that is easy to match and as long as the text, so places agree.

Logs hold private values with typographic spaces and dashes, with full-width digits, and inside
JSON that was pasted as text, where a line break is a backslash and an `n`. In the view all of
these are plain, so no pattern has to know them. The view also knows the few places where a key
or a number can stand at all, so that patterns need not read the rest.
"""

import re
from functools import cached_property

Span = tuple[int, int]
"""Start and end, in characters."""

MIN_LONG_WORD = 20
"""Characters of the shortest key."""

_SPACES = "\u00a0\u2002\u2003\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_DASHES = "\u2010\u2011\u2012\u2013\u2212\uff0d"
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_PLAIN = _FULL_WIDTH | dict.fromkeys(map(ord, _SPACES), " ") | dict.fromkeys(map(ord, _DASHES), "-")
_UNUSUAL = re.compile(f"[{_SPACES}{_DASHES}\uff01-\uff5e]")
_DIGIT_RUN = re.compile(r"[0-9](?:[ .()/\-\r\n\t>|*#]{0,12}[0-9]){6,}+")
_BEFORE_RUN = 3
"""Characters that may belong to a number before its first digit: `(+`."""
_AFTER_RUN = 12
"""Characters after its last digit that a rule reads, for example an extension."""


class TextView:
    """The plain form of a text, and where long words and numbers stand in it."""

    def __init__(self, text: str) -> None:
        self.text = _plain(text)

    @cached_property
    def whole(self) -> list[Span]:
        """The one span of everything."""
        return [(0, len(self.text))]

    @cached_property
    def long_words(self) -> list[Span]:
        """Words that are long enough for a key."""
        spans: list[Span] = []
        read_to = 0
        for word in self.text.split():
            if len(word) >= MIN_LONG_WORD:
                start = self.text.index(word, read_to)
                read_to = start + len(word)
                spans.append((start, read_to))
        return spans

    @cached_property
    def digit_runs(self) -> list[Span]:
        """Places with seven digits or more, with gaps as in numbers that people write."""
        return [
            (max(0, run.start() - _BEFORE_RUN), run.end() + _AFTER_RUN)
            for run in _DIGIT_RUN.finditer(self.text)
        ]


def _plain(text: str) -> str:
    if not text.isascii() and _UNUSUAL.search(text):
        text = text.translate(_PLAIN)
    if "\\" in text:
        text = text.replace("\\n", " \n").replace("\\r", "  ").replace("\\t", "  ")
        text = text.replace('\\"', ' "')
    return text
