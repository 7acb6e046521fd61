"""Early stop by replay: `training.patience`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dflash_train.config import compose, to_plain
from dflash_train.drafter.checkpoint import load_checkpoint
from dflash_train.features.target import Target
from dflash_train.records.manifest import Manifest
from dflash_train.stages.table import stage_named
from dflash_train.stages.walk import _setting, recipe_hash
from dflash_train.testing import tiny_drafter
from dflash_train.training.accelerator import build_accelerator
from dflash_train.training.metrics import AcceptanceCounts
from dflash_train.training.stage import train
from dflash_train.training.trainer import Trainer

START_AND_VALIDATIONS = [1.5, 1.4, 1.6, 1.6, 1.55, 1.9]
"""Pooled acceptance lengths before step 0 and after steps 2, 4, ..."""

Start = Callable[..., Manifest]


@pytest.fixture
def start(
    tmp_path: Path, target32: Target, answer_rows, write_split, tiny_recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> Start:  # fmt: skip
    """Make features once and give a function that starts or resumes a run of set validations."""
    features = tmp_path / "features"
    write_split(features / "train", answer_rows(target32, [5, 9, 7, 12, 6, 8]))
    write_split(features / "validation", answer_rows(target32, [6, 10, 5], seed=1))

    def validate(self: Trainer, _drafter: object) -> AcceptanceCounts:
        counts = AcceptanceCounts.zeros(self.drafter_config.num_drafts)
        counts.num_requests, counts.num_steps = 1, 1000
        counts.committed = round(1000 * START_AND_VALIDATIONS[self.state.step // 2])
        return counts

    monkeypatch.setattr(Trainer, "_validate", validate)

    def run(name: str, **training: Any) -> Manifest:
        settings = {"max_steps": 10, "validate_every": 2, "save_every": 1} | training
        config = tiny_recipe(tmp_path, name=name, **settings)
        link = config.run_dir / "features"
        if not link.exists():
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(features)
        return train(
            config,
            accelerator=build_accelerator(config.launch),
            head=target32.head,
            drafter=tiny_drafter(target32),
            manifest=Manifest(stage="train", recipe_hash="sha256:0"),
        )

    return run


def validated_steps(run_dir: Path) -> list[int]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "validation" in line]


def test_training_stops_after_so_many_validations_without_a_better_one(
    start: Start, tmp_path: Path
):
    details = start("run", patience=2).details
    assert (details["steps"], details["best_step"]) == (8, 4)
    assert details["best_acceptance_length"] == 1.6
    assert validated_steps(tmp_path / "run") == [0, 2, 4, 6, 8]


def test_the_start_counts_and_is_kept_where_nothing_is_better(
    start: Start, tmp_path: Path, target32: Target
):
    details = start("run", patience=1).details
    assert (details["steps"], details["best_step"]) == (2, 0)
    best = load_checkpoint(tmp_path / "run" / "checkpoint" / "best")
    for name, weight in tiny_drafter(target32).state_dict().items():
        assert torch.equal(best.state_dict()[name], weight), name


def test_patience_that_lasts_changes_no_step(start: Start, tmp_path: Path):
    patient, plain = start("patient", patience=5), start("plain")
    assert patient.details["steps"] == plain.details["steps"] == 10
    last = Path("checkpoint") / "last" / "model.safetensors"
    assert (tmp_path / "patient" / last).read_bytes() == (tmp_path / "plain" / last).read_bytes()
    assert validated_steps(tmp_path / "plain") == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("cut_at", [1, 5])
def test_a_run_cut_short_stops_where_it_would_have_stopped_and_stays_so(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_at: int
):
    whole = start("whole", patience=2)
    original = Trainer.train_step

    def cut(self: Trainer, window: list[Any]) -> Any:
        if self.state.step == cut_at:
            raise RuntimeError("power cut")
        return original(self, window)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            start("resumed", patience=2)
    assert start("resumed", patience=2) == whole
    assert validated_steps(tmp_path / "resumed") == validated_steps(tmp_path / "whole")
    assert start("resumed", patience=2) == whole


def test_a_run_that_is_cut_before_its_first_state_validates_the_start_once(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def cut(_self: Trainer, _window: list[Any]) -> Any:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            start("run", patience=2)
    start("run", patience=2)
    assert validated_steps(tmp_path / "run") == [0, 2, 4, 6, 8]


def test_patience_changes_a_runs_key_only_where_it_is_set():
    plain, patient = (
        compose(["recipe=smollm2", f"training.patience={value}"]) for value in ("null", 3)
    )
    known = _setting(to_plain(plain), "training")
    assert "patience" not in known  # runs from before it stay complete
    assert _setting(to_plain(patient), "training")["patience"] == 3
    stage = stage_named("train")
    assert recipe_hash(plain, stage) != recipe_hash(patient, stage)
