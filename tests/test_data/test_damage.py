"""One flipped bit in any file that a run vouches for is found, and the file is named."""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dflash_data.collect.stage import collect
from dflash_data.dataset_repository import export_dataset
from dflash_data.ingest.stage import ingest
from dflash_data.regenerate.stage import regenerate
from dflash_data.sample_traffic.fleet import write_sample_traffic
from dflash_train.config import (
    DataConfig,
    DrafterSettings,
    ExecutorConfig,
    RecipeConfig,
    TargetConfig,
    TrainingConfig,
)
from dflash_train.features.store import FeatureStore
from dflash_train.features.target import Target
from dflash_train.records.conversation import SPLITS
from dflash_train.records.manifest import FILE_NAME, Manifest
from dflash_train.testing import MASK_TOKEN_ID

NUM_FLIPS = 200
KINDS = {
    "conversations": {".gz", ".arrow", ".json", ".md"},
    "regenerated": {".gz", ".safetensors", ".arrow", ".json"},
    "features": {".safetensors", ".arrow", ".json"},
    "dataset": {".parquet", ".json", ".md"},
}
"""Suffixes of the files in each folder of a run."""


@pytest.fixture(scope="module")
def run(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from a log to features, and its dataset repository."""
    folder = tmp_path_factory.mktemp("runs")
    config = RecipeConfig(
        name="run",
        runs_dir=str(folder),
        target=TargetConfig(name_or_path="tiny"),
        drafter=DrafterSettings(mask_token_id=MASK_TOKEN_ID, num_taps=2),
        data=DataConfig(max_new_tokens=4, batch_size=16, max_prompt_tokens=2000, max_drop_share=1),
        training=TrainingConfig(max_steps=1),
        executor=ExecutorConfig(workers=1),
    )
    log = folder / "traffic.jsonl"
    write_sample_traffic(log, seed=0, num_requests=30)
    ingest(config, log, evaluation={}, manifest=Manifest(stage="ingest", recipe_hash="i"))
    regenerate(config, target=target, manifest=Manifest(stage="regenerate", recipe_hash="r"))
    manifest = Manifest(stage="collect", recipe_hash="c", target={"name": "tiny"})
    collect(config, load_target=lambda: target, manifest=manifest)
    export_dataset(
        config.run_dir / "conversations",
        config.run_dir / "dataset",
        license_id="mit",
        excluded=frozenset(),
    )
    return config.run_dir


def verify(run: Path) -> None:
    """Check every file that a manifest of the run vouches for; open features as training does."""
    for path in sorted(run.rglob(FILE_NAME)):
        manifest = Manifest.read(path.parent)
        assert manifest is not None
        manifest.verify_outputs(path.parent)
    for split in SPLITS:
        FeatureStore.open(run / "features" / split)


def files_of_stages(run: Path) -> list[Path]:
    """List all files of the stages but those from which `regenerate` goes on after a kill."""
    files = (path for name in KINDS for path in (run / name).rglob("*") if path.is_file())
    return sorted(
        path for path in files if not {"batches", "plans"} & {*path.relative_to(run).parts}
    )


def vouched_files(run: Path) -> Iterator[Path]:
    """Yield every manifest and what it vouches for, each file once."""
    seen: set[Path] = set()
    for path in run.rglob(FILE_NAME):
        manifest = Manifest.read(path.parent)
        assert manifest is not None
        named = [path, *((path.parent / entry.path).resolve() for entry in manifest.outputs)]
        yield from (each for each in named if each not in seen)
        seen.update(named)


def test_two_hundred_flipped_bits_over_all_files_of_a_run_are_found_and_named(run: Path):
    verify(run)
    files = files_of_stages(run)
    for name, suffixes in KINDS.items():
        assert {path.suffix for path in files if path.is_relative_to(run / name)} == suffixes, name
    assert sorted(vouched_files(run)) == files
    chance = random.Random(0)
    chance.shuffle(files)
    assert len(files) < NUM_FLIPS
    flipped: Counter[str] = Counter()
    for number in range(NUM_FLIPS):
        path = files[number % len(files)]
        sound = path.read_bytes()
        damaged = bytearray(sound)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|changed") as caught:
            verify(run)
        same_file = [each for each in files if each.samefile(path)]  # features may be links
        assert any(str(each) in str(caught.value) for each in same_file)
        path.write_bytes(sound)
        flipped[path.suffix] += 1
    assert all(count >= 3 for count in flipped.values()), flipped
    verify(run)
