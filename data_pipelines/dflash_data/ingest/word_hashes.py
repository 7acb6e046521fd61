"""Words of many texts as 64-bit numbers, and any run of them in one subtraction.

Near-duplicates and decontamination compare runs of words (n-grams), for every record of a log.
Word by word in Python that costs more than all the rest, so whole batches of texts are hashed in
a few numpy passes: with H(i) = sum of b(j) * p^j over j < i, the hash of the span i..k is
(H(k) - H(i)) * p^-i mod 2^64, wherever it stands. The same rule turns bytes into words and words
into runs.

A word is a run of letters, digits and underscores after NFKC and case folding; digits count.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BATCH_BYTES = 1 << 18
"""Bytes hashed at once: the arrays of a batch fit a processor's cache."""
MAX_TEXT_BYTES = 1 << 22
"""Bytes of one text that are looked at; far beyond any prompt that can be trained on."""
_BASE = 0x9E3779B97F4A7C15
_WORD = re.compile(r"\w+")
_IS_WORD = np.array(
    [byte >= 128 or chr(byte).isalnum() or chr(byte) == "_" for byte in range(256)], dtype=bool
)
_BYTE_HASHES = np.random.default_rng(13).integers(1, 2**64, 256, dtype=np.uint64)


@dataclass(frozen=True)
class WordHashes:
    """The words of N texts, one text after another."""

    starts: NDArray[np.int64]
    """`[N + 1]`: words starts[i] .. starts[i + 1] are those of text i."""
    sums: NDArray[np.uint64]
    """`[W + 1]`: the running sums H over all words."""

    @property
    def num_words(self) -> NDArray[np.int64]:
        """Give `[N]`, the number of words of each text."""
        return np.diff(self.starts)

    def spans(self, first: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Hash the words first[i] .. end[i]; equal runs give equal hashes anywhere."""
        return mix(_span(self.sums, first, end, len(self.sums)))

    def texts(self) -> NDArray[np.uint64]:
        """Hash all words of each text, `[N]`; a text without words gives 0."""
        return self.spans(self.starts[:-1], self.starts[1:])

    def runs(self, size: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Hash every run of `size` words that lies within one text.

        Returns:
            The hashes, and the text that each run belongs to.
        """
        counts = np.maximum(self.num_words - size + 1, 0)
        first = ragged_ranges(self.starts[:-1], counts)
        return self.spans(first, first + size), np.repeat(np.arange(len(counts)), counts)


def hash_words(texts: list[str]) -> Iterator[WordHashes]:
    """Hash the words of texts in batches of bounded size, in order."""
    batch: list[bytes] = []
    num_bytes = 0
    for text in texts:
        encoded = folded(text).encode(errors="surrogatepass")[:MAX_TEXT_BYTES]
        if batch and num_bytes + len(encoded) > BATCH_BYTES:
            yield _hash_batch(batch)
            batch, num_bytes = [], 0
        batch.append(encoded)
        num_bytes += len(encoded) + 1
    if batch:
        yield _hash_batch(batch)


def folded(text: str) -> str:
    """Fold a text's case and its compatible characters; only words remain if it is not ASCII."""
    if text.isascii():
        return text.lower()
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def mix(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit over all bits, the finaliser of splitmix64; 0 stays 0."""
    mixed = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def ragged_ranges(first: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give first[0], first[0] + 1, ... (counts[0] numbers), then those of first[1], and so on."""
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(first - before, counts)


def _hash_batch(encoded: Iterable[bytes]) -> WordHashes:
    texts = list(encoded)
    content = np.frombuffer(b"\n".join(texts) + b"\n", dtype=np.uint8)
    ends_of_text = np.cumsum([len(text) + 1 for text in texts])
    is_word = _IS_WORD[content]
    edges = np.flatnonzero(np.diff(is_word, prepend=False, append=False))
    begins, ends = edges[0::2], edges[1::2]
    words = mix(_span(_running_sums(_BYTE_HASHES[content]), begins, ends, len(content) + 1))
    starts = np.concatenate([[0], np.searchsorted(begins, ends_of_text)])
    return WordHashes(starts=starts, sums=_running_sums(words))


def _running_sums(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * _powers(len(values), _BASE), out=sums[1:])
    return sums


def _span(
    sums: NDArray[np.uint64],
    first: NDArray[np.int64],
    end: NDArray[np.int64],
    size: int,
) -> NDArray[np.uint64]:
    return (sums[end] - sums[first]) * _powers(size, pow(_BASE, -1, 2**64))[first]


def _powers(size: int, base: int) -> NDArray[np.uint64]:
    """Give base^0, base^1, ...; the table for ordinary batches is made once."""
    if size > 2 * BATCH_BYTES:
        return _power_table(size, base)
    return _cached_power_table(2 * BATCH_BYTES, base)[:size]


@functools.cache
def _cached_power_table(size: int, base: int) -> NDArray[np.uint64]:
    return _power_table(size, base)


def _power_table(size: int, base: int) -> NDArray[np.uint64]:
    table = np.full(size, base, dtype=np.uint64)
    table[0] = 1
    return np.cumprod(table)
