"""AdamW with a linear warm-up and a cosine to zero, both functions of the step alone."""

import math

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dflash_train.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """Give AdamW over all trained parameters; norm weights and biases have no weight decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    return AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(beta1, beta2), fused=True)


def build_schedule(optimizer: Optimizer, *, max_steps: int, warmup_share: float) -> LambdaLR:
    """Give the schedule whose n-th call follows the n-th optimiser step."""
    warmup_steps = math.ceil(max_steps * warmup_share)
    return LambdaLR(
        optimizer, lambda step: lr_factor(step, max_steps=max_steps, warmup_steps=warmup_steps)
    )


def lr_factor(step: int, *, max_steps: int, warmup_steps: int) -> float:
    """Give the share of the peak learning rate for the step after `step` finished ones.

    It rises to 1 over the warm-up and falls along half a cosine to 0 after the last step.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """Give the learning rate of the next step."""
    return float(optimizer.param_groups[0]["lr"])
