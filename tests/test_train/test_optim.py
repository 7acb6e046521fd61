import math

import pytest
import torch

from dflash_train.config import OptimConfig
from dflash_train.features.target import Target
from dflash_train.testing import tiny_drafter
from dflash_train.training.optim import build_optimizer, build_schedule, current_lr


def test_norm_weights_have_no_weight_decay(target32: Target):
    drafter = tiny_drafter(target32)
    optimizer = build_optimizer(drafter, OptimConfig(weight_decay=0.1))
    names = {id(parameter): name for name, parameter in drafter.named_parameters()}
    decayed, plain = (
        {names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all("norm" in name for name in plain)
    assert not any("norm" in name for name in decayed)
    assert len(decayed) + len(plain) == len(names)


def test_learning_rate_warms_up_linearly_and_falls_to_zero():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = build_schedule(optimizer, max_steps=100, warmup_share=0.04)
    rates = []
    for _ in range(100):
        rates.append(current_lr(optimizer))
        optimizer.step()
        schedule.step()
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[52] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1.0 - math.cos(math.pi / 96))
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert current_lr(optimizer) == 0.0
