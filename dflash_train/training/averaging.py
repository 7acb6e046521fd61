"""An exponential moving average of the weights, beside the ones that are trained.

Late in a run single weights still jump from step to step; their average does not, and is what
validation replays and checkpoints hold. The decay starts low and rises with the steps, else a short
run would average in its own beginning.
"""

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from dflash_train.drafter.model import Drafter

_Tensors = list[Tensor] | tuple[Tensor, ...]


class AveragedDrafter:
    """The averaged weights of a drafter; accelerate saves and restores them."""

    def __init__(self, drafter: Drafter, decay: float) -> None:
        """Copy the drafter as it stands.

        Args:
            drafter: The bare drafter, on its device.
            decay: Share of the average that a step keeps, once (1 + n) / (10 + n) exceeds it.
        """
        self.decay = decay
        self._averaged = AveragedModel(drafter, multi_avg_fn=self._blend).requires_grad_(False)

    @property
    def drafter(self) -> Drafter:
        """The drafter with the averaged weights."""
        averaged = self._averaged.module
        assert isinstance(averaged, Drafter)
        return averaged

    def update(self, drafter: Drafter) -> None:
        """Take in the weights after an optimiser step; the first ones are copied."""
        self._averaged.update_parameters(drafter)

    def state_dict(self) -> dict[str, Tensor]:
        """Give the weights and the number of steps taken in."""
        return self._averaged.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self._averaged.load_state_dict(state)

    @torch.no_grad()
    def _blend(self, averaged: _Tensors, current: _Tensors, num_steps: Tensor | int) -> None:
        steps = int(num_steps)
        decay = min(self.decay, (1 + steps) / (10 + steps))
        for kept, new in zip(averaged, current, strict=True):
            kept.lerp_(new, 1 - decay)
