"""Rows whose features the target reads, beside the same rows in a store."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from dflash_data.collect.stage import collect
from dflash_train.config import DataConfig, FeaturesDtype, FeaturesFrom, RecipeConfig
from dflash_train.features.online_rows import OnlineRows, Reading, SharedReader
from dflash_train.features.row_source import RowSource
from dflash_train.features.store import FeatureRow, FeatureStore, write_index, write_shard
from dflash_train.features.target import ReadAnswer, Target
from dflash_train.records.conversation import Conversation
from dflash_train.records.manifest import FileEntry, Manifest
from dflash_train.testing import ask, assert_close, write_conversations
from tests.test_train.conftest import AnswerRows, TinyRecipe
from tests.test_train.token_splits import write_tokens
from tests.test_train.twin_splits import READING, TwinSplit, shard_tensors


class CountingReader:
    """A target that counts the rows of each pass."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.passes: list[int] = []

    def read_answers(self, rows: list[list[int]], **settings: Any) -> list[ReadAnswer]:
        self.passes.append(len(rows))
        return self.target.read_answers(rows, **settings)


def every(rows: RowSource) -> list[FeatureRow]:
    return rows.read(range(len(rows)))


def test_rows_of_one_length_have_the_bits_of_the_pass_that_stored_them(
    tmp_path: Path, target32: Target, answer_rows: AnswerRows
) -> None:
    rows = [row for row in answer_rows(target32, [9] * 6) if len(row.input_ids) == 25]
    assert len(rows) > 2
    tokens = write_tokens(tmp_path / "rows", rows)
    want = target32.features_of([row.input_ids.tolist() for row in rows])
    online = OnlineRows(tokens, target32, reading=READING)
    for row, features in zip(every(online), want, strict=True):
        assert torch.equal(row.features, features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_features_are_rounded_as_the_store_rounds_them(
    tmp_path: Path, target32: Target, answer_rows: AnswerRows, dtype: torch.dtype
) -> None:
    (row,) = answer_rows(target32, [9])
    tokens = write_tokens(tmp_path / "tokens", [row])
    (features,) = target32.features_of([row.input_ids.tolist()])
    read = replace(row, features=features)
    folder = tmp_path / "features"
    write_index(folder, write_shard(folder / "a.safetensors", [read], dtype=dtype, num_taps=2))
    outputs = [FileEntry.of(path, folder) for path in sorted(folder.iterdir())]
    Manifest(stage="collect", recipe_hash="sha256:0", outputs=outputs).write(folder)
    got = OnlineRows(tokens, target32, reading=replace(READING, dtype=dtype))[0].features
    want = FeatureStore.open(folder)[0].features
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


def conversations() -> list[Conversation]:
    """Give logged sessions of three turns, whose calls share their history."""
    records = []
    for split, letters in {"train": "abcdef", "validation": "gh"}.items():
        for name in letters:
            texts = [f"ask {name}", f"{name} it is", f"and {name}?", "no", f"{name} now", "yes, so"]
            for turn in range(3):
                call = ask(f"{name}{turn}", *texts[: 2 * turn + 2], split=split)
                call = structs.replace(call, turn=turn, on_policy=True, finish_reason="stop")
                records.append(call)
    return [*records, structs.replace(ask("z", "too long " * 90, "no"), on_policy=True)]


def collected(config: RecipeConfig, target: Target) -> Manifest:
    write_conversations(config, conversations())
    manifest = Manifest(stage="collect", recipe_hash="sha256:0")
    return collect(config, load_target=lambda: target, manifest=manifest)


def test_collect_leaves_the_same_books_and_rows_without_features(
    tmp_path: Path, target32: Target, tiny_recipe: TinyRecipe
) -> None:
    stored = tiny_recipe(tmp_path, name="stored")
    stored.data = DataConfig(
        features_dtype=FeaturesDtype.float32, teacher_top_k=3, max_prompt_tokens=400
    )
    online = tiny_recipe(tmp_path, name="online")
    online.data = replace(stored.data, features=FeaturesFrom.online)
    want, got = collected(stored, target32), collected(online, target32)
    assert got.counts == want.counts
    assert want.counts is not None
    assert want.counts.dropped["too_long"] == 1
    for split in ("train", "validation"):
        store = FeatureStore.open(stored.run_dir / "features" / split)
        folder = online.run_dir / "features" / split
        assert shard_tensors(folder) == {"input_ids", "loss_mask", "offsets"}
        with pytest.raises(ValueError, match=r"without features.*data\.features"):
            FeatureStore.open(folder)
        tokens = FeatureStore.open(folder, needs_features=False)
        assert tokens.lines == store.lines
        rows = OnlineRows(tokens, target32, reading=Reading.of(online.data, num_taps=2))
        for row, twin in zip(every(rows), every(store), strict=True):
            assert_same_row(row, twin)


def assert_same_row(row: FeatureRow, twin: FeatureRow) -> None:
    for name in ("input_ids", "loss_mask"):
        assert torch.equal(getattr(row, name), getattr(twin, name))
    for name in ("id", "session", "tenant", "max_length", "finish_reason", "weight"):
        assert getattr(row, name) == getattr(twin, name)
    assert_close(row.id, row.features, twin.features, 1e-5)
    assert row.teacher is not None
    assert twin.teacher is not None
    assert torch.equal(row.teacher.ids, twin.teacher.ids)
    assert_close(row.id, row.teacher.probabilities, twin.teacher.probabilities, 1e-5)


def test_calls_of_one_row_share_its_pass(
    tmp_path: Path, target32: Target, tiny_recipe: TinyRecipe
) -> None:
    config = tiny_recipe(tmp_path)
    config.data = DataConfig(features=FeaturesFrom.online, max_prompt_tokens=400)
    collected(config, target32)
    tokens = FeatureStore.open(config.run_dir / "features" / "train", needs_features=False)
    reader = CountingReader(target32)
    assert len(every(OnlineRows(tokens, reader, reading=READING))) == 18
    assert sum(reader.passes) == 6


@pytest.mark.parametrize("kept_bytes", [0, 30_000, 10**9])
def test_kept_rows_are_read_once_and_others_again_to_the_same_bits(
    train_twins: TwinSplit, target32: Target, kept_bytes: int
) -> None:
    reader = CountingReader(target32)
    rows = train_twins.online(reader, kept_bytes=kept_bytes)
    first = every(rows)
    num_passes = len(reader.passes)
    assert num_passes > 1
    for row, twin in zip(every(rows), first, strict=True):
        assert torch.equal(row.features, twin.features)
    again = len(reader.passes) - num_passes
    assert (again == 0) == (kept_bytes == 10**9)
    assert (again == num_passes) == (kept_bytes == 0)


def test_threads_read_in_turn_and_nothing_is_read_after_the_end(
    train_twins: TwinSplit, target32: Target
) -> None:
    want = [row.features for row in every(train_twins.online(target32))]
    results: list[bool] = []
    with SharedReader(target32) as reader:
        rows = train_twins.online(reader)

        def read() -> None:
            for _ in range(10):
                got = [row.features for row in every(rows)]
                results.append(all(map(torch.equal, got, want)))

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [True] * 40
    with pytest.raises(RuntimeError, match="training has ended"):
        rows.read([0])
