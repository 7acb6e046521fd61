"""The state of one request in flight, and what holds between its steps.

- I1  The target cache holds exactly the positions before `start`; the drafter cache holds the
      context rows before `start` that are not pending.
- I2  The anchor, token `start`, is committed but stands in no cache and has no features yet.
- I3  Pending features belong to the tokens committed by the last verify; the next draft eats them.
- I4  Verify feeds the anchor again, so its keys, values and features come from there.
- I5  Rejected positions leave no trace.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from dflash_inference.trace import StepTrace
from dflash_train.drafter.model import ContextCache


def synchronized_seconds(device: torch.device) -> float:
    """Read the clock after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def check_request(prompt_ids: list[int], max_new_tokens: int) -> None:
    """Raise ValueError for a prompt without tokens or a budget below one token."""
    if not prompt_ids:
        raise ValueError("prompt_ids (=[]) must hold at least one token.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens (={max_new_tokens}) must be at least 1.")


@dataclass(kw_only=True)
class RequestState:
    """One request in flight. `token_ids` ends with the anchor."""

    prompt_length: int
    max_length: int
    """Prompt and generation budget, in tokens."""
    token_ids: list[int]
    target_cache: DynamicCache
    drafter_cache: ContextCache
    pending_features: Tensor
    """`[n, L*E]`, rows of positions `start - n .. start - 1`."""
    prefill_s: float
    steps: list[StepTrace] = field(default_factory=list)

    @property
    def start(self) -> int:
        """Position of the anchor."""
        return len(self.token_ids) - 1

    def check_invariants(self) -> None:
        """Assert I1 to I3, as far as lengths show them."""
        num_pending = self.pending_features.shape[0]
        assert self.target_cache.get_seq_length() == self.start
        assert self.drafter_cache.length == self.start - num_pending
