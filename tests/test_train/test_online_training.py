"""Training on rows that the target reads: the steps, ends and memory of training from a store."""

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from dflash_train.config import FeaturesFrom, OnlineSettings
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.model import Drafter
from dflash_train.features.online_rows import SharedReader
from dflash_train.features.row_source import RowSource
from dflash_train.features.target import Target
from dflash_train.records.manifest import Manifest
from dflash_train.testing import tiny_drafter
from dflash_train.training.accelerator import build_accelerator
from dflash_train.training.batching import Pack
from dflash_train.training.optimizer_step import StepResult
from dflash_train.training.stage import train
from dflash_train.training.trainer import Trainer
from tests.test_train.conftest import AnswerRows, TinyRecipe, WriteSplit, WriteTwins
from tests.test_train.launched_runs import by_torch, launch, losses
from tests.test_train.token_splits import write_tokens
from tests.test_train.twin_splits import TwinSplit

Start = Callable[..., None]


@pytest.fixture
def start(
    tmp_path: Path,
    target32: Target,
    train_twins: TwinSplit,
    write_twins: WriteTwins,
    tiny_recipe: TinyRecipe,
) -> Start:
    """Give a function that starts or resumes a named run in `tmp_path`."""
    twins = {"train": train_twins, "validation": write_twins(tmp_path / "v", [6, 10, 5], seed=1)}

    def run(name: str, *, prefetch: int | None = None, **training: int) -> None:
        """Train from the store, or online with so many micro-batches made ahead."""
        config = tiny_recipe(tmp_path, name=name, log_every=1, **training)
        if prefetch is not None:
            online = OnlineSettings(prefetch=prefetch)
            config.data = replace(config.data, features=FeaturesFrom.online, online=online)
        with SharedReader(target32) as reader:

            def open_rows(split: str) -> RowSource:
                return twins[split].stored if prefetch is None else twins[split].online(reader)

            train(
                config,
                accelerator=build_accelerator(config.launch),
                head=target32.head,
                drafter=tiny_drafter(target32),
                manifest=Manifest(stage="train", recipe_hash="sha256:0"),
                open_rows=open_rows,
            )

    return run


def acceptance_lengths(run_dir: Path) -> list[float]:
    """Read the validations of a run."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["validation"]["acceptance_length"] for line in lines if "validation" in line]


def last_weights(run_dir: Path) -> bytes:
    return (run_dir / "checkpoint" / "last" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("prefetch", [0, 3])
def test_every_step_of_an_online_run_has_the_loss_of_the_store(
    start: Start, tmp_path: Path, prefetch: int
) -> None:
    start("stored", max_steps=20)
    start("online", max_steps=20, prefetch=prefetch)
    stored = losses(tmp_path, "stored")
    assert len(stored) == 20
    assert losses(tmp_path, "online") == pytest.approx(stored, rel=1e-6)
    lengths = acceptance_lengths(tmp_path / "stored")
    assert lengths
    assert acceptance_lengths(tmp_path / "online") == lengths


def test_a_resumed_online_run_ends_with_the_bytes_of_an_undisturbed_one(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start("whole", max_steps=12, prefetch=0)
    step = Trainer.train_step

    def dying_step(self: Trainer, window: list[Pack]) -> StepResult:
        if self.state.step == 7:
            raise RuntimeError("power cut")
        return step(self, window)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", dying_step)
        with pytest.raises(RuntimeError, match="power cut"):
            start("cut", max_steps=12, prefetch=2)
    start("cut", max_steps=12, prefetch=2)
    assert losses(tmp_path, "cut") == losses(tmp_path, "whole")
    assert last_weights(tmp_path / "cut") == last_weights(tmp_path / "whole")


def test_two_ranks_online_have_the_losses_of_two_ranks_on_the_store(
    train_twins: TwinSplit, tmp_path: Path
) -> None:
    folders = [tmp_path, train_twins.stored.folder, train_twins.tokens.folder]
    launch([*by_torch(2), "-m", "tests.test_train.online_on_ranks", *map(str, folders)])
    stored = losses(tmp_path, "stored")
    assert len(stored) == 20
    assert losses(tmp_path, "online") == pytest.approx(stored, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("is_online", [False, True])
def test_ten_epochs_over_1280_rows_hold_no_more_memory_than_two(
    tmp_path: Path,
    target32: Target,
    answer_rows: AnswerRows,
    write_split: WriteSplit,
    tiny_recipe: TinyRecipe,
    is_online: bool,
) -> None:
    lengths = [8 + number % 40 for number in range(1280)]
    parts = [answer_rows(target32, lengths[n : n + 128], seed=n) for n in range(0, 1280, 128)]
    rows = [row for part in parts for row in part]
    twins = TwinSplit(
        stored=write_split(tmp_path / "stored", rows), tokens=write_tokens(tmp_path / "t", rows)
    )
    config = tiny_recipe(tmp_path, max_steps=10_000, pack_tokens=1024)
    one_layer = replace(config.drafter, num_hidden_layers=1)
    shape = DrafterConfig.for_target(one_layer, target32.model.config)
    config.data = replace(config.data, online=OnlineSettings(prefetch=2))
    if is_online:
        config.data = replace(config.data, features=FeaturesFrom.online)
    trainer = Trainer(
        config,
        accelerator=build_accelerator(config.launch),
        drafter=Drafter(shape),
        head=target32.head,
        train=twins.online(target32) if is_online else twins.stored,
        validation=twins.stored,
        run_dir=config.run_dir,
    )
    stream = trainer.source.stream(epoch=0, position=0)
    resident: list[float] = []
    for epoch in range(10):
        while (window := trainer.next_window(stream))[-1].epoch == epoch:
            trainer.train_step(window)
        gc.collect()
        resident.append(psutil.Process().memory_info().rss / 2**20)
    slope, error = fitted_slope(resident[2:])
    print(f"resident MiB by epoch: {resident}; slope {slope:.3f} +- {error:.3f} MiB an epoch")
    features = sum(row.features.nbytes for row in rows) / 2**20
    assert abs(slope) <= max(3 * error, 0.005 * features)


def fitted_slope(values: list[float]) -> tuple[float, float]:
    """Give slope and standard error of a straight line through evenly spaced values."""
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.arange(len(values), dtype=torch.float64)
    x = x - x.mean()
    slope = (x * (y - y.mean())).sum() / (x * x).sum()
    rest = y - y.mean() - slope * x
    error = ((rest * rest).sum() / (len(values) - 2) / (x * x).sum()).sqrt()
    return float(slope), float(error)
