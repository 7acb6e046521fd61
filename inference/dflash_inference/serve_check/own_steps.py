"""Our side of the check: the reference decoder, its blocks as wide as a server's.

Our decoder narrows a block that reaches beyond the request's budget, servers draft all K - 1 tokens
and throw away what does not fit. A narrower block is another forward pass, so the request is
decoded with room for one more block, and cut where the server had to stop.
"""

from dataclasses import replace

from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.trace import DecodeTrace, StepTrace


def decode_as_served(
    decoder: SpeculativeDecoder, prompt_ids: list[int], *, max_new_tokens: int
) -> DecodeTrace:
    """Decode greedily up to a budget that narrows no block.

    Returns:
        The trace a server would write: the last step counts all drafts that verify kept, also
        those behind the budget.
    """
    room = max_new_tokens + decoder.block_size + 1
    trace = decoder.generate(prompt_ids, max_new_tokens=room)
    end = trace.prompt_length + max_new_tokens  # position behind the last token that is kept
    steps = [_cut(step, end) for step in trace.steps if step.start + 1 < end]
    is_cut = len(trace.output_ids) > max_new_tokens
    return replace(
        trace,
        output_ids=trace.output_ids[:max_new_tokens],
        steps=steps,
        finish_reason="length" if is_cut else trace.finish_reason,
    )


def _cut(step: StepTrace, end: int) -> StepTrace:
    return replace(step, committed=min(step.committed, end - 1 - step.start))
