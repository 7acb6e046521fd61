"""The loss under FSDP2 itself, on two CPU processes: accelerate shards on GPUs only."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from dflash_train.config import LaunchConfig, LossConfig, Weighting
from dflash_train.drafter.layers import GatedMLP
from dflash_train.features.store import FeatureStore
from dflash_train.features.target import Target
from dflash_train.testing import VARIANTS, assert_close, tiny_drafter, tiny_target
from dflash_train.training.batching import BatchSource, BlockSettings, TrainingBatch
from dflash_train.training.drafter_loss import DrafterLoss
from dflash_train.training.losses import LossSettings, fixed_weights
from tests.test_train.launched_runs import by_torch, launch

CASES = ["plain", "dflash2", "dspark", "plain-recomputed", "dspark-recomputed"]
NUM_STEPS, NUM_RANKS = 3, 2


def build(case: str, target: Target) -> DrafterLoss:
    variant, _, recomputes = case.partition("-")
    return DrafterLoss(
        tiny_drafter(target, dtype=torch.float64, **VARIANTS[variant]).train(),
        target.head,
        launch=LaunchConfig(activation_checkpointing=bool(recomputes)),
    )


def settings_of(model: DrafterLoss) -> LossSettings:
    loss = LossConfig(weighting=Weighting.dpace)
    return LossSettings(loss=loss, slot_weights=fixed_weights(loss, model.drafter.config), chunk=16)


def packs(folder: Path, model: DrafterLoss) -> list[TrainingBatch]:
    shape = model.drafter.config
    blocks = BlockSettings(
        block_size=shape.block_size, num_anchors=4, seed=0, first_slot=shape.first_slot
    )
    source = BatchSource(FeatureStore.open(folder / "rows"), blocks, pack_tokens=40)
    stream = source.stream(epoch=0, position=0)
    return [source.load(next(stream)) for _ in range(NUM_RANKS)]


def train(model: DrafterLoss, batches: list[TrainingBatch]) -> list[float]:
    """Take a few steps on the same batches; give the loss that this process saw at each."""
    optimizer, settings = AdamW(model.parameters(), lr=1e-2), settings_of(model)
    seen = []
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            loss_sum, _ = model(batch, model.head, settings)
            (loss_sum / 10).backward()
            total += loss_sum.item()
        optimizer.step()
        seen.append(total)
    return seen


def shard_and_train(folder: str) -> None:
    """Run as one of two processes: shard as recipes/launch/fsdp2.yaml does, and train."""
    torch.distributed.init_process_group("gloo")
    mesh, rank = init_device_mesh("cpu", (NUM_RANKS,)), torch.distributed.get_rank()
    target, place = tiny_target(dtype=torch.float64), Path(folder)
    for case in CASES:
        model = build(case, target)
        own = packs(place, model)[rank]
        for module in model.modules():
            if isinstance(module, GatedMLP):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        seen = train(model, [own])
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        torch.save((seen, whole), place / f"{case}-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort a process that takes itself down in order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, answer_rows, write_split) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    target = tiny_target(dtype=torch.float64)
    rows = answer_rows(target, [5, 9, 7, 12, 6, 8, 10])
    write_split(folder / "rows", rows, dtype=torch.float64)
    launch([*by_torch(NUM_RANKS), "-m", "tests.test_train.test_sharding", str(folder)])
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_drafter_and_its_heads_train_as_a_whole_one(folder: Path, case: str):
    model = build(case, tiny_target(dtype=torch.float64))
    batches = packs(folder, model)
    # FSDP2 averages over ranks; one process adds its batches up.
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad / NUM_RANKS)
    want_losses = train(model, batches)
    found = [torch.load(folder / f"{case}-{rank}.pt") for rank in range(NUM_RANKS)]
    losses = [sum(each) for each in zip(*(seen for seen, _ in found), strict=True)]
    assert losses == pytest.approx(want_losses, rel=1e-10)
    for _, whole in found:
        for name, tensor in model.state_dict().items():
            assert_close(f"{case}: {name}", whole[name], tensor, 1e-10)


if __name__ == "__main__":
    shard_and_train(sys.argv[1])
