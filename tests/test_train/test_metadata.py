from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch

from dflash_train.config import ServingSampling
from dflash_train.drafter.checkpoint import load_checkpoint, save_checkpoint
from dflash_train.drafter.golden import check_golden
from dflash_train.drafter.metadata import (
    METADATA_NAME,
    CheckpointMetadata,
    read_metadata,
    write_metadata,
)
from dflash_train.features.target import Target
from dflash_train.records.manifest import Manifest
from dflash_train.testing import VARIANTS, tiny_drafter
from dflash_train.training.accelerator import build_accelerator
from dflash_train.training.stage import train

KNOWN = CheckpointMetadata(
    target={"name": "tiny", "revision": "abc", "target_layer_ids": [1, 3]},
    thinking=True,
    provenance={"recipe": "smollm2", "steps": 3},
)


@pytest.mark.parametrize("variant", ["plain", "dflash2", "dspark", "reduced", "sliding_causal"])
def test_a_saved_checkpoint_knows_its_target_and_its_golden_forward(
    variant: str, target32: Target, tmp_path: Path
):
    drafter = tiny_drafter(target32, **VARIANTS[variant])
    save_checkpoint(drafter, tmp_path / "best", metadata=KNOWN)
    found = read_metadata(tmp_path / "best")
    assert found is not None
    assert (found.target, found.thinking) == (KNOWN.target, True)
    assert found.provenance == KNOWN.provenance
    assert found.golden is not None
    assert check_golden(load_checkpoint(tmp_path / "best"), found.golden) == 0.0


def test_equal_runs_write_equal_bytes(target32: Target, tmp_path: Path):
    for name in ("one", "two"):
        save_checkpoint(tiny_drafter(target32), tmp_path / name, metadata=KNOWN)
    one, two = (tmp_path / name / METADATA_NAME for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_drafter_of_others_has_no_metadata(tmp_path: Path):
    assert read_metadata(tmp_path) is None


def test_metadata_without_a_golden_forward_comes_back(tmp_path: Path):
    write_metadata(tmp_path, KNOWN)
    assert read_metadata(tmp_path) == KNOWN


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"{}",
        orjson.dumps(KNOWN.to_json() | {"format_version": 2}),
        orjson.dumps(KNOWN.to_json() | {"format": "other"}),
        orjson.dumps(KNOWN.to_json() | {"surprise": 1}),
        orjson.dumps(KNOWN.to_json() | {"golden": {"parts": {}}}),
    ],
)
def test_a_damaged_file_is_refused_by_name(content: bytes, tmp_path: Path):
    (tmp_path / METADATA_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{METADATA_NAME} is damaged or foreign"):
        read_metadata(tmp_path)


def test_a_drafter_that_diverged_is_saved_and_never_called_sound(target32: Target, tmp_path: Path):
    drafter = tiny_drafter(target32)
    drafter.fc.weight.data.fill_(torch.nan)
    save_checkpoint(drafter, tmp_path / "last")
    found = read_metadata(tmp_path / "last")
    assert found is not None
    assert found.golden is not None
    assert check_golden(drafter, found.golden) == float("inf")


def test_training_tells_what_it_knows(
    target32: Target, answer_rows, write_split, tiny_recipe, tmp_path: Path
):
    config = tiny_recipe(tmp_path, max_steps=2)
    sampling = ServingSampling(enable_thinking=True)
    config = replace(config, data=replace(config.data, serving_sampling=sampling))
    rows = answer_rows(target32, [5, 9, 7])
    for split in ("train", "validation"):
        write_split(config.run_dir / "features" / split, rows)
    block = {"name": "tiny", "revision": "seed-0", "target_layer_ids": [1, 3]}
    manifest = train(
        config,
        accelerator=build_accelerator(config.launch),
        head=target32.head,
        drafter=tiny_drafter(target32),
        manifest=Manifest(
            stage="train", recipe_hash="sha256:0", target=block, versions={"torch": "2"}
        ),
    )
    best, last = (read_metadata(config.run_dir / "checkpoint" / name) for name in ("best", "last"))
    assert best is not None
    assert last is not None
    assert (last.target, last.thinking) == (block, True)
    assert last.provenance["recipe"] == config.name
    assert last.provenance["versions"] == {"torch": "2"}
    assert (last.provenance["steps"], last.provenance["training_rows"]) == (2, 3)
    assert best.provenance["acceptance_length"] == manifest.details["best_acceptance_length"]
    drafter = load_checkpoint(config.run_dir / "checkpoint" / "last")
    assert last.golden is not None
    assert check_golden(drafter, last.golden) == 0.0
