"""What a real run leaves for those who watch it: timers, curves, traces."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dflash_train.config import RecipeConfig, TrackingConfig, WandbMode
from dflash_train.features.target import Target
from dflash_train.records.manifest import Manifest
from dflash_train.stages.table import stage_named
from dflash_train.stages.walk import recipe_hash
from dflash_train.testing import tiny_drafter
from dflash_train.training.accelerator import build_accelerator
from dflash_train.training.profiling import FOLDER
from dflash_train.training.stage import train
from dflash_train.training.step_timers import PHASES
from dflash_train.training.tracking import TENSORBOARD_FOLDER
from dflash_train.training.trainer import Trainer
from tests.test_train.wandb_files import history

Run = Callable[..., RecipeConfig]
CURVES = {
    "loss", "lr", "slot_accuracy/1", "joint_accuracy/3", "validation/acceptance_length/pooled",
    "validation/acceptance_by_position/1", "tokens_per_second", "seconds/forward",
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, target32: Target, answer_rows, write_split, tiny_recipe) -> Run:
    """Give a function that trains six tiny steps, or goes on with them."""

    def start(*, tracking: TrackingConfig | None = None, **training: Any) -> RecipeConfig:
        config: RecipeConfig = tiny_recipe(tmp_path, **training)
        config = replace(config, tracking=tracking or TrackingConfig())
        features = config.run_dir / "features"
        if not features.exists():
            write_split(features / "train", answer_rows(target32, [5, 9, 7, 12, 6, 8]))
            write_split(features / "validation", answer_rows(target32, [6, 10, 5], seed=1))
        train(
            config,
            accelerator=build_accelerator(config.launch),
            head=target32.head,
            drafter=tiny_drafter(target32),
            manifest=Manifest(stage="train", recipe_hash="sha256:0"),
        )
        return config

    return start


def interrupt_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Stop the run with an error before its n-th step."""
    original = Trainer.train_step

    def train_step(self: Trainer, window: Any) -> Any:
        if self.state.step + 1 == number:
            raise RuntimeError("power cut")
        return original(self, window)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def run_with_a_break(run: Run, tracking: TrackingConfig) -> RecipeConfig:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_step(patch, 5)
        with pytest.raises(RuntimeError, match="power cut"):
            run(tracking=tracking)
    return run(tracking=tracking)


def test_lines_of_steps_hold_phases_that_add_up(run: Run):
    config = run()
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").open()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 3
    for line in steps:
        seconds = line["seconds"]
        assert set(seconds) == {*PHASES, "step"}
        assert sum(seconds[name] for name in PHASES) == pytest.approx(seconds["step"], abs=1e-5)
        assert min(seconds[name] for name in ("data", "forward", "backward", "optimizer")) > 0
        assert line["tokens_per_second"] > 0
        assert line["tflops_per_second"] > 0
        assert line["peak_memory_gib"] > 0
        assert line["mfu"] is None  # no data sheet of a processor


def test_tensorboard_shows_the_curves_of_an_interrupted_run_once(run: Run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = run_with_a_break(run, TrackingConfig(tensorboard=True))
    events = accumulator.EventAccumulator(str(config.run_dir / TENSORBOARD_FOLDER))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= CURVES
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").open()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)


def test_a_resumed_wandb_run_keeps_its_id(run: Run, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = run_with_a_break(run, TrackingConfig(wandb=True, wandb_mode=WandbMode.offline))
    wandb.teardown()  # its service writes the files and may still be at it
    written = sorted(config.run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(written) == 2
    assert len({path.name for path in written}) == 1
    found = [values for path in written for values in history(path)]
    assert {name for values in found for name in values} >= CURVES
    assert [values["step"] for values in found if "loss" in values] == [2, 4, 6]


def test_a_window_of_steps_is_profiled(run: Run):
    config = run(profile_steps=[2, 3])
    (trace,) = (config.run_dir / FOLDER).iterdir()
    assert trace.name == "steps-2-3-rank0.json"
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 2


def test_a_profile_changes_no_result(run: Run):
    plain = run()
    profiled = replace(plain, training=replace(plain.training, profile_steps=[2, 3]))
    stage = stage_named("train")
    assert recipe_hash(profiled, stage) == recipe_hash(plain, stage)
    longer = replace(plain, training=replace(plain.training, max_steps=7))
    assert recipe_hash(longer, stage) != recipe_hash(plain, stage)
