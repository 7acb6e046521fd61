"""Prompt lookup in the live loop: drafts copied from the request's own text.

A copy puts all its probability on one token per position, so sampled requests judge it by the rule
for argmax proposals (verify.py). Alone, on the same passes as the drafter, it is the baseline that
a drafter has to beat:

    lookup_decoder(target, num_drafts=7, fast=True).generate(prompt_ids, max_new_tokens=256)
"""

from dataclasses import dataclass

import numpy as np
import torch

from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.drafting import Draft, no_draft
from dflash_inference.prompt_lookup import Copy, find_copy
from dflash_inference.request import RequestState
from dflash_inference.target_pass import TargetPass
from dflash_train.config import require
from dflash_train.features.target import Target


def copy_for(request: RequestState, num_drafts: int) -> Copy:
    """Copy for a request what its budget has room for, at most `num_drafts` tokens."""
    text = np.array(request.token_ids, dtype=np.int64)
    return find_copy(text, request.num_drafts(num_drafts))


def draft_of(copy: Copy, number: int) -> Draft:
    """Propose the first tokens of a copy; an empty one proposes nothing."""
    ids = torch.from_numpy(copy.tokens[:number].copy())
    return Draft(ids=ids, source="lookup") if len(ids) else no_draft()


@dataclass(frozen=True)
class LookupDrafts:
    """Copies at every step, whatever it costs; the drafter is never asked."""

    number: int
    """Most tokens copied."""

    def plan(self, requests: list[RequestState]) -> list[Draft | None]:
        """Copy for each request; where nothing matches nothing is drafted."""
        return [draft_of(copy_for(each, self.number), self.number) for each in requests]

    def num_verified(self, request: RequestState, draft: Draft) -> int:
        """Give all: copies do not pass here."""
        return len(draft.ids)


def lookup_decoder(
    target: Target, *, num_drafts: int, fast: bool = False, target_pass: TargetPass | None = None
) -> SpeculativeDecoder:
    """Build a decoder without a drafter that copies at every step.

    Args:
        target: Who decides every token.
        num_drafts: Most tokens copied; beside a drafter, as many as it drafts.
        fast: As for `SpeculativeDecoder`.
        target_pass: As there.

    Raises:
        ValueError: Nothing may be copied.
    """
    require(num_drafts >= 1, f"num_drafts (={num_drafts}) must be at least 1 copied token.")
    policy = LookupDrafts(num_drafts)
    decoder = SpeculativeDecoder(target, None, fast=fast, target_pass=target_pass, policy=policy)
    decoder.block_size = num_drafts + 1
    return decoder
