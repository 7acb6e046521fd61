"""Optimiser and schedule: AdamW or Muon, a warm-up, a cosine or a plateau, all by the step alone.

Muon (torch.optim.Muon) orthogonalises the update of a matrix. It is for the matrices inside the
network, `fc` and those of the layers; norms, codebooks, tables and heads stay with AdamW. Its
updates are scaled to the size of AdamW's, so that learning rates of one order fit both.
"""

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dflash_train.config import OptimConfig, OptimizerName, ScheduleName


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Give the recipe's optimiser over all trained parameters.

    Norm weights and biases have no weight decay.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    uses_muon = config.name is OptimizerName.muon
    inner = [p for name, p in named if uses_muon and is_inner_matrix(name, p)]
    chosen = {id(p) for p in inner}
    adamw = _build_adamw([p for _, p in named if id(p) not in chosen], config)
    if not uses_muon:
        return adamw
    muon = Muon(
        inner, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return MuonWithAdamW(muon, adamw)


class MuonWithAdamW(Optimizer):
    """Two optimisers that look like one to schedules, to accelerate and to train states."""

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        """Share the groups of both; AdamW's come first."""
        self.parts: list[Optimizer] = [adamw, muon]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter once."""
        assert closure is None
        for part in self.parts:
            part.step()
        return None

    def state_dict(self) -> dict[str, Any]:
        """Give the states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both and share their groups again, which loading replaces."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def build_schedule(optimizer: Optimizer, config: OptimConfig, *, max_steps: int) -> LambdaLR:
    """Give the schedule whose n-th call follows the n-th optimiser step."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, config, max_steps=max_steps))


def lr_factor(step: int, config: OptimConfig, *, max_steps: int) -> float:
    """Give the share of the peak learning rate for the step after `step` finished ones.

    It rises to 1 over the warm-up and ends at 0 after the last step: along half a cosine, or
    (`wsd`) constant first and then along a line over the last `decay_share` of all steps.
    """
    warmup_steps = math.ceil(max_steps * config.warmup_share)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = max(0, max_steps - step)
    if config.schedule is ScheduleName.wsd:
        return min(1.0, left / max(1, math.ceil(max_steps * config.decay_share)))
    return 0.5 * (1 - math.cos(math.pi * left / max(1, max_steps - warmup_steps)))


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """Give the learning rate of the next step, AdamW's where there are two."""
    return float(optimizer.param_groups[0]["lr"])


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether Muon may update a drafter's parameter: a matrix of `fc` or of a layer."""
    return parameter.ndim == 2 and name.startswith(("fc.", "layers."))


def _build_adamw(parameters: list[nn.Parameter], config: OptimConfig) -> AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    return AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(beta1, beta2), fused=True)
