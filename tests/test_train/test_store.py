from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dflash_train.features.store import FeatureRow, FeatureStore, write_shard
from dflash_train.features.target import Target
from dflash_train.features.teacher import top_tokens
from dflash_train.records.manifest import Manifest


@pytest.fixture
def rows(target32: Target, answer_rows) -> list[FeatureRow]:
    return answer_rows(target32, [5, 11, 7], max_new_tokens=9)


def test_rows_come_back_in_order_and_in_the_stored_dtype(rows, write_split, tmp_path: Path):
    store = write_split(tmp_path / "train", rows, dtype=torch.bfloat16)
    assert len(store) == 3
    for position, row in enumerate(rows):
        read = store[position]
        assert torch.equal(read.input_ids, row.input_ids)
        assert torch.equal(read.loss_mask, row.loss_mask)
        assert read.features.dtype == torch.bfloat16
        assert torch.equal(read.features, row.features.bfloat16())
        for name in ("id", "tenant", "session", "max_length", "finish_reason", "weight"):
            assert getattr(read, name) == getattr(row, name)
        assert read.prompt_length == (5, 11, 7)[position]
        input_ids, loss_mask = store.read_tokens(position)
        assert torch.equal(input_ids, row.input_ids)
        assert torch.equal(loss_mask, row.loss_mask)
        line = store.lines[position]
        assert (line.num_tokens, line.prompt_length) == (len(row.input_ids), read.prompt_length)


def with_teacher(rows: list[FeatureRow], *, top_k: int) -> list[FeatureRow]:
    answers = [top_tokens(torch.randn(int(row.loss_mask.sum()), 40), top_k) for row in rows]
    return [
        replace(row, teacher=answer.over_the_row(row.prompt_length))
        for row, answer in zip(rows, answers, strict=True)
    ]


def test_the_teacher_comes_back_exactly_and_leaves_the_rest_as_it_is(
    rows, write_split, tmp_path: Path
):
    kept = with_teacher(rows, top_k=3)
    plain = write_split(tmp_path / "plain", rows)
    store = write_split(tmp_path / "kept", kept)
    for row, read, twin in zip(kept, store, plain, strict=True):
        assert row.teacher is not None
        assert read.teacher is not None
        assert (read.teacher.ids.dtype, read.teacher.ids.shape[1]) == (torch.int32, 3)
        assert torch.equal(read.teacher.ids, row.teacher.ids)
        assert torch.equal(read.teacher.probabilities, row.teacher.probabilities)
        assert twin.teacher is None
        for name in ("input_ids", "loss_mask", "features"):
            assert torch.equal(getattr(read, name), getattr(twin, name))


def test_a_shard_never_mixes_rows_with_and_without_a_teacher(rows, tmp_path: Path):
    mixed = [*with_teacher(rows[:1], top_k=2), rows[1]]
    with pytest.raises(AssertionError, match="some rows of a shard carry a teacher"):
        write_shard(tmp_path / "shard.safetensors", mixed, dtype=torch.float32)


def test_rows_of_two_writes_have_the_same_bytes(rows, write_split, tmp_path: Path):
    for name in ("one", "two"):
        write_split(tmp_path / name, rows)
    first, second = (Manifest.read(tmp_path / name) for name in ("one", "two"))
    assert first is not None
    assert first == second


@pytest.mark.parametrize("name", ["00001.safetensors", "index.arrow"])
def test_a_flipped_byte_is_found_and_its_file_named(rows, write_split, tmp_path: Path, name: str):
    folder = tmp_path / "train"
    write_split(folder, rows)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} does not match its checksum"):
        FeatureStore.open(folder)


def test_a_missing_shard_is_named_and_an_unfinished_split_refused(
    rows, write_split, tmp_path: Path
):
    folder = tmp_path / "train"
    write_split(folder, rows)
    (folder / "00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00000\.safetensors is missing"):
        FeatureStore.open(folder)
    with pytest.raises(ValueError, match=r"00000\.safetensors cannot be read"):
        FeatureStore.open(folder, verify=False)[0]
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no complete features"):
        FeatureStore.open(folder)
