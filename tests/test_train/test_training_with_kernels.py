"""A drafter trained on interpreted Triton kernels learns what one trained on torch's learns."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from dflash_train.config import KernelChoice, LaunchConfig, LossConfig, Weighting
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target
from dflash_train.features.teacher import TeacherRow
from dflash_train.ops import TRITON_OPS
from dflash_train.testing import LIMITS, VARIANTS, assert_close, tiny_drafter
from dflash_train.training.batching import BatchSource, BlockSettings, TrainingBatch
from dflash_train.training.drafter_loss import DrafterLoss
from dflash_train.training.losses import LossSettings, fixed_weights

CASES = {
    "plain": LossConfig(weighting=Weighting.dpace),
    "mixed": LossConfig(ce=0.5, kl=0.5, tv=0.5, lk_alpha=0.1, lk_lambda=0.1),
    "dflash2": LossConfig(),
    "dspark": LossConfig(),
    "scaled": LossConfig(),
}
"""Loss by variant of the drafter: together every kernel with its branches."""


@pytest.fixture
def batches(tmp_path: Path, target32: Target, answer_rows, write_split) -> list[TrainingBatch]:
    store = write_split(tmp_path, answer_rows(target32, [5, 9, 7, 12]))
    blocks = BlockSettings(block_size=4, num_anchors=3, seed=0)
    source = BatchSource(store, blocks, pack_tokens=45)
    stream = source.stream(epoch=0, position=0)
    return [source.load(next(stream)) for _ in range(2)]


def model_of(
    drafter: Drafter, target: Target, choice: KernelChoice, *, recomputes: bool = False
) -> DrafterLoss:
    own = copy.deepcopy(drafter)
    return DrafterLoss(
        own, target.head, launch=LaunchConfig(kernels=choice, activation_checkpointing=recomputes)
    )


def settings_of(drafter: Drafter, loss: LossConfig) -> LossSettings:
    return LossSettings(loss=loss, slot_weights=fixed_weights(loss, drafter.config), chunk=16)


def taught(batch: TrainingBatch, target: Target) -> TrainingBatch:
    """Give every slot a random teacher of five ids."""
    shape = *batch.labels.shape, len(target.head.embedding_weight)
    p, ids = torch.randn(shape).softmax(-1).topk(5)
    return replace(batch, teacher=TeacherRow(ids=ids.int(), probabilities=p))


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_torch(
    case: str, target32: Target, batches: list[TrainingBatch]
):
    drafter, loss = tiny_drafter(target32, **VARIANTS[case]).train(), CASES[case]
    batch = taught(batches[0], target32) if loss.needs_teacher else batches[0]
    found: dict[KernelChoice, dict[str, Tensor]] = {}
    for choice in (KernelChoice.torch, KernelChoice.triton):
        model = model_of(drafter, target32, choice)
        loss_sum, counts = model(batch, target32.head, settings_of(drafter, loss))
        loss_sum.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[choice] = {"counts": counts, "loss": loss_sum.detach(), **gradients}
    got, want = found[KernelChoice.triton], found[KernelChoice.torch]
    assert got.keys() == want.keys()
    for name, wanted in want.items():
        assert_close(f"{case}: {name}", got[name], wanted, LIMITS[torch.float32][name != "loss"])


def curve(model: DrafterLoss, batches: list[TrainingBatch], *, num_steps: int) -> Tensor:
    """Train as the paper does, on two batches by turns; give the loss of each step."""
    optimizer = AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95))
    settings = settings_of(model.drafter, CASES["plain"])
    losses = []
    for step in range(num_steps):
        batch = batches[step % len(batches)]
        loss_sum, _ = model(batch, model.head, settings)
        optimizer.zero_grad()
        (loss_sum / batch.label_mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss_sum.item() / batch.label_mask.sum().item())
    return torch.tensor(losses)


def assert_same_curve(drafter: Drafter, target: Target, batches: list[TrainingBatch], **how: int):
    got, want = (
        curve(model_of(drafter, target, choice), batches, **how)
        for choice in (KernelChoice.triton, KernelChoice.torch)
    )
    assert want[-2:].mean() < 0.97 * want[:2].mean(), "nothing was learnt"
    assert_close("loss curve", got, want, LIMITS[torch.float32][1])


def test_ten_steps_have_the_same_losses(target32: Target, batches: list[TrainingBatch]):
    assert_same_curve(tiny_drafter(target32).train(), target32, batches, num_steps=10)


@pytest.mark.slow
def test_fifty_steps_have_the_same_losses(target32: Target, batches: list[TrainingBatch]):
    drafter = tiny_drafter(target32, **VARIANTS["mixed"]).train()
    assert_same_curve(drafter, target32, batches, num_steps=50)


def test_layers_that_are_computed_again_change_no_bit_of_the_kernels(
    target32: Target, batches: list[TrainingBatch]
):
    drafter = tiny_drafter(target32).train()
    settings = settings_of(drafter, LossConfig())
    sums = []
    for recomputes in (False, True):
        model = model_of(drafter, target32, KernelChoice.triton, recomputes=recomputes)
        assert model.drafter.ops(target32.head.lm_head_weight) is TRITON_OPS
        loss_sum, _ = model(batches[0], target32.head, settings)
        loss_sum.backward()
        sums.append([loss_sum.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True))
