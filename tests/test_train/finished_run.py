"""What a finished run leaves behind, as far as publishing its drafter reads it.

Weights, manifests, conversations and the report are real files of the real writers; the traces that
the report sums up are invented, since no training is worth its time here.
"""

import shutil
from pathlib import Path
from typing import Any

from dflash_inference.report import report
from dflash_train.drafter.checkpoint import save_checkpoint
from dflash_train.drafter.metadata import CheckpointMetadata
from dflash_train.records.conversation import Conversation, Privacy, Turn, write_shard
from dflash_train.records.manifest import Counts, FileEntry, Manifest, file_hash
from dflash_train.testing import tiny_drafter, tiny_target
from tests.test_inference.conftest import invent_run

PLACE = "/a/place"
"""Folder of the target, which is nobody's business."""


def trained_target() -> dict[str, Any]:
    """Give the manifests' target block: the tiny target, loaded from a folder."""
    return tiny_target().describe() | {"name": f"{PLACE}/tiny-target", "revision": "folder-1"}


def answered(split: str, *, scrubbed: bool = True) -> Conversation:
    turns = [Turn(role="user", content="Hi"), Turn(role="assistant", content="Hello.")]
    privacy = Privacy(scrubbed=scrubbed)
    return Conversation(id=split, source="set", messages=turns, split=split, privacy=privacy)


def write_conversations(run_dir: Path, *, scrubbed: bool = True) -> None:
    folder = run_dir / "conversations"
    for split in ("train", "validation", "test"):
        record = answered(split, scrubbed=scrubbed)
        write_shard(folder / f"{split}-00000.jsonl.gz", [record])
    for name in ("data_card.md", "data_card.json"):
        (folder / name).write_text("{}")
    Manifest(
        stage="ingest",
        recipe_hash="sha256:0",
        counts=Counts(read=640, kept=588, dropped={"duplicate": 52}),
        inputs={"sample-traffic": "sha256:3"},
        details={"privacy": {"policy": "2", "records_touched": 42, "redactions": {}}},
    ).write(folder)


def build_run(runs_dir: Path, *, intermediate_size: int = 64) -> Path:
    """Write what a finished run leaves; evaluation and report are of invented traces."""
    config = invent_run(runs_dir, tenants={"h:9f31c07a55d2": 60})
    run_dir, best = config.run_dir, config.run_dir / "checkpoint" / "best"
    drafter = tiny_drafter(tiny_target(), intermediate_size=intermediate_size)
    metadata = CheckpointMetadata(target=trained_target(), provenance={"recipe": "smollm2"})
    save_checkpoint(drafter, best, metadata=metadata)
    Manifest(
        stage="train",
        recipe_hash="sha256:0",
        target=trained_target(),
        command="dflash-train run recipe=smollm2 data.logs=s3://private-bucket training.minutes=3",
        code={"sha": "0" * 40, "dirty": False},
        versions={"torch": "2.13.0"},
        outputs=[FileEntry.of(path, best.parent) for path in sorted(best.iterdir())],
        details={"steps": 1200, "training_rows": 420, "processes": 1,
                 "calibration": {"minutes": 3.0, "seconds_per_step": 0.15}},
    ).write(best.parent)  # fmt: skip
    traces = Manifest.read(run_dir / "traces")
    assert traces is not None
    traces.inputs = {"checkpoint": file_hash(best / "model.safetensors")}
    traces.write(run_dir / "traces")
    report(config, manifest=Manifest(stage="report", recipe_hash="sha256:0"))
    shutil.rmtree(run_dir / "conversations")
    write_conversations(run_dir)
    return run_dir
