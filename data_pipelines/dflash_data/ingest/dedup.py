"""Which records say the same: exactly after normalisation, or nearly by MinHash.

Exact: a hash of the context, and one of the answer, after NFKC, case and white space are
normalised; digits stay. Near: MinHash over 5-grams of words of the last user turn and the answer,
in 14 bands of 8 hashes, which finds a pair of Jaccard similarity s with 1 - (1 - s^8)^14: 0.92 at
0.8, 0.9996 at 0.9. datatrove's own MinHash wants spaCy and maps every number to 0, which makes
one cluster of a tenant that calculates.

Pairs become clusters band by band, so that only one band of all records is in memory at a time.
"""

import hashlib
import itertools
import unicodedata
from collections.abc import Iterable

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from dflash_data.ingest.word_hashes import WordHashes, hash_words, mix, ragged_ranges
from dflash_train.records.conversation import Conversation, Turn

NUM_BANDS, HASHES_PER_BAND = 14, 8
SHINGLE_WORDS = 5
_CHUNK = 1 << 14
_RNG = np.random.default_rng(29)
_FACTORS = _RNG.integers(0, 2**32, NUM_BANDS * HASHES_PER_BAND, dtype=np.uint32) | np.uint32(1)
_OFFSETS = _RNG.integers(0, 2**32, NUM_BANDS * HASHES_PER_BAND, dtype=np.uint32)


def normalised(text: str) -> str:
    """Fold case, compatible characters and white space; digits and punctuation stay."""
    if text.isascii():
        return " ".join(text.lower().split())
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def hash64(*parts: bytes) -> int:
    """Give the first 64 bits of the SHA-256 of some bytes, never 0."""
    return int.from_bytes(hashlib.sha256(b"\x1f".join(parts)).digest()[:8]) or 1


class ExactKeys:
    """Hashes contexts and answers after normalisation; a message seen before is looked up."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str | None], bytes] = {}

    def context(self, record: Conversation) -> int:
        """Hash everything before the answer: messages, tools and thinking mode."""
        thinking = record.sampling.get("enable_thinking")
        rest = orjson.dumps([record.tools, thinking]) if record.tools or thinking else b""
        rest += b"rendered" if record.has_rendered_prompt else b""
        return hash64(rest, *map(self._message, record.prompt))

    def answer(self, record: Conversation) -> int:
        """Hash the answer; 0 where the target did not write it: it will be written anew."""
        if record.answer is None or not record.on_policy:
            return 0
        return hash64(self._message(record.answer))

    def _message(self, turn: Turn) -> bytes:
        if turn.tool_calls or turn.reasoning or turn.tool_call_id or turn.name:
            whole = normalised(msgspec.json.encode(turn).decode())
            return hashlib.sha256(whole.encode()).digest()
        key = (turn.role, turn.content)
        if key not in self._known:
            content = "-" if turn.content is None else normalised(turn.content) + "."
            text = f"{turn.role}\x1f{content}".encode(errors="surrogatepass")
            self._known[key] = hashlib.sha256(text).digest()
        return self._known[key]


def near_text(record: Conversation) -> str:
    """Give what near-duplicates are compared by: the last user turn and the answer."""
    asked = next((turn.content for turn in reversed(record.prompt) if turn.role == "user"), None)
    answer = record.answer.content if record.answer is not None else None
    return f"{asked or ''}\n{answer or ''}"


def band_hashes(texts: list[str], otherwise: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Give the MinHash bands of texts.

    Args:
        texts: N texts.
        otherwise: `[N]` what stands for a text without words.

    Returns:
        `[14, N]`: two texts with an equal entry in any band are near-duplicates.
    """
    bands: list[NDArray[np.uint64]] = [np.zeros((NUM_BANDS, 0), dtype=np.uint64)]
    done = 0
    for words in hash_words(texts):
        size = len(words.starts) - 1
        bands.append(_batch_bands(words, otherwise[done : done + size]))
        done += size
    return np.concatenate(bands, axis=1)


def _batch_bands(words: WordHashes, otherwise: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shingles, counts = _shingles(words, otherwise)
    signature = _signature(shingles, counts).astype(np.uint64)
    folded = np.zeros((NUM_BANDS, len(counts)), dtype=np.uint64)
    for row in range(HASHES_PER_BAND):
        folded = mix(folded * np.uint64(31) + signature[row::HASHES_PER_BAND] + np.uint64(1))
    return folded


def _shingles(
    words: WordHashes, otherwise: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Give the 5-grams of all texts and their number per text; a shorter text is one shingle."""
    num_words = words.num_words
    counts = np.maximum(num_words - SHINGLE_WORDS + 1, 1)
    first = ragged_ranges(words.starts[:-1], counts)
    size = np.repeat(np.minimum(num_words, SHINGLE_WORDS), counts)
    shingles = words.spans(first, first + size)
    return np.where(size == 0, np.repeat(mix(otherwise), counts), shingles), counts


def _signature(shingles: NDArray[np.uint64], counts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Give `[112, N]`: the least value of each hash function over each text's shingles."""
    values = (shingles >> np.uint64(32)).astype(np.uint32)
    starts = np.cumsum(counts) - counts
    signature = np.empty((len(_FACTORS), len(counts)), dtype=np.uint32)
    cuts = np.unique(np.searchsorted(starts, np.arange(0, len(values) + _CHUNK, _CHUNK)))
    for low, high in itertools.pairwise(cuts.tolist()):
        end = starts[high] if high < len(starts) else len(values)
        part, places = values[starts[low] : end], starts[low:high] - starts[low]
        hashed = np.empty_like(part)
        for function, (factor, offset) in enumerate(zip(_FACTORS, _OFFSETS, strict=True)):
            np.multiply(part, factor, out=hashed)
            np.add(hashed, offset, out=hashed)
            signature[function, low:high] = np.minimum.reduceat(hashed, places)
    return signature


def cluster(bands: Iterable[NDArray[np.uint64]], size: int) -> NDArray[np.int64]:
    """Join records that share a value in any band, and those that these share one with.

    Args:
        bands: Each `[size]`; read one after another.
        size: N, number of records.

    Returns:
        `[N]`: the smallest record number of each record's cluster.
    """
    root = np.arange(size)
    for band in bands:
        order = np.argsort(band, kind="stable")
        equal = band[order[1:]] == band[order[:-1]]
        root = _join(root, order[:-1][equal], order[1:][equal])
    return root


def _join(
    root: NDArray[np.int64], one: NDArray[np.int64], other: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Unite the clusters of pairs: hook each root to a smaller one, then shorten the paths."""
    while True:
        low = np.minimum(root[one], root[other])
        high = np.maximum(root[one], root[other])
        differ = low != high
        if not differ.any():
            return root
        np.minimum.at(root, high[differ], low[differ])
        while True:
            shorter = root[root]
            if np.array_equal(shorter, root):
                break
            root = shorter
