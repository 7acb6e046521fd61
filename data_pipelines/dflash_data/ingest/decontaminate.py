"""Keeps evaluation prompts out of training: exact matches and shared word n-grams.

A training record goes if one of its user turns equals an evaluation prompt after
normalisation, or shares a 13-word run with one (8 for evaluation prompts under 40 words).
Prompts below 8 words count on exact matches only. System prompts are exempt, test is never
touched. Histories repeat in every call of a session, so each distinct turn is looked at once.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from dflash_data.ingest.word_hashes import WordHashes, hash_words
from dflash_train.records.conversation import Conversation

LONG_RUN, SHORT_RUN = 13, 8
"""Shared words that mark a record as contaminated, for long and short evaluation prompts."""
SHORT_PROMPT = 40
"""Evaluation prompts below this number of words use the short run."""
_FILTER_BITS = 20


class EvaluationText:
    """The evaluation prompts, as what may not recur in training."""

    def __init__(self, evaluation: Mapping[str, Iterable[Conversation]]) -> None:
        self.names = sorted(evaluation)
        exact: dict[int, int] = {}
        runs: dict[int, dict[int, int]] = {LONG_RUN: {}, SHORT_RUN: {}}
        for number, name in enumerate(self.names):
            turns = [turn for prompt in evaluation[name] for turn in user_turns(prompt)]
            for words in hash_words(turns):
                lengths = words.num_words
                for text in words.texts()[lengths > 0].tolist():
                    exact.setdefault(text, number)
                for size, known in runs.items():
                    hashes, owners = words.runs(size)
                    is_long = lengths[owners] >= SHORT_PROMPT
                    for run in hashes[is_long == (size == LONG_RUN)].tolist():
                        known.setdefault(run, number)
        self._exact = HashSet(exact)
        self._runs = {size: HashSet(known) for size, known in runs.items()}

    def sets_that_contain(self, texts: list[str]) -> list[int]:
        """Give, for each text, the number of an evaluation set that it shares text with, or -1."""
        found = [np.zeros(0, dtype=np.int64)]
        found += [self._find(words) for words in hash_words(texts)]
        return np.concatenate(found).tolist()

    def _find(self, words: WordHashes) -> NDArray[np.int64]:
        found = np.where(words.num_words > 0, self._exact.find(words.texts()), -1)
        for size, known in self._runs.items():
            hashes, owners = words.runs(size)
            sets = known.find(hashes)
            hit = sets >= 0
            found[owners[hit]] = np.where(found[owners[hit]] < 0, sets[hit], found[owners[hit]])
        return found


class HashSet:
    """Numbers by 64-bit key, asked for many keys at once; nearly all of them are absent."""

    def __init__(self, numbers: Mapping[int, int]) -> None:
        keys = np.array(sorted(numbers), dtype=np.uint64)
        self._keys = keys
        self._numbers = np.array([numbers[key] for key in keys.tolist()], dtype=np.int64)
        self._filter = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self._filter[keys >> np.uint64(64 - _FILTER_BITS)] = True

    def find(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Give the number of each key, -1 where it is absent."""
        found = np.full(len(keys), -1, dtype=np.int64)
        likely = np.flatnonzero(self._filter[keys >> np.uint64(64 - _FILTER_BITS)])
        if not len(likely):
            return found
        places = np.minimum(np.searchsorted(self._keys, keys[likely]), len(self._keys) - 1)
        hit = self._keys[places] == keys[likely]
        found[likely[hit]] = self._numbers[places[hit]]
        return found


def find_contaminated(records: list[Conversation], text: EvaluationText) -> NDArray[np.int64]:
    """Give, for each record, the number of the evaluation set that it repeats; -1 for none."""
    distinct: dict[str, int] = {}
    for record in records:
        for turn in user_turns(record):
            distinct.setdefault(turn, len(distinct))
    sets = text.sets_that_contain(list(distinct))
    found = [
        next((sets[distinct[turn]] for turn in user_turns(record) if sets[distinct[turn]] >= 0), -1)
        for record in records
    ]
    return np.array(found, dtype=np.int64)


def user_turns(record: Conversation) -> list[str]:
    """Give the texts of the user turns."""
    return [turn.content for turn in record.prompt if turn.role == "user" and turn.content]
