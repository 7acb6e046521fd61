"""What a request asks of sampling, and the one source of chance that decides for it.

The target's distribution is bent by Transformers' own processors, as `regenerate` bends it
(features/sampling.py): temperature, top-k, top-p, min-p. Every request draws uniform numbers from a
generator of its own and turns them into tokens by the inverse of the cumulative distribution, so
its tokens do not depend on the requests beside it. Legend: n rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from dflash_train.config import require
from dflash_train.features.sampling import warpers


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends."""

    max_new_tokens: int
    """Budget in tokens, the stop token included."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Likeliest tokens that may be drawn; 0 is all."""
    top_p: float = 1.0
    """Probability that the likeliest tokens kept must reach together."""
    min_p: float = 0.0
    """Least probability of a token kept, as a share of the likeliest one's."""
    seed: int = 0
    """Seed of the request's own random stream."""
    stop_token_ids: frozenset[int] | None = None
    """Tokens that end the answer, the last of it; None takes the target's own."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; the tokens that complete one are its last."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: A value is out of its range; the message names it.
        """
        for name, fits, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or a finite number above it"),
            ("top_k", self.top_k >= 0, "at least 0 (0: no limit)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1"),
            ("stop", all(self.stop), "texts of at least one character"),
        ):
            require(fits, f"{name} (={getattr(self, name)}) must be {rule}.")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    def processors(self) -> LogitsProcessorList:
        """Give what bends the logits of a sampled request, in order."""
        return warpers(self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)


class TokenSampler:
    """The distribution and the random stream of one sampled request."""

    def __init__(self, params: SamplingParams) -> None:
        """Start the stream at the request's seed."""
        assert not params.is_greedy
        self.temperature = params.temperature
        self._processors = params.processors()
        self._generator = torch.Generator().manual_seed(params.seed)
        self._returned = torch.empty(0, dtype=torch.float64)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn the target's logits `[n, V]` into what tokens are drawn from, `[n, V]` float64."""
        scores: Tensor = self._processors(_NO_IDS, logits.double())  # pyright: ignore[reportArgumentType]
        return scores.softmax(-1)

    def uniforms(self, number: int) -> Tensor:
        """Draw the stream's next numbers in [0, 1), `[number]` float64."""
        missing = max(0, number - len(self._returned))
        fresh = torch.rand(missing, generator=self._generator, dtype=torch.float64)
        numbers = torch.cat([self._returned, fresh])
        self._returned = numbers[number:]
        return numbers[:number]

    def put_back(self, uniforms: Tensor) -> None:
        """Return the last numbers drawn, which decided nothing; they come next again."""
        self._returned = torch.cat([uniforms.cpu(), self._returned])


_NO_IDS = torch.empty(0, dtype=torch.int64)
"""These processors do not read the tokens so far."""


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Choose tokens by the inverse of the cumulative distribution.

    Args:
        probabilities: `[..., V]`, at least 0; any positive sum.
        uniforms: `[...]` in [0, 1).

    Returns:
        `[...]` int64. A token of probability 0 is never chosen.
    """
    cumulative = probabilities.double().cumsum(-1)
    wanted = uniforms.to(cumulative).unsqueeze(-1) * cumulative[..., -1:]
    chosen = torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)
    # Rounding may put the wanted value on the sum itself; the last possible token is meant.
    last = (cumulative < cumulative[..., -1:]).sum(-1)
    return torch.minimum(chosen, last)
