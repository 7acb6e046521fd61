"""Prompt lookup: drafting by copying, the baseline that costs nothing to train.

The longest suffix of the committed text that occurred before is looked up, and the tokens that
followed its most recent occurrence are proposed. Steps are counted as replay counts them, on
stored greedy answers, so the figures stand beside the drafter's. In the live loop the same copies
are proposed by a policy (lookup_drafts.py).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dflash_inference.trace import StepTrace

Tokens = NDArray[np.int64]


class Copy(NamedTuple):
    """What followed an earlier occurrence of the end of a text."""

    tokens: Tokens
    match_length: int
    """Tokens at the end of the text that occurred before; 0 without a match."""


def propose(text: Tokens, num_tokens: int) -> Tokens:
    """Give the tokens of `find_copy`."""
    return find_copy(text, num_tokens).tokens


def find_copy(text: Tokens, num_tokens: int) -> Copy:
    """Copy what followed the most recent earlier occurrence of the longest suffix.

    Args:
        text: Committed tokens, the anchor last.
        num_tokens: Tokens wanted; fewer come back where the text ends, none without a match.
    """
    ends = np.flatnonzero(text[:-1] == text[-1])  # where a suffix of one token ends earlier
    if len(ends) == 0:
        return Copy(text[:0], 0)
    length = 1
    while len(longer := _longer_matches(text, ends, length)):
        ends, length = longer, length + 1
    most_recent = int(ends[-1])
    return Copy(text[most_recent + 1 : most_recent + 1 + num_tokens], length)


def _longer_matches(text: Tokens, ends: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Keep the ends of earlier matches of `length` tokens that match one token more."""
    ends = ends[ends >= length]
    return ends[text[ends - length] == text[len(text) - 1 - length]]


def prompt_lookup(
    prompt_ids: list[int], output_ids: list[int], *, block_size: int, max_length: int
) -> list[StepTrace]:
    """Give the steps of decoding a stored greedy answer with prompt lookup.

    Args:
        prompt_ids: Tokens of the prompt.
        output_ids: The target's greedy answer; its first token comes from prefill.
        block_size: Most tokens one step verifies, the anchor and block_size - 1 copied ones. Beside
            a drafter this is its num_drafts + 1: K, or K + 1 for DSpark's shifted layout.
        max_length: Prompt and generation budget, in tokens.
    """
    text = np.array([*prompt_ids, *output_ids], dtype=np.int64)
    start, end = len(prompt_ids), len(text) - 1
    steps: list[StepTrace] = []
    while start < end:
        wanted = min(block_size, max_length - start) - 1
        draft = propose(text[: start + 1], wanted)
        stored = text[start + 1 : start + 1 + len(draft)]
        accepted = int(np.cumprod(draft[: len(stored)] == stored).sum())
        committed = min(accepted + 1, end - start)
        steps.append(
            StepTrace(start=start, width=len(draft) + 1, num_accepted=accepted, committed=committed)
        )
        start += committed
    return steps
