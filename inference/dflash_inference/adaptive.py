"""Decoding that drafts where it pays on this machine, as `serve` and `generate` do.

A drafter whose drafts are seldom kept, or a machine on which a wide pass is dear, makes speculation
slower than plain decoding. So the passes are timed at the first start (cost_table.py) and each step
takes the way with the most expected tokens per second: the drafter, a copy of earlier text, or the
target alone (paying_drafts.py).
"""

from dflash_inference.block_length import FirstDrafts
from dflash_inference.cost_table import BATCHES, machine_costs
from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.paying_drafts import PayingDrafts
from dflash_inference.sampling import SamplingParams
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target


def new_decoder(
    target: Target, drafter: Drafter, *, fast: bool, adapts_to: int | None
) -> SpeculativeDecoder:
    """Join a target and its drafter for serving.

    Args:
        target: Who decides every token.
        drafter: Who proposes them.
        fast: As for `SpeculativeDecoder`.
        adapts_to: Requests at once, at most, for which it drafts where it pays; None verifies every
            draft.
    """
    decoder = SpeculativeDecoder(target, drafter, fast=fast)
    if fast:
        warm_up(decoder)
    if adapts_to is not None:
        draft_where_it_pays(decoder, most_requests=adapts_to)
    return decoder


def warm_up(decoder: SpeculativeDecoder) -> None:
    """Compile now, at width 1 and with drafts, what the first request would wait for."""
    params = SamplingParams(max_new_tokens=decoder.block_size + 2, stop_token_ids=frozenset())
    drafting = decoder.policy
    for policy in (FirstDrafts(0), drafting):
        decoder.policy = policy
        decoder.generate([0, 0, 0, 0], params=params)


def draft_where_it_pays(decoder: SpeculativeDecoder, *, most_requests: int) -> None:
    """Give a decoder the policy of this machine; the first time measures for some seconds.

    Args:
        decoder: Has a drafter; copies are as long as its drafts.
        most_requests: Requests at once, at most.
    """
    assert decoder.block_drafter is not None
    num_drafts = decoder.block_drafter.drafter.config.num_drafts
    table = machine_costs(decoder, batches=measured_batches(most_requests))
    decoder.policy = PayingDrafts(table, num_drafts=num_drafts, num_copied=num_drafts)


def measured_batches(most_requests: int) -> tuple[int, ...]:
    """Give the numbers of requests at once that are timed for a scheduler of so many."""
    return tuple(batch for batch in BATCHES if batch <= most_requests)
