import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dflash_train.features.shard import bytes_per_token
from dflash_train.features.store import (
    FeatureRow,
    FeatureStore,
    IndexLine,
    write_index,
    write_shard,
)
from dflash_train.features.target import Target
from dflash_train.features.teacher import top_tokens
from dflash_train.records.manifest import FileEntry, Manifest
from dflash_train.testing import assert_close


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


DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def write_lines(folder: Path, lines: list[IndexLine]) -> FeatureStore:
    """Complete a split whose shards are there and open it."""
    write_index(folder, lines)
    outputs = [FileEntry.of(path, folder) for path in sorted(folder.iterdir())]
    Manifest(stage="collect", recipe_hash="sha256:0", outputs=outputs).write(folder)
    return FeatureStore.open(folder)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_costs_what_bytes_per_token_says(
    rows, target32: Target, tmp_path: Path, dtype: torch.dtype
):
    kept = with_teacher(rows, top_k=3)
    path = tmp_path / "shard.safetensors"
    write_shard(path, kept, dtype=dtype, num_taps=2)
    token_bytes = bytes_per_token(target32.features_width, dtype=dtype, num_taps=2, teacher_top_k=3)
    num_tokens = sum(len(row.input_ids) for row in rows)
    offsets = 8 * (len(rows) + 1)
    header = path.stat().st_size - num_tokens * token_bytes - offsets
    assert 0 < header < 1024


def test_features_in_8_bits_come_back_in_bfloat16_near_what_they_were(rows, tmp_path: Path):
    lines = write_shard(tmp_path / "0.safetensors", rows, dtype=torch.float8_e4m3fn, num_taps=2)
    store = write_lines(tmp_path, lines)
    for position, row in enumerate(rows):
        read = store[position]
        assert read.features.dtype is torch.bfloat16
        assert_close("features", read.features, row.features, 2**-5)
        assert not read.features[-1].any()
        assert torch.equal(read.input_ids, row.input_ids)


def test_a_call_reads_the_beginning_of_a_longer_row_as_a_row_of_its_own(
    target32: Target, tmp_path: Path
):
    ids = [*range(10, 35)]
    calls = [(4, 9), (12, 16), (20, 25)]  # prompt and all tokens of each call
    (whole,) = target32.read_answers([ids], prompt_lengths=[4], teacher_top_k=3)
    stored = FeatureRow(
        id="c", tenant=None, session="s", input_ids=torch.tensor(ids),
        loss_mask=torch.tensor([any(p <= t < n for p, n in calls) for t in range(len(ids))]),
        features=whole.features, teacher=whole.teacher, max_length=99, finish_reason="stop",
    )  # fmt: skip
    (line,) = write_shard(tmp_path / "0.safetensors", [stored], dtype=torch.float32)
    lines = [replace(line, id=str(p), prompt_length=p, num_tokens=n) for p, n in calls]
    store = write_lines(tmp_path, lines)
    for position in (0, 1, 2, 0):  # twice: reading one leaves the others as they are
        prompt_length, num_tokens = calls[position]
        row = store[position]
        (alone,) = target32.read_answers(
            [ids[:num_tokens]], prompt_lengths=[prompt_length], teacher_top_k=3
        )
        assert row.input_ids.tolist() == ids[:num_tokens]
        written = [prompt_length <= t for t in range(num_tokens)]
        assert row.loss_mask.tolist() == store.read_tokens(position)[1].tolist() == written
        assert row.prompt_length == prompt_length
        assert_close("features", row.features, alone.features, 1e-5)
        assert not row.features[-1].any()
        assert row.teacher is not None
        assert alone.teacher is not None
        assert torch.equal(row.teacher.ids, alone.teacher.ids)
        assert_close("teacher", row.teacher.probabilities, alone.teacher.probabilities, 1e-5)


def test_two_hundred_flipped_bytes_are_all_found_and_named(rows, write_split, tmp_path: Path):
    folder = tmp_path / "train"
    write_split(folder, rows)
    files = sorted(folder.iterdir())
    chance = random.Random(0)
    for number in range(200):
        path = files[number % len(files)]
        sound = path.read_bytes()
        damaged = bytearray(sound)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=path.name):
            FeatureStore.open(folder)
        path.write_bytes(sound)
    assert len(FeatureStore.open(folder)) == len(rows)
