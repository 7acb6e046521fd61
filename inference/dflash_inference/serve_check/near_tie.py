"""Was the target, or the drafter, undecided where two sides part?

The two best candidates are computed again for that one place, with everything before it fed anew.
A difference counts as a near-tie only if the two sides took exactly these two candidates and their
logits differ by no more than rounding of the target's number format may (`NEAR_TIE`).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.live_check import NEAR_TIE
from dflash_inference.sampling import SamplingParams
from dflash_inference.serve_check.comparison import Aspect, Difference
from dflash_inference.trace import TopTwo


@dataclass(kw_only=True)
class NearTieJudge:
    """Judges the differences of one request."""

    decoder: SpeculativeDecoder
    prompt_ids: list[int]
    output_ids: list[int]
    """The server's answer, whose tokens before the difference are fed."""

    def __call__(self, difference: Difference) -> Difference:
        """Add the two best candidates, and whether they explain the difference."""
        match difference.aspect:
            case Aspect.tokens | Aspect.without_drafter:
                return self._judge_token(difference)
            case Aspect.steps:
                return self._judge_step(difference)
            case Aspect.counts:
                return difference

    @torch.inference_mode()
    def _judge_token(self, difference: Difference) -> Difference:
        ids = [*self.prompt_ids, *self.output_ids[: difference.position]]
        if difference.ours is None or difference.theirs is None:
            return difference  # one side ended, without a token of its own to weigh
        target = self.decoder.target
        tokens = torch.tensor([ids], device=target.device)
        pair = top_two(target.forward(tokens, last_logits_only=True).logits[0, -1])
        is_tie = {difference.ours, difference.theirs} == set(pair.ids) and self._is_close(pair)
        return replace(difference, undecided=pair, is_near_tie=is_tie)

    @torch.inference_mode()
    def _judge_step(self, difference: Difference) -> Difference:
        """Score the slot whose draft one side kept and the other did not."""
        drafter = self.decoder.block_drafter
        if drafter is None or difference.ours is None or difference.theirs is None:
            return difference
        output, slot = self.output_ids, min(difference.ours, difference.theirs)
        anchor = difference.position - 1 - slot  # output index of the step's anchor
        request = self.decoder.new_request(
            [*self.prompt_ids, *output[:anchor]],
            SamplingParams(max_new_tokens=2 * self.decoder.block_size + 1),
        )
        self.decoder.step([request])  # prefill; the target's own token is the anchor
        if request.output_ids != [output[anchor]]:
            return difference
        model, head = drafter.drafter, drafter.output_head
        hidden = drafter.block_hidden([request])[0][model.config.first_slot :]
        logits = model.slot_logits(hidden[slot : slot + 1], head)
        before = torch.tensor([output[anchor + slot]], device=logits.device)
        scores, ids = model.slot_scores(hidden[slot : slot + 1], before, logits, head)
        pair = top_two(scores[0])
        pair = replace(pair, ids=(int(ids[0, pair.ids[0]]), int(ids[0, pair.ids[1]])))
        # The drafts are the same up to the slot, where exactly one side drafted the target's token.
        is_tie = output[difference.position] in pair.ids and self._is_close(pair)
        return replace(difference, undecided=pair, is_near_tie=is_tie)

    def _is_close(self, pair: TopTwo) -> bool:
        dtype = self.decoder.target.model.dtype
        return pair.gap <= NEAR_TIE[dtype] * max(1.0, abs(pair.logits[0]))


def top_two(scores: Tensor) -> TopTwo:
    """Give the two best places of `[C]` scores, best first."""
    best = scores.float().topk(2)
    first, second = best.indices.tolist()
    high, low = best.values.tolist()
    return TopTwo(ids=(first, second), logits=(high, low))
