"""Plain greedy decoding, one token per target pass: the lossless oracle and the speed baseline.

It keeps the target's two best logits at every output position. Where another way of decoding
parts from it, their gap tells a rounding near-tie from a bug.
"""

import torch
from torch import Tensor

from dflash_inference.request import synchronized_seconds
from dflash_inference.sampling import SamplingParams
from dflash_inference.trace import DecodeTrace, StepTrace, TopTwo
from dflash_train.config import require
from dflash_train.features.target import Target


class AutoregressiveDecoder:
    """The target alone, width 1."""

    def __init__(self, target: Target) -> None:
        """Take the target to decode with."""
        self.target = target

    @torch.inference_mode()
    def generate(self, prompt_ids: list[int], *, max_new_tokens: int) -> DecodeTrace:
        """Decode one prompt until a stop token or the budget, both counted in the output.

        Every token after the one of prefill is a step of width 1; its time is `verify_s`.

        Raises:
            ValueError: An empty prompt or a budget below one token.
        """
        require(bool(prompt_ids), "prompt_ids (=[]) must hold at least one token.")
        max_new_tokens = SamplingParams(max_new_tokens=max_new_tokens).max_new_tokens
        cache = self.target.new_cache()
        top_two: list[TopTwo] = []
        steps: list[StepTrace] = []

        def feed(token_ids: list[int]) -> float:
            began = synchronized_seconds(self.target.device)
            input_ids = torch.tensor([token_ids], dtype=torch.int64, device=self.target.device)
            output = self.target.forward(input_ids, cache=cache, last_logits_only=True)
            top_two.append(_top_two(output.logits[0, -1]))
            return synchronized_seconds(self.target.device) - began

        prefill_s = feed(prompt_ids)
        stops = self.target.stop_token_ids
        while len(top_two) < max_new_tokens and top_two[-1].ids[0] not in stops:
            start = len(prompt_ids) + len(top_two) - 1
            seconds = feed([top_two[-1].ids[0]])
            steps.append(
                StepTrace(start=start, width=1, num_accepted=0, committed=1, verify_s=seconds)
            )
        return DecodeTrace(
            prompt_length=len(prompt_ids),
            block_size=1,
            output_ids=[pair.ids[0] for pair in top_two],
            steps=steps,
            prefill_s=prefill_s,
            finish_reason="stop" if top_two[-1].ids[0] in stops else "length",
            top_two=top_two,
        )


def _top_two(logits: Tensor) -> TopTwo:
    """Give the argmax and the best of the rest, of `[V]` logits.

    The first entry is `argmax` itself: `topk` may order exact ties differently, and the output
    must be the token that every other decoder would take.
    """
    best = int(logits.argmax())
    rest = logits.clone()
    rest[best] = float("-inf")
    second = int(rest.argmax())
    return TopTwo(ids=(best, second), logits=(float(logits[best]), float(logits[second])))
