"""Tokens to text, piece by piece, never a part of a character and nothing of a stop text.

Text is given as soon as it is certain: a character whose last bytes are still to come is held back,
and so is whatever may turn out to begin a stop text. The pieces joined are the text of all tokens
together, however the tokens were cut into steps.
"""

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_CUT_CHARACTER = "\ufffd"
"""What decoding gives for bytes that are no whole character."""


class IncrementalText:
    """The text of one answer while it is written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()) -> None:
        """Start with nothing.

        Args:
            tokenizer: The target's; special tokens give no text.
            stop: Texts that end the answer and belong to no piece.
        """
        self.text = ""
        """All that was given."""
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._context_from = 0
        self._read_from = 0
        """Text of tokens before this is known; those from `_context_from` on are read again, since
        a token's text may depend on the one before."""
        self._held = ""
        self._is_stopped = False

    def push(self, new_ids: list[int]) -> str:
        """Take the next tokens and give the text that is certain now."""
        for token in new_ids:
            self._ids.append(token)
            self._held += self._new_text(is_last=False)
        return self._give(is_last=False)

    def finish(self) -> str:
        """Give what was held back, after the last token."""
        self._held += self._new_text(is_last=True)
        return self._give(is_last=True)

    def _new_text(self, *, is_last: bool) -> str:
        """Read the text of the tokens that were not read yet, unless it ends within a character."""
        known = self._decode(self._ids[self._context_from : self._read_from])
        both = self._decode(self._ids[self._context_from :])
        if len(both) <= len(known) or (both.endswith(_CUT_CHARACTER) and not is_last):
            return ""
        self._context_from, self._read_from = self._read_from, len(self._ids)
        return both[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def _give(self, *, is_last: bool) -> str:
        if self._is_stopped:
            return ""
        places = [place for each in self._stop if (place := self._held.find(each)) >= 0]
        end = len(self._held)
        if places:
            end, self._is_stopped = min(places), True
        elif not is_last:
            end -= max((_overlap(self._held, each) for each in self._stop), default=0)
        given, self._held = self._held[:end], self._held[end:]
        self.text += given
        return given


def _overlap(text: str, stop: str) -> int:
    """Give how many characters at the end of a text may be the beginning of a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
