"""Ways of running a drafter's layers give the same loss and the same gradients."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dflash_train.config import LaunchConfig, LossConfig
from dflash_train.drafter.layers import GatedMLP
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target
from dflash_train.testing import VARIANTS, assert_close, tiny_drafter
from dflash_train.training.batching import BatchSource, BlockSettings, TrainingBatch
from dflash_train.training.drafter_loss import DrafterLoss
from dflash_train.training.losses import LossSettings, fixed_weights
from dflash_train.training.metrics import TrainingCounts

VARIANT_NAMES = ["plain", "dflash2", "dspark"]


@pytest.fixture
def batches(tmp_path: Path, target64: Target, answer_rows, write_split) -> list[TrainingBatch]:
    store = write_split(tmp_path, answer_rows(target64, [5, 9, 7, 12]), dtype=torch.float64)
    source = BatchSource(store, BlockSettings(block_size=4, num_anchors=4, seed=0), pack_tokens=40)
    stream = source.stream(epoch=0, position=0)
    return [source.load(next(stream)) for _ in range(2)]


def loss_and_gradients(
    drafter: Drafter, target: Target, batch: TrainingBatch, launch: LaunchConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    model = DrafterLoss(copy.deepcopy(drafter), target.head, launch=launch)
    loss = LossConfig()
    settings = LossSettings(loss=loss, slot_weights=fixed_weights(loss, drafter.config), chunk=16)
    loss_sum, counts = model(batch, target.head, settings)
    loss_sum.backward()
    assert TrainingCounts.from_tensor(counts).loss_sum == loss_sum.item()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss_sum.detach(), gradients


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_layers_that_are_computed_again_change_no_bit(
    target64: Target, batches: list[TrainingBatch], monkeypatch: pytest.MonkeyPatch, variant: str
):
    drafter = tiny_drafter(target64, dtype=torch.float64, **VARIANTS[variant]).train()
    want, want_gradients = loss_and_gradients(drafter, target64, batches[0], LaunchConfig())
    num_calls, original = 0, GatedMLP.forward

    def forward(self: GatedMLP, x: Tensor) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return original(self, x)

    monkeypatch.setattr(GatedMLP, "forward", forward)
    launch = LaunchConfig(activation_checkpointing=True)
    got, gradients = loss_and_gradients(drafter, target64, batches[0], launch)
    assert num_calls == 2 * drafter.config.num_hidden_layers
    assert torch.equal(got, want)
    assert gradients.keys() == want_gradients.keys()
    for name, gradient in want_gradients.items():
        assert torch.equal(gradients[name], gradient), name


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_compiled_layers_give_the_same_gradients_at_every_length(
    target64: Target, batches: list[TrainingBatch], variant: str
):
    drafter = tiny_drafter(target64, dtype=torch.float64, **VARIANTS[variant]).train()
    launch = LaunchConfig(compile=True)
    for batch in batches:
        want, want_gradients = loss_and_gradients(drafter, target64, batch, LaunchConfig())
        got, gradients = loss_and_gradients(drafter, target64, batch, launch)
        assert_close("loss", got, want, 1e-10)
        for name, gradient in want_gradients.items():
            assert_close(name, gradients[name], gradient, 1e-10)
