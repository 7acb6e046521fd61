"""Where a vLLM log cuts its texts: `max_log_len`, told by the log or learned from it.

vLLM cuts prompt, body, answer (in characters) and id lists (in ids) at one length and marks
nothing. What is as long as that length counts as cut. The length is known

1. when the server printed its arguments: `max_log_len` stands among them;
2. when a JSON body stops before its end: its own length is the limit;
3. when three texts have exactly the greatest length of all and end in three different
   characters (or ids). Whole prompts of one server end alike, in the template's opening of the
   answer, so requests of a fixed length are not taken for cut ones.

A text longer than the limit, or a whole JSON body as long, refutes what was learned.
"""

import re

PRINTED = re.compile(rb"max_log_len['\"]?\s*[=:]\s*(\d{1,9})\b")
DIFFERENT_ENDS = 3


class LogCut:
    """Learns the length at which a log cuts; lengths are of characters or of ids."""

    def __init__(self) -> None:
        self.printed: int | None = None
        self.learned: int | None = None
        self.greatest = 0
        self.greatest_whole = 0
        self.ends: set[str] = set()

    def learn_from(self, line: bytes) -> None:
        """Take the limit from a line in which the server prints its arguments."""
        found = PRINTED.search(line) if b"max_log_len" in line else None
        if found:
            self.printed = int(found[1])

    def see_cut(self, length: int) -> None:
        """Take the length of a text that is certainly cut."""
        if length >= self.greatest:
            self.learned = self.greatest = length

    def see_whole(self, length: int) -> None:
        """Take the length of a text that is certainly whole."""
        self._refute(length)
        self.greatest_whole = max(self.greatest_whole, length)
        self.greatest = max(self.greatest, length)

    def see(self, length: int, end: str) -> None:
        """Take length and last character, or id, of a text that may be cut."""
        self._refute(length)
        if length > self.greatest:
            self.greatest, self.ends = length, set()
        if length == self.greatest > self.greatest_whole:
            self.ends.add(end)
            if len(self.ends) >= DIFFERENT_ENDS:
                self.learned = length

    def is_cut(self, length: int) -> bool:
        """Tell whether a text of this length was cut, as far as the log has told."""
        limit = self.printed or self.learned
        return limit is not None and length >= limit

    def is_suspect(self, length: int) -> bool:
        """Tell whether a text of this length may turn out to be cut."""
        is_known = self.printed is not None or self.learned is not None
        return not is_known and length == self.greatest > self.greatest_whole

    def _refute(self, length: int) -> None:
        if self.learned is not None and length > self.learned:
            self.learned = None
