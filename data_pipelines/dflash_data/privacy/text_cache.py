"""Remembers what was worked out for a text: every call of a session repeats its history."""

from collections.abc import Hashable
from typing import Generic, TypeVar

Worth = TypeVar("Worth")

ENTRY_CHARACTERS = 200
"""What an entry costs beside its text, counted as characters."""


class TextCache(Generic[Worth]):
    """Maps (use, text) to a result; forgets the longest unused first.

    The bound counts characters, not entries: one pasted file weighs as much as a thousand
    greetings.
    """

    def __init__(self, max_characters: int) -> None:
        self.max_characters = max_characters
        self.num_characters = 0
        self._known: dict[tuple[Hashable, str], Worth] = {}

    def get(self, use: Hashable, text: str) -> Worth | None:
        """Give the result of a text, or None if it is not known."""
        key = (use, text)
        found = self._known.pop(key, None)
        if found is not None:
            self._known[key] = found  # to the end: dicts keep their order of insertion
        return found

    def put(self, use: Hashable, text: str, worth: Worth) -> None:
        """Remember the result of a text that `get` did not know."""
        self._known[use, text] = worth
        self.num_characters += len(text) + ENTRY_CHARACTERS
        while self.num_characters > self.max_characters:
            (_use, oldest) = oldest_key = next(iter(self._known))
            del self._known[oldest_key]
            self.num_characters -= len(oldest) + ENTRY_CHARACTERS
