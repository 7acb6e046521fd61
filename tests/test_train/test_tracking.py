import json
import sys
from pathlib import Path

import pytest

from dflash_train.config import TrackingConfig, WandbMode
from dflash_train.training.tracking import JsonlTracker, WandbTracker, flatten


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_drops_lines_after_its_train_state(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    first = JsonlTracker(path, resumed_step=0)
    for step in (10, 20, 20, 30):
        first.log(step, {"loss": 1.0})
    first.close()
    with path.open("ab") as stream:
        stream.write(b'{"step":40,"lo')  # killed in the middle of a line
    second = JsonlTracker(path, resumed_step=20)
    second.log(30, {"loss": 0.5})
    second.close()
    assert steps_of(path) == [10, 20, 20, 30]
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 30, "loss": 0.5}


def test_a_new_run_starts_an_empty_file(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":10}\n')
    JsonlTracker(path, resumed_step=0).close()
    assert path.read_text() == ""


def test_nested_values_get_slash_separated_names():
    values = {"loss": 1.5, "slot_accuracy": [0.5, None], "validation": {"pooled": 2.0}}
    assert flatten(values) == {"loss": 1.5, "slot_accuracy/1": 0.5, "validation/pooled": 2.0}


def test_wandb_runs_offline_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = TrackingConfig(wandb=True, wandb_mode=WandbMode.offline)
    tracker = WandbTracker(config, run_dir=tmp_path, name="tiny", settings={"seed": 0})
    tracker.log(10, {"loss": 1.5, "validation": {"acceptance_length": {"pooled": 2.0}}})
    tracker.close()
    wandb.teardown()  # its service writes the file and may still be at it
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = written.read_bytes()
    assert b"acceptance_length/pooled" in content


def test_a_missing_wandb_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"tracking\.wandb .*pip install"):
        WandbTracker(TrackingConfig(wandb=True), run_dir=tmp_path, name="tiny", settings={})
