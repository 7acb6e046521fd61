import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dflash_train.config import (
    LaunchConfig,
    LossConfig,
    OptimConfig,
    OptimizerName,
    RecipeConfig,
    ScheduleName,
    Weighting,
)
from dflash_train.drafter.checkpoint import load_checkpoint
from dflash_train.features.store import FeatureStore
from dflash_train.features.target import Target
from dflash_train.records.manifest import Manifest
from dflash_train.testing import STOP_TOKEN_ID, VARIANTS, tiny_drafter
from dflash_train.training import calibration
from dflash_train.training.accelerator import build_accelerator
from dflash_train.training.batching import Pack
from dflash_train.training.optimizer_step import StepResult
from dflash_train.training.progress import CLOCKED
from dflash_train.training.replay import replay_many
from dflash_train.training.stage import train
from dflash_train.training.trainer import Trainer
from dflash_train.training.vocabulary import count_labels

FILES = ("best/config.json", "best/model.safetensors", "last/config.json", "last/model.safetensors")


@pytest.fixture
def start(
    tmp_path: Path, target32: Target, answer_rows, write_split, tiny_recipe
) -> Callable[..., Any]:
    """Make features once and give a function that starts or resumes a named run on them."""
    features = tmp_path / "features"
    write_split(features / "train", answer_rows(target32, [5, 9, 7, 12, 6, 8]))
    write_split(features / "validation", answer_rows(target32, [6, 10, 5], seed=1))

    def run(
        name: str,
        *,
        key: str = "sha256:0",
        shape: dict[str, Any] | None = None,
        groups: dict[str, Any] | None = None,
        **training: Any,
    ) -> Manifest:
        config: RecipeConfig = tiny_recipe(tmp_path, name=name, **training)
        config = replace(config, **(groups or {}))
        link = config.run_dir / "features"
        if not link.exists():
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(features)
        return train(
            config,
            accelerator=build_accelerator(config.launch),
            head=target32.head,
            drafter=tiny_drafter(target32, **(shape or {})),
            manifest=Manifest(stage="train", recipe_hash=key),
            stop_token_ids=[STOP_TOKEN_ID],
        )

    return run


def checkpoint_bytes(run_dir: Path) -> dict[str, bytes]:
    return {name: (run_dir / "checkpoint" / name).read_bytes() for name in FILES}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in lines]


def assert_same_run(first: Path, second: Path) -> None:
    assert checkpoint_bytes(first) == checkpoint_bytes(second)
    assert metrics(first) == metrics(second)
    assert Manifest.read(first / "checkpoint") == Manifest.read(second / "checkpoint")


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, action: Callable[[], None]) -> None:
    """Run an action before the n-th optimiser step of this process."""
    calls = 0
    original = Trainer.train_step

    def train_step(self: Trainer, window: list[Pack]) -> StepResult:
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return original(self, window)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def crash() -> None:
    raise RuntimeError("power cut")


def test_a_run_leaves_checkpoints_metrics_states_and_a_manifest(
    start, tmp_path: Path, target32: Target
):
    manifest = start("run")
    run_dir = tmp_path / "run"
    assert [entry.path for entry in manifest.outputs] == list(FILES)
    manifest.verify_outputs(run_dir / "checkpoint")
    assert manifest.details["steps"] == 6
    assert sorted(path.name for path in (run_dir / "state").iterdir()) == [
        "step-000004",
        "step-000006",
    ]
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    training = lines[0]
    assert set(training) == {
        "step",
        "loss",
        "cross_entropy",
        "lr",
        "grad_norm",
        "slot_accuracy",
        "joint_accuracy",
    }
    assert len(training["slot_accuracy"]) == 3
    validation = lines[1]["validation"]
    assert set(validation["acceptance_length"]) == {"pooled", "per_request"}
    assert validation["num_requests"] == 3
    best = max(
        line["validation"]["acceptance_length"]["pooled"] for line in lines if "validation" in line
    )
    assert manifest.details["best_acceptance_length"] == best
    reloaded = load_checkpoint(run_dir / "checkpoint" / "best")
    assert reloaded.config == tiny_drafter(target32).config


def test_a_crashed_run_resumes_to_the_same_bytes(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    start("whole")
    with monkeypatch.context() as patch:
        fail_at(patch, 6, crash)  # after the state of step 4 and a validation that came later
        with pytest.raises(RuntimeError, match="power cut"):
            start("cut")
    run_dir = tmp_path / "cut"
    assert Manifest.read(run_dir / "checkpoint") is None
    (run_dir / "state" / ".partial-step-000006").mkdir()
    with (run_dir / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step":6,"lo')
    start("cut")
    assert_same_run(tmp_path / "whole", run_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state_and_the_run_resumes_to_the_same_bytes(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
):
    handler = signal.getsignal(number)
    start("whole", validate_every=2)
    with monkeypatch.context() as patch:
        fail_at(patch, 3, lambda: os.kill(os.getpid(), number))
        with pytest.raises(KeyboardInterrupt, match="step 3"):
            start("cut", validate_every=2)
    assert (tmp_path / "cut" / "state" / "step-000003").is_dir()
    assert signal.getsignal(number) is handler
    start("cut", validate_every=2)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_damaged_state_is_passed_over_for_the_one_before(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    start("whole")
    with monkeypatch.context() as patch:
        fail_at(patch, 6, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            start("cut")
    weights = tmp_path / "cut" / "state" / "step-000004" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    start("cut")
    said = capsys.readouterr().err
    assert f"{weights} is missing or damaged" in said
    assert "resuming at step 2" in said
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_states_of_another_recipe_are_not_resumed(
    start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    start("whole", key="sha256:1")
    start("changed", key="sha256:0", max_steps=4)
    shutil.rmtree(tmp_path / "changed" / "checkpoint")
    start("changed", key="sha256:1")
    assert "belongs to another recipe" in capsys.readouterr().err
    assert_same_run(tmp_path / "whole", tmp_path / "changed")


def test_a_run_killed_after_its_last_state_still_writes_its_checkpoint(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    start("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "finish", lambda *_: crash())
        with pytest.raises(RuntimeError, match="power cut"):
            start("cut")
    start("cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_accumulating_packs_equals_one_larger_batch(start, tmp_path: Path):
    start("one", pack_tokens=10_000, log_every=1, max_steps=3)
    start("many", pack_tokens=1, accumulation_steps=6, log_every=1, max_steps=3)
    one, many = (metrics(tmp_path / name) for name in ("one", "many"))
    for first, second in zip(one, many, strict=True):
        if "loss" in first:
            assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
            assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)


def test_features_of_another_width_and_empty_splits_are_refused(
    tmp_path: Path, target32: Target, answer_rows, write_split, tiny_recipe
):
    rows = answer_rows(target32, [5, 9])
    wide = [replace(row, features=row.features.repeat(1, 2)) for row in rows]
    stores = {
        "good": write_split(tmp_path / "good", rows),
        "wide": write_split(tmp_path / "wide", wide),
        "empty": write_split(tmp_path / "empty", []),
    }

    def build(train_split: str, validation_split: str) -> Trainer:
        config = tiny_recipe(tmp_path)
        return Trainer(
            config,
            accelerator=build_accelerator(config.launch),
            drafter=tiny_drafter(target32),
            head=target32.head,
            train=stores[train_split],
            validation=stores[validation_split],
            run_dir=tmp_path / "run",
        )

    with pytest.raises(ValueError, match=r"features 128 wide.*need 64"):
        build("wide", "good")
    with pytest.raises(ValueError, match="nothing to train on"):
        build("empty", "good")
    with pytest.raises(ValueError, match=r"no rows.*data\.validation_share"):
        build("good", "empty")


def test_a_drafter_learns_its_rows_and_reads_them_from_the_features(
    tmp_path: Path, target32: Target, answer_rows, write_split, tiny_recipe
):
    rows = answer_rows(target32, [8] * 4, max_new_tokens=20)
    assert len({tuple(row.input_ids[8:].tolist()) for row in rows}) == 4
    store = write_split(tmp_path / "rows", rows)
    config = tiny_recipe(
        tmp_path,
        lr=1e-2,
        max_steps=150,
        num_anchors=16,
        pack_tokens=256,
        validate_every=150,
        save_every=150,
        head_chunk=256,
    )
    trainer = Trainer(
        config,
        accelerator=build_accelerator(LaunchConfig(num_threads=1)),
        drafter=tiny_drafter(target32),
        head=target32.head,
        train=store,
        validation=store,
        run_dir=config.run_dir,
    )
    before = trainer.validate().pooled
    trainer.fit()
    drafter = trainer.drafter.eval()
    learnt = replay_many(drafter, target32.head, rows).pooled
    swapped = [
        replace(row, features=other.features)
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ]
    with_other_features = replay_many(drafter, target32.head, swapped).pooled
    assert before < 1.3
    assert learnt > 3.5, "close to K = 4"
    assert with_other_features < learnt - 1


def test_the_same_seed_gives_the_same_initial_drafter_whatever_came_before(start, tmp_path: Path):
    torch.manual_seed(77)
    start("one", max_steps=1)
    torch.manual_seed(78)
    start("two", max_steps=1)
    assert_same_run(tmp_path / "one", tmp_path / "two")


DPACE = LossConfig(weighting=Weighting.dpace)
RECIPES: dict[str, dict[str, Any]] = {
    "averaged": {"ema_decay": 0.9},
    "muon": {"groups": {"optim": OptimConfig(name=OptimizerName.muon, schedule=ScheduleName.wsd)}},
    "dpace": {"groups": {"loss": DPACE}},
    "sampled_head": {"head_sample": 40},
    "sampled_dflash2": {"head_sample": 40, "shape": VARIANTS["dflash2"]},
    "sampled_dspark": {"head_sample": 40, "shape": VARIANTS["dspark"]},
    "dflash2": {"shape": VARIANTS["dflash2"], "groups": {"loss": DPACE}, "ema_decay": 0.9},
    "dspark": {"shape": VARIANTS["dspark"], "groups": {"loss": DPACE}},
    "reduced": {"shape": {"draft_vocab_size": 60}, "ema_decay": 0.9},
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_way_of_training_resumes_to_the_same_bytes(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    settings = RECIPES[name]
    start("whole", **settings)
    with monkeypatch.context() as patch:
        fail_at(patch, 6, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            start("cut", **settings)
    start("cut", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_checkpoints_hold_the_average_and_training_goes_on_without_it(start, tmp_path: Path):
    start("plain")
    start("averaged", ema_decay=0.5)
    plain, averaged = (metrics(tmp_path / name) for name in ("plain", "averaged"))
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (plain, averaged)]
    assert losses[0] == losses[1]
    last = "last/model.safetensors"
    assert (
        checkpoint_bytes(tmp_path / "plain")[last] != checkpoint_bytes(tmp_path / "averaged")[last]
    )


def test_a_reduced_vocabulary_is_that_of_the_training_labels(start, tmp_path: Path):
    start("run", shape={"draft_vocab_size": 30})
    drafter = load_checkpoint(tmp_path / "run" / "checkpoint" / "last")
    store = FeatureStore.open(tmp_path / "features" / "train")
    counts = count_labels(store, list(range(len(store))), vocab_size=260)
    ids = drafter.d2t + torch.arange(30)
    assert STOP_TOKEN_ID in ids
    others = ids[ids != STOP_TOKEN_ID]
    left_out = torch.ones(260, dtype=torch.bool)
    left_out[ids] = False
    assert counts[others].min() >= counts[left_out].max()


def test_minutes_become_steps_once_and_the_same_steps_give_the_same_bytes(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def few_steps(seconds: float, **_: float) -> int:
        assert seconds == 90.0
        return 6

    monkeypatch.setattr(calibration, "steps_within", few_steps)
    with monkeypatch.context() as patch:
        warmed_up = calibration.WARMUP_STEPS + calibration.TIMED_STEPS
        fail_at(patch, warmed_up + 6, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            start("minutes", minutes=1.5, max_steps=None)
    stored = (tmp_path / "minutes" / "state" / "calibration.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "steps_within", lambda *_, **__: crash())
        manifest = start("minutes", minutes=1.5, max_steps=None)
    assert manifest.details["calibration"]["max_steps"] == manifest.details["steps"] == 6
    assert manifest.details["calibration"]["seconds_per_step"] > 0
    assert (tmp_path / "minutes" / "state" / "calibration.json").read_bytes() == stored
    start("steps")
    assert checkpoint_bytes(tmp_path / "minutes") == checkpoint_bytes(tmp_path / "steps")
    assert metrics(tmp_path / "minutes") == metrics(tmp_path / "steps")
