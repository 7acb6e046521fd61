"""A run with its curves, tables and report in W&B's and TensorBoard's own files, read back."""

from pathlib import Path

import pytest

from dflash_train.config import compose
from dflash_train.records.manifest import Manifest
from dflash_train.stages.walk import run_stage
from dflash_train.stages.workshop import Workshop
from dflash_train.testing import ask, write_conversations
from tests.test_train.wandb_files import artifacts, history

CURVES = {
    "loss", "lr", "grad_norm", "tokens_per_second", "blocks_per_second", "peak_memory_gib",
    "seconds/data", "seconds/forward", "seconds/backward", "seconds/optimizer",
    "seconds/communication", "slot_accuracy/1", "joint_accuracy/3",
    "validation/acceptance_length/pooled", "validation/acceptance_by_position/3",
}  # fmt: skip
SETTINGS = [
    "tracking.wandb=true",
    "tracking.wandb_mode=offline",
    "tracking.tensorboard=true",
    "evaluate.eval_sets=[]",
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """The folder of a run from conversations to its report, each verb in turn."""
    wandb = pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    words = [f"runs_dir={tmp_path_factory.mktemp('runs')}", *tiny_overrides, *SETTINGS]
    config = compose(words)
    records = [ask(f"{name}0", f"question {name}" * 3) for name in "abcdefgh"]
    for split in ("validation", "test"):
        records += [ask(f"{split}{place}", f"held out {place}", split=split) for place in range(4)]
    write_conversations(config, records)
    Manifest(stage="ingest", recipe_hash="r").write(config.run_dir / "conversations")
    workshop = Workshop(config)
    for stage in ("regenerate", "collect", "train", "evaluate", "report"):
        run_stage(workshop, stage)
    wandb.teardown()  # its service writes the files and may still be at it
    return config.run_dir


def test_training_and_report_are_one_wandb_run_with_every_curve(run_dir: Path):
    written = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(written) == 2
    assert len({path.name for path in written}) == 1, "one id"
    training, report = written
    values = history(training)
    assert {name for each in values for name in each} >= CURVES
    assert [each["step"] for each in values if "loss" in each] == [3, 6, 9, 12]
    tables = {name.rpartition("/")[0] for each in history(report) for name in each}
    assert tables >= {"report/acceptance_length", "report/draft_positions", "report/num_accepted"}


def test_the_report_is_an_artifact_of_the_run(run_dir: Path):
    (report,) = (
        files
        for path in run_dir.glob("wandb/offline-run-*/run-*.wandb")
        for (kind, name), files in artifacts(path).items()
        if kind == "report" and name == "tiny-report"
    )
    assert report >= {"report.json", "report.md", "report.html"}


def test_tensorboard_has_the_same_curves(run_dir: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= CURVES
    assert [event.step for event in events.Scalars("loss")] == [3, 6, 9, 12]
    assert [e.step for e in events.Scalars("validation/acceptance_by_position/1")] == [6, 12]
