"""The next token of each row under the serving sampling, each row from a random stream of its own.

Transformers' own processors bend the logits, in the order of its `generate`. They see one row at a
time, without the batch's padding, and each row draws from its own generator: a row's tokens do not
depend on which rows stand beside it, rounding of the forward pass apart.
"""

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dflash_train.config import ServingSampling, require


class RowSampler:
    """Chooses the tokens of one row; greedily, it takes the likeliest."""

    def __init__(self, prompt_ids: list[int], sampling: ServingSampling, *, seed: int) -> None:
        """Start a row.

        Args:
            prompt_ids: The prompt, which a repetition penalty counts as said.
            sampling: The serving sampling.
            seed: Seed of this row's stream.

        Raises:
            ValueError: The sampling has a penalty that Transformers does not know.
        """
        self._processors = _processors(sampling)
        self._is_greedy = sampling.is_greedy
        self._ids = torch.tensor([prompt_ids])
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self, logits: Tensor) -> int:
        """Give the next token after the target's logits `[V]`, and remember it."""
        scores: Tensor = logits[None].float().cpu()  # [1, V]
        for processor in self._processors:
            scores = processor(self._ids, scores)  # pyright: ignore[reportArgumentType]
        if self._is_greedy:
            token = scores.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        self._ids = torch.cat([self._ids, token], dim=1)
        return int(token)


def is_plain_greedy(sampling: ServingSampling) -> bool:
    """Say whether the likeliest token of the bare logits is always taken."""
    return sampling.is_greedy and not _processors(sampling)


def _processors(sampling: ServingSampling) -> list[LogitsProcessor]:
    require(
        sampling.presence_penalty == sampling.frequency_penalty == 0,
        f"data.serving_sampling.presence_penalty (={sampling.presence_penalty}) and "
        f"frequency_penalty (={sampling.frequency_penalty}) are unknown to Transformers. Have the "
        "server answer: set data.endpoints.urls.",
    )
    processors: list[LogitsProcessor] = []
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.is_greedy:
        return processors
    return processors + warpers(
        sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p
    )


def warpers(temperature: float, *, top_k: int, top_p: float, min_p: float) -> LogitsProcessorList:
    """Give what bends the logits of a sampled row, in the order of Transformers' `generate`.

    Args:
        temperature: Above 0.
        top_k: Likeliest tokens that may be drawn; 0 is all.
        top_p: Probability that the likeliest tokens kept must reach together; 1 keeps all.
        min_p: Least probability kept, as a share of the likeliest one's; 0 keeps all.
    """
    found = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        found.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        found.append(TopPLogitsWarper(top_p))
    if min_p:
        found.append(MinPLogitsWarper(min_p))
    return found
