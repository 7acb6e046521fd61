import copy
import math

import pytest
import torch
from accelerate import Accelerator

from dflash_train.config import OptimConfig, OptimizerName, ScheduleName
from dflash_train.features.target import Target
from dflash_train.testing import VARIANTS, tiny_drafter
from dflash_train.training.optim import (
    MuonWithAdamW,
    build_optimizer,
    build_schedule,
    current_lr,
)

MUON = OptimConfig(name=OptimizerName.muon, lr=1e-3, muon_lr=3e-3, weight_decay=0.1)


def rates_of(config: OptimConfig) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = build_schedule(optimizer, config, max_steps=100)
    rates = []
    for _ in range(100):
        rates.append(current_lr(optimizer))
        optimizer.step()
        schedule.step()
    assert current_lr(optimizer) == pytest.approx(0.0, abs=1e-12)
    return rates


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


def test_the_cosine_warms_up_linearly_and_falls_to_zero():
    rates = rates_of(OptimConfig(warmup_share=0.04))
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[52] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1.0 - math.cos(math.pi / 96))
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_warm_up_stable_decay_is_flat_and_then_a_line():
    rates = rates_of(OptimConfig(warmup_share=0.1, schedule=ScheduleName.wsd, decay_share=0.25))
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[10:76] == [2.0] * 66
    assert rates[75:] == pytest.approx([2.0 * left / 25 for left in range(25, 0, -1)])


@pytest.mark.parametrize("variant", ["plain", "dflash2", "dspark"])
def test_muon_updates_inner_matrices_and_adamw_all_else(target32: Target, variant: str):
    drafter = tiny_drafter(target32, **VARIANTS[variant])
    optimizer = build_optimizer(drafter, MUON)
    assert isinstance(optimizer, MuonWithAdamW)
    adamw, muon = optimizer.parts
    names = {id(parameter): name for name, parameter in drafter.named_parameters()}
    by_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    by_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert "fc.weight" in by_muon
    assert "layers.0.self_attn.q_proj.weight" in by_muon
    assert all(name.startswith(("fc.", "layers.")) for name in by_muon)
    assert not any("norm" in name for name in by_muon)
    assert by_muon | by_adamw == set(names.values())
    assert not by_muon & by_adamw


def test_one_schedule_drives_both_optimisers_and_a_restored_state_goes_on_alike(
    target32: Target, tmp_path
):
    start = tiny_drafter(target32)
    gradients = [[torch.randn_like(p) for p in start.parameters()] for _ in range(6)]

    def run(folder: str, cut: int | None) -> list[torch.Tensor]:
        accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
        drafter = copy.deepcopy(start)
        optimizer = build_optimizer(drafter, MUON)
        schedule = build_schedule(optimizer, MUON, max_steps=6)
        drafter, optimizer, schedule = accelerator.prepare(drafter, optimizer, schedule)
        for step, gradient in enumerate(gradients):
            if cut == step:
                accelerator.load_state(str(tmp_path / "saved"))
            if cut is not None and step < cut:
                continue
            for parameter, value in zip(drafter.parameters(), gradient, strict=True):
                parameter.grad = value.clone()
            optimizer.step()
            schedule.step()
            if cut is None and step == 2:
                accelerator.save_state(str(tmp_path / "saved"))
            ratios = {group["lr"] / group["initial_lr"] for group in optimizer.param_groups}
            assert max(ratios) == pytest.approx(min(ratios))
        accelerator.free_memory()
        return [parameter.detach().clone() for parameter in drafter.parameters()]

    whole, resumed = run("whole", None), run("resumed", 3)
    assert all(torch.equal(first, second) for first, second in zip(whole, resumed, strict=True))
    moved = [not torch.equal(p, q) for p, q in zip(whole, start.parameters(), strict=True)]
    assert all(moved)
