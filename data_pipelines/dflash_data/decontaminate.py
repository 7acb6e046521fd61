"""Keeps evaluation prompts out of training: exact matches and shared word n-grams.

A training record goes if one of its user turns equals an evaluation prompt after
normalisation, or shares a 13-word run with one (8 for evaluation prompts under 40 words).
Prompts below 8 words count on exact matches only. System prompts are exempt, test is never
touched.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping

from dflash_data.drops import DropReason
from dflash_data.explode import Sifted
from dflash_train.records.conversation import Conversation

LONG_RUN, SHORT_RUN = 13, 8
"""Shared words that mark a record as contaminated, for long and short evaluation prompts."""
SHORT_PROMPT = 40
"""Evaluation prompts below this number of words use the short run."""


class EvaluationText:
    """The evaluation prompts, as what may not recur in training."""

    def __init__(self, evaluation: Mapping[str, Iterable[Conversation]]) -> None:
        self._exact: dict[tuple[str, ...], str] = {}
        self._runs: dict[tuple[str, ...], str] = {}
        for name, prompts in evaluation.items():
            for words in (words for prompt in prompts for words in user_words(prompt)):
                self._exact.setdefault(tuple(words), name)
                size = LONG_RUN if len(words) >= SHORT_PROMPT else SHORT_RUN
                for run in _runs(words, size):
                    self._runs.setdefault(run, name)

    def set_that_contains(self, record: Conversation) -> str | None:
        """Give the name of an evaluation set that shares text with the record, if there is one."""
        for words in user_words(record):
            if tuple(words) in self._exact:
                return self._exact[tuple(words)]
            for size in (LONG_RUN, SHORT_RUN):
                for run in _runs(words, size):
                    if run in self._runs:
                        return self._runs[run]
        return None


def decontaminate(
    records: list[Conversation], text: EvaluationText, splits: Iterable[str]
) -> Sifted:
    """Drop records of the named splits that share text with an evaluation prompt.

    The facts count them by evaluation set.
    """
    sifted = Sifted([])
    checked = set(splits)
    for record in records:
        name = text.set_that_contains(record) if record.split in checked else None
        if name is None:
            sifted.kept.append(record)
        else:
            sifted.dropped[DropReason.contaminated] += 1
            sifted.facts[name] += 1
    return sifted


def user_words(record: Conversation) -> list[list[str]]:
    """Give the words of each user turn, normalised (NFKC, case, spaces; digits kept)."""
    texts = [turn.content or "" for turn in record.prompt if turn.role == "user"]
    words = [re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()) for text in texts]
    return [turn for turn in words if turn]


def _runs(words: list[str], size: int) -> Iterable[tuple[str, ...]]:
    return (tuple(words[start : start + size]) for start in range(len(words) - size + 1))
