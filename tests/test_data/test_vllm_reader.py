"""`collect` with `data.collect_engine=vllm`: the stage around a stand-in for vLLM.

The real one is compared with the target in tests/end_to_end/test_vllm_features.py.
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec import structs

from dflash_data.collect.estimate import plan_collection
from dflash_data.collect.stage import collect
from dflash_data.regenerate.stage import regenerate
from dflash_train.cli import main
from dflash_train.config import (
    CollectEngine,
    DataConfig,
    FeaturesDtype,
    RecipeConfig,
    UnavailableError,
    VllmSettings,
    compose,
)
from dflash_train.features.store import FeatureStore
from dflash_train.features.target import Target
from dflash_train.features.target_text import TargetText, load_target_text
from dflash_train.records.conversation import read_split
from dflash_train.records.manifest import Manifest, file_hash
from dflash_train.stages.inputs import reading_inputs, target_input
from dflash_train.stages.workshop import Workshop
from dflash_train.testing import MASK_TOKEN_ID, ask, save_tiny_target, write_conversations
from tests.test_data.vllm_stand_in import python_with_stand_in, stand_in_features

TAPS = [1, 3]


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder := tmp_path / "vllm").mkdir()
    return python_with_stand_in(folder, monkeypatch)


@pytest.fixture
def run(config: RecipeConfig, target: Target, tmp_path: Path, python: Path) -> RecipeConfig:
    """A run whose logged answers fill several small shards, and whose engine is vLLM."""
    config.target.name_or_path = str(save_tiny_target(tmp_path / "target"))
    asked = [ask(f"{n}0", f"question {n}" * (place + 1)) for place, n in enumerate("abcdef")]
    write_conversations(config, [*asked, ask("g0", "held out", split="test")])
    regenerate(config, target=target, manifest=Manifest(stage="regenerate", recipe_hash="r"))
    copies = [
        structs.replace(record, id=f"{record.id}-{n}", session=None)
        for n in range(3)
        for split in ("train", "test")
        for record in read_split(config.run_dir / "regenerated", split)
    ]
    data = replace(config.data, shard_bytes=40_000, features_dtype=FeaturesDtype.float32)
    logged = replace(config, runs_dir=str(tmp_path / "logged"), data=data)
    write_conversations(logged, copies)
    return with_vllm(logged, python)


def with_vllm(config: RecipeConfig, python: Path) -> RecipeConfig:
    data = replace(config.data, collect_engine=CollectEngine.vllm, vllm_python=str(python))
    return replace(config, data=data)


def in_process(config: RecipeConfig, folder: Path) -> RecipeConfig:
    """The same run in another folder, with the target in this process."""
    data = replace(config.data, collect_engine=CollectEngine.transformers)
    other = replace(config, runs_dir=str(folder), data=data)
    shutil.copytree(config.run_dir / "conversations", other.run_dir / "conversations")
    return other


def text_of(config: RecipeConfig) -> TargetText:
    return load_target_text(config.target, TAPS)


def run_collect(config: RecipeConfig, load_target: Any, **settings: Any) -> Manifest:
    manifest = Manifest(stage="collect", recipe_hash="c", target={"name": "tiny"})
    return collect(config, load_target=load_target, manifest=manifest, **settings)


def folder_of(config: RecipeConfig, split: str = "train") -> Path:
    return config.run_dir / "features" / split


def shards_of(config: RecipeConfig) -> list[Path]:
    return sorted((config.run_dir / "features").rglob("*.safetensors"))


def ran(python: Path) -> int:
    """Count the rows that vLLM has run."""
    log = python.with_name("run.txt")
    return len(log.read_text().split()) if log.exists() else 0


def rows_by_formula(config: RecipeConfig) -> Iterator[bool]:
    """Yield for each stored row whether its features are the stand-in's of its tokens."""
    for split in ("train", "test"):
        for row in FeatureStore.open(folder_of(config, split)):
            want = stand_in_features(row.input_ids.tolist(), TAPS)
            yield torch.allclose(row.features, want)


def test_vllm_fills_the_store_that_this_process_would(
    run: RecipeConfig, target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = run_collect(run, lambda: text_of(run))
    assert "collect: 100%" in capsys.readouterr().err
    assert list(rows_by_formula(run)) == [True] * 21
    other = in_process(run, tmp_path / "other")
    run_collect(other, lambda: target)
    assert len(shards_of(run)) > 3
    assert [path.name for path in shards_of(run)] == [path.name for path in shards_of(other)]
    for split in ("train", "test"):
        for name in ("index.arrow", "plan/rows.arrow", "plan/index.arrow", "plan/manifest.json"):
            assert file_hash(folder_of(run, split) / name) == file_hash(
                folder_of(other, split) / name
            )
        stores = [FeatureStore.open(folder_of(config, split)) for config in (run, other)]
        assert len(stores[0]) == len(stores[1])
        for one, two in ([store[place] for store in stores] for place in range(len(stores[0]))):
            assert one.id == two.id
            assert torch.equal(one.input_ids, two.input_ids)
            assert torch.equal(one.loss_mask, two.loss_mask)
            assert one.features.shape == two.features.shape
    assert manifest.details == {"teacher_top_k": 0, "engine": "vllm"}
    assert manifest.versions["vllm"] == "0.32.0"
    assert not (run.run_dir / "features" / "capture").exists()


def test_a_killed_vllm_is_explained_and_the_next_run_goes_on(
    run: RecipeConfig, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_DIES_AFTER", "11")
    with pytest.raises(UnavailableError, match=r"ended by SIGKILL before all") as stopped:
        run_collect(run, lambda: text_of(run))
    said = str(stopped.value)
    assert "engine: low on memory for [...]" in said
    assert "capture/vllm.log" in said
    finished = {path: path.stat().st_mtime_ns for path in shards_of(run)}
    assert finished
    assert ran(python) == 11
    monkeypatch.delenv("STAND_IN_DIES_AFTER")
    run_collect(run, lambda: text_of(run))
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert list(rows_by_formula(run)) == [True] * 21
    assert ran(python) < 11 + 21  # rows of the finished shards were not run again
    assert not (run.run_dir / "features" / "capture").exists()


def test_a_finished_shard_that_is_lost_is_read_again_and_no_other(
    run: RecipeConfig, python: Path
) -> None:
    run_collect(run, lambda: text_of(run))
    lost, *kept = shards_of(run)
    times = {path: path.stat().st_mtime_ns for path in kept}
    before, content = ran(python), file_hash(lost)
    lost.unlink()
    run_collect(run, lambda: text_of(run))
    assert file_hash(lost) == content
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    assert 0 < ran(python) - before < 21


def test_features_of_regenerate_are_linked_and_vllm_is_not_needed(
    config: RecipeConfig, target: Target, tmp_path: Path
) -> None:
    write_conversations(config, [ask(f"{name}0", f"question {name}") for name in "abc"])
    regenerate(config, target=target, manifest=Manifest(stage="regenerate", recipe_hash="r"))
    linked = with_vllm(config, tmp_path / "no-such-python")
    manifest = run_collect(linked, lambda: pytest.fail("nothing has to be read"))
    assert manifest.counts is not None
    assert manifest.counts.kept == 3
    assert "vllm" not in manifest.versions


def test_a_dry_run_counts_and_asks_for_the_release_only(run: RecipeConfig, python: Path) -> None:
    before = sorted(run.run_dir.rglob("*"))
    estimate = plan_collection(run, load_target=lambda: text_of(run))
    assert sorted(run.run_dir.rglob("*")) == before
    assert ran(python) == 0
    run_collect(run, lambda: text_of(run))
    stored = sum(path.stat().st_size for path in shards_of(run))
    on_their_way = estimate.num_tokens * 2 * 32 * 4
    assert 0 < stored + on_their_way - estimate.disk_bytes < 1024 * len(shards_of(run))
    assert [line.split(":")[0] for line in estimate.lines()] == [
        "calls", "tokens", "disk", "engine",
    ]  # fmt: skip
    assert estimate.lines()[-1] == "engine: vLLM 0.32.0, whose memory and time are not known"


def test_several_processes_are_refused(run: RecipeConfig) -> None:
    launch: Any = SimpleNamespace(process_index=0, num_processes=2, wait_for_everyone=lambda: None)
    with pytest.raises(ValueError, match=r"data\.collect_engine \(=vllm\) .* 2 were launched"):
        run_collect(run, lambda: text_of(run), accelerator=launch)


def test_a_disk_without_room_for_files_on_their_way_is_refused(
    run: RecipeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate = plan_collection(run, load_target=lambda: text_of(run))
    usage = shutil.disk_usage(run.run_dir)._replace(free=estimate.disk_bytes - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: usage)
    with pytest.raises(UnavailableError, match=f"take {estimate.disk_bytes} bytes"):
        run_collect(run, lambda: text_of(run))


@pytest.mark.parametrize(
    ("content", "mode", "error", "message"),
    [
        ("", 0o644, ValueError, "is not an interpreter"),
        ("#!/bin/sh\nexit 0\n", 0o755, UnavailableError, "does not serve: It printed nothing"),
        ("#!/bin/sh\necho no torch; exit 3\n", 0o755, UnavailableError, "\n  no torch"),
        ("no program", 0o755, UnavailableError, "does not serve: .*Exec format error"),
    ],
)
def test_a_python_that_cannot_do_it_is_named_before_anything_is_planned(
    run: RecipeConfig, tmp_path: Path, content: str, mode: int, error: type[Exception], message: str
) -> None:
    path = tmp_path / "other-python"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(error, match=rf"data\.vllm_python \(={path}\) .*{message}"):
        run_collect(with_vllm(run, path), lambda: text_of(run))
    assert not list(run.run_dir.rglob("rows.arrow"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"needs data\.vllm_python"),
        ({"vllm_python": "p", "teacher_top_k": 4}, r"data\.teacher_top_k \(=4\).*or .* to 0"),
    ],
)
def test_settings_that_vllm_cannot_honour_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(collect_engine=CollectEngine.vllm, **settings)


@pytest.mark.parametrize(
    "setting", [{"gpu_memory_utilization": 1.5}, {"max_num_seqs": 0}, {"tensor_parallel_size": -1}]
)
def test_a_setting_of_vllm_out_of_range_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"data\.vllm_settings\.{next(iter(setting))} \(="):
        VllmSettings(**setting)


def recipe_of(run: RecipeConfig, python: Path) -> list[str]:
    return [
        f"runs_dir={run.runs_dir}", "name=run", "drafter.num_taps=2", "drafter.block_size=4",
        f"target.name_or_path={run.target.name_or_path}", f"data.vllm_python={python}",
        f"drafter.mask_token_id={MASK_TOKEN_ID}", "data.collect_engine=vllm",
        "data.vllm_settings.max_num_seqs=4",
    ]  # fmt: skip


def test_the_command_collects_through_vllm(
    run: RecipeConfig, python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("conversations", "regenerated"):
        Manifest(stage=name, recipe_hash="r", target={"name": "tiny"}).write(run.run_dir / name)
    assert main(["collect", *recipe_of(run, python)]) == 0
    assert capsys.readouterr().out.strip() == str(run.run_dir / "features")
    manifest = Manifest.read(run.run_dir / "features")
    assert manifest is not None
    assert python.with_name("settings.txt").read_text() == "['max_num_seqs=4']"
    assert (manifest.inputs["engine"], manifest.versions["vllm"]) == ("vllm", "0.32.0")
    assert ran(python) == 21
    assert main(["collect", *recipe_of(run, python)]) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_the_engine_is_an_input_only_where_it_is_not_this_process(
    run: RecipeConfig, python: Path
) -> None:
    config = compose(recipe_of(run, python))
    workshop = Workshop(config)
    assert reading_inputs(workshop) == target_input(workshop) | {"engine": "vllm"}
    config.data.collect_engine = CollectEngine.transformers
    assert reading_inputs(workshop) == target_input(workshop)


def test_weights_that_are_loaded_make_room_for_vllm(run: RecipeConfig, python: Path) -> None:
    workshop = Workshop(compose(recipe_of(run, python)))
    assert isinstance(workshop.target, Target)
    text = workshop.target_to_read()
    assert isinstance(text, TargetText)
    assert "target" not in vars(workshop)
    assert text.target_layer_ids == workshop.target.target_layer_ids
