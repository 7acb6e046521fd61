"""Whole runs without a feature store: what their stages leave, and which target reads for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from dflash_train.config import (
    CollectEngine,
    DataConfig,
    DrafterSettings,
    EvaluateConfig,
    FeaturesDtype,
    FeaturesFrom,
    LaunchConfig,
    OnlineSettings,
    RecipeConfig,
    TargetConfig,
    TrainingConfig,
)
from dflash_train.features.store import FeatureStore, read_index
from dflash_train.records.conversation import Conversation
from dflash_train.records.manifest import FileEntry, Manifest
from dflash_train.stages.online import training_rows
from dflash_train.stages.walk import run_stage
from dflash_train.stages.workshop import Workshop
from dflash_train.testing import MASK_TOKEN_ID, ask, save_tiny_target, write_conversations
from tests.test_data.vllm_stand_in import python_with_stand_in, stand_in_features
from tests.test_train.launched_runs import losses
from tests.test_train.twin_splits import shard_tensors

WholeRun = Callable[..., RecipeConfig]


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def whole_run(tmp_path: Path, target_folder: Path) -> WholeRun:
    """Give a function that takes open conversations through stages of a run in `tmp_path`."""

    def run(
        name: str, stages: str = "regenerate collect train", *, steps: int = 2, **data: Any
    ) -> RecipeConfig:
        config = RecipeConfig(
            name=name,
            runs_dir=str(tmp_path),
            target=TargetConfig(name_or_path=str(target_folder)),
            drafter=DrafterSettings(
                mask_token_id=MASK_TOKEN_ID, num_taps=2, block_size=4, num_hidden_layers=1
            ),
            data=DataConfig(
                max_new_tokens=12, batch_size=4, features_dtype=FeaturesDtype.float32, **data
            ),
            training=TrainingConfig(max_steps=steps, num_anchors=8, pack_tokens=200, log_every=1),
            evaluate=EvaluateConfig(eval_sets=[], live_traffic=1, fast=False, resamples=50),
            launch=LaunchConfig(num_threads=1),
        )
        leave_conversations(config)
        workshop = Workshop(config)
        for stage in stages.split():
            run_stage(workshop, stage)
        return config

    return run


def leave_conversations(config: RecipeConfig) -> None:
    """Leave what `ingest` does, unless an earlier run of this name has."""
    folder = config.run_dir / "conversations"
    if folder.exists():
        return
    write_conversations(config, open_conversations())
    outputs = [FileEntry.of(path, folder) for path in sorted(folder.glob("*.gz"))]
    Manifest(stage="ingest", recipe_hash="sha256:0", outputs=outputs).write(folder)


def open_conversations() -> list[Conversation]:
    """Give sessions of two turns that the target has to answer, and logged ones that it has not."""
    records = []
    for split, letters in {"train": "abcdef", "validation": "gh", "test": "jk"}.items():
        for place, letter in enumerate(letters):
            question = f"question {letter} " * (1 + place % 3)
            records.append(ask(f"{letter}0", question, split=split))
            records.append(ask(f"{letter}1", question, None, "and then?", split=split))
    logged = [ask(f"l{number}", f"count to {number}", "no", split="train") for number in range(3)]
    return records + [structs.replace(each, on_policy=True) for each in logged]


def manifest_of(config: RecipeConfig, stage_folder: str) -> Manifest:
    manifest = Manifest.read(config.run_dir / stage_folder)
    assert manifest is not None
    return manifest


def test_a_run_without_a_store_learns_what_a_run_with_one_learns(
    whole_run: WholeRun, tmp_path: Path
) -> None:
    stages = "regenerate collect train evaluate"
    stored = whole_run("stored", stages, steps=8)
    online = whole_run("online", stages, steps=8, features=FeaturesFrom.online)
    for folder in ("regenerated", "features"):
        assert "features" in shard_tensors(stored.run_dir / folder)
        assert "features" not in shard_tensors(online.run_dir / folder)
        counts = manifest_of(stored, folder).counts
        assert counts is not None
        assert manifest_of(online, folder).counts == counts
    lines = [read_index(config.run_dir / "features" / "train") for config in (stored, online)]
    assert [each.id for each in lines[0]] == [each.id for each in lines[1]]
    want = losses(tmp_path, "stored")
    assert len(want) == 8
    assert losses(tmp_path, "online") == pytest.approx(want, rel=1e-6)
    traces = [config.run_dir / "traces" / "replay-test.jsonl" for config in (stored, online)]
    assert traces[0].read_bytes() == traces[1].read_bytes()


def test_what_decides_rows_decides_the_key_of_train_and_prefetching_does_not(
    whole_run: WholeRun,
) -> None:
    def key(**data: Any) -> str:
        return manifest_of(whole_run("plain", **data), "checkpoint").key

    online = key(features=FeaturesFrom.online)
    assert key(features=FeaturesFrom.online, online=OnlineSettings(prefetch=1)) == online
    with_teacher = key(features=FeaturesFrom.online, teacher_top_k=2)
    assert with_teacher != online
    assert key(teacher_top_k=2) not in (online, with_teacher)


def test_answers_that_came_without_features_can_be_stored_later(whole_run: WholeRun) -> None:
    online = whole_run("run", "regenerate collect", features=FeaturesFrom.online)
    want = {each.id for each in read_index(online.run_dir / "features" / "train")}
    stored = whole_run("run", "regenerate collect")
    store = FeatureStore.open(stored.run_dir / "features" / "train")
    assert {row.id for row in store} == want
    assert all(row.features.any() for row in store)


def test_a_target_is_put_where_the_recipe_wants_it(whole_run: WholeRun) -> None:
    config = whole_run(
        "run",
        "regenerate collect",
        features=FeaturesFrom.online,
        online=OnlineSettings(device="cpu"),
    )
    workshop = Workshop(config)
    with training_rows(workshop) as open_split:
        assert workshop.target.device == torch.device("cpu")
        assert open_split("train")[0].features.device == torch.device("cpu")
    config.data.online = OnlineSettings(device="cuda:99")
    with (
        pytest.raises(ValueError, match=r"data\.online\.device \(=cuda:99\)"),
        training_rows(workshop),
    ):
        raise AssertionError("it was moved")


def test_a_vllm_that_stays_up_gives_training_its_features(
    whole_run: WholeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "vllm").mkdir()
    python = python_with_stand_in(folder, monkeypatch)
    config = whole_run(
        "run", features=FeaturesFrom.online, collect_engine=CollectEngine.vllm,
        vllm_python=str(python),
    )  # fmt: skip
    assert len(losses(tmp_path, "run")) == 2
    workshop = Workshop(config)
    with training_rows(workshop) as open_split:
        rows = open_split("train")
        for row in rows.read(range(len(rows))):
            want = stand_in_features(row.input_ids.tolist(), workshop.target.target_layer_ids)
            assert torch.allclose(row.features, want)
    assert not (config.run_dir / "stream").exists()
