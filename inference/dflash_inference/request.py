"""The state of one request in flight, and what holds between its steps.

- I1  The target cache holds exactly the positions before `start`; the drafter cache holds the
      context rows before `start` that are not pending.
- I2  The anchor, token `start`, is committed but stands in no cache and has no features yet.
- I3  Pending features belong to the tokens committed since the last draft; the next one eats them.
- I4  Verify feeds the anchor again, so its keys, values and features come from there.
- I5  Rejected positions leave no trace.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dflash_inference.cache import KeyValueCache
from dflash_inference.sampling import SamplingParams, TokenSampler
from dflash_inference.trace import DecodeTrace, StepTrace
from dflash_train.config import require
from dflash_train.drafter.model import ContextCache


def synchronized_seconds(device: torch.device) -> float:
    """Read the clock after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(kw_only=True, eq=False)
class RequestState:
    """One request in flight, equal to itself only.

    After prefill, `token_ids` ends with the anchor.
    """

    prompt_length: int
    token_ids: list[int]
    """Prompt and committed tokens."""
    params: SamplingParams
    target_cache: KeyValueCache
    drafter_cache: ContextCache = field(default_factory=ContextCache)
    pending_parts: list[Tensor] = field(default_factory=list)
    """`[n_i, L*E]` each, rows of positions up to `start - 1`; joined once, by the next draft."""
    sampler: TokenSampler | None = None
    """None takes the likeliest token."""
    steps: list[StepTrace] = field(default_factory=list)
    prefill_s: float = 0.0
    finish_reason: str | None = None
    """`stop`, `length`, `cancelled` or `error`; None while it runs."""

    @classmethod
    def of(
        cls, prompt_ids: list[int], params: SamplingParams, *, tree_room: int = 0
    ) -> "RequestState":
        """Start a request; its first step is prefill.

        Args:
            prompt_ids: At least one token.
            params: Sampling and budget.
            tree_room: Drafted tokens that one verify may hold beyond a chain that fits the budget.

        Raises:
            ValueError: The prompt is empty.
        """
        require(bool(prompt_ids), "prompt_ids (=[]) must hold at least one token.")
        capacity = len(prompt_ids) + params.max_new_tokens + tree_room
        return cls(
            prompt_length=len(prompt_ids),
            token_ids=list(prompt_ids),
            params=params,
            target_cache=KeyValueCache(capacity=capacity),
            sampler=None if params.is_greedy else TokenSampler(params),
        )

    @property
    def max_length(self) -> int:
        """Prompt and generation budget, in tokens."""
        return self.prompt_length + self.params.max_new_tokens

    @property
    def start(self) -> int:
        """Position of the anchor."""
        return len(self.token_ids) - 1

    @property
    def is_prefilled(self) -> bool:
        """Whether the prompt has been read."""
        return self.target_cache.length > 0

    @property
    def output_ids(self) -> list[int]:
        """Tokens behind the prompt, so far."""
        return self.token_ids[self.prompt_length :]

    def num_drafts(self, most: int) -> int:
        """Give how many drafts the budget leaves room for, at most `most`."""
        return min(most, self.max_length - self.start - 1)

    @property
    def num_pending(self) -> int:
        """Number of pending feature rows."""
        return sum(len(rows) for rows in self.pending_parts)

    @property
    def pending_features(self) -> Tensor:
        """Pending features `[n, L*E]`; there are some between steps."""
        return torch.cat(self.pending_parts)

    def add_features(self, rows: Tensor) -> None:
        """Put the features of newly committed tokens, `[n, L*E]`, behind those pending."""
        self.pending_parts.append(rows)

    def take_features(self) -> Tensor:
        """Hand over the pending features `[n, L*E]`; none are pending afterwards."""
        taken, self.pending_parts = self.pending_features, []
        return taken

    def check_invariants(self) -> None:
        """Assert I1 to I3, as far as lengths show them."""
        assert self.target_cache.length == self.start
        assert self.drafter_cache.length == self.start - self.num_pending

    def trace(self, *, block_size: int) -> DecodeTrace:
        """Give the record of a finished request.

        Args:
            block_size: K of the drafter, 1 without one.
        """
        assert self.finish_reason is not None
        return DecodeTrace(
            prompt_length=self.prompt_length,
            block_size=block_size,
            output_ids=self.output_ids,
            steps=self.steps,
            prefill_s=self.prefill_s,
            finish_reason=self.finish_reason,
        )
