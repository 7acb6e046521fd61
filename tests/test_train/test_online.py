"""Features computed online against the same features read from a store."""

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from msgspec import structs
from safetensors import safe_open
from torch import nn

from dflash_data.collect.stage import collect
from dflash_train.config import (
    CollectEngine,
    DataConfig,
    DrafterSettings,
    EvaluateConfig,
    FeaturesDtype,
    FeaturesFrom,
    LaunchConfig,
    OnlineSettings,
    Precision,
    RecipeConfig,
    TargetConfig,
    TrainingConfig,
)
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.model import Drafter
from dflash_train.features.online_passes import PADDED, plan_passes
from dflash_train.features.online_rows import OnlineRows, Reading, SharedReader
from dflash_train.features.store import (
    FeatureRow,
    FeatureStore,
    IndexLine,
    read_index,
    write_index,
    write_shard,
)
from dflash_train.features.target import ReadAnswer, Target
from dflash_train.records.conversation import Conversation
from dflash_train.records.manifest import FileEntry, Manifest
from dflash_train.stages.online import training_rows
from dflash_train.stages.walk import run_stage
from dflash_train.stages.workshop import Workshop
from dflash_train.testing import (
    MASK_TOKEN_ID,
    ask,
    assert_close,
    save_tiny_target,
    tiny_drafter,
    write_conversations,
)
from dflash_train.training.accelerator import build_accelerator
from dflash_train.training.batching import BatchSource, BlockSettings, Pack, TrainingBatch
from dflash_train.training.online import ReadAhead, open_batches
from dflash_train.training.stage import train
from dflash_train.training.trainer import StepResult, Trainer
from tests.test_data.vllm_stand_in import python_with_stand_in, stand_in_features
from tests.test_train.token_splits import write_tokens

ROOT = Path(__file__).resolve().parents[2]
READING = Reading(dtype=torch.float32, num_taps=2, teacher_top_k=0, batch_size=8)
BLOCKS = BlockSettings(block_size=4, num_anchors=4, seed=0)
CPU = torch.device("cpu")


class CountingReader:
    """A target that counts the rows of each pass."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.passes: list[int] = []

    def read_answers(self, rows: list[list[int]], **settings: Any) -> list[ReadAnswer]:
        self.passes.append(len(rows))
        return self.target.read_answers(rows, **settings)


@pytest.fixture
def splits(
    tmp_path: Path, target32: Target, answer_rows, write_split
) -> dict[str, tuple[FeatureStore, FeatureStore]]:
    """Give each split as a store and as token ids alone."""
    found = {}
    for seed, (name, lengths) in enumerate(
        {"train": [5, 9, 7, 12, 6, 8, 30, 11, 4], "validation": [6, 10, 5]}.items()
    ):
        rows = answer_rows(target32, lengths, seed=seed)
        stored = write_split(tmp_path / "features" / name, rows)
        found[name] = (stored, write_tokens(tmp_path / "tokens" / name, rows))
    return found


@pytest.fixture
def start(tmp_path: Path, target32: Target, splits, tiny_recipe) -> Callable[..., list[Any]]:
    """Give a function that starts or resumes a named run, and gives its lines of metrics."""

    def run(name: str, *, prefetch: int | None = None, **training: Any) -> list[Any]:
        """Train from the store, or online with so many micro-batches made ahead."""
        config: RecipeConfig = tiny_recipe(tmp_path, name=name, log_every=1, **training)
        with SharedReader(target32) as reader:
            if prefetch is not None:
                online = OnlineSettings(prefetch=prefetch)
                data = replace(config.data, features=FeaturesFrom.online, online=online)
                config = replace(config, data=data)

            def open_rows(split: str) -> Any:
                stored, tokens = splits[split]
                return stored if prefetch is None else OnlineRows(tokens, reader, reading=READING)

            train(
                config,
                accelerator=build_accelerator(config.launch),
                head=target32.head,
                drafter=tiny_drafter(target32),
                manifest=Manifest(stage="train", recipe_hash="sha256:0"),
                open_rows=open_rows,
            )
        return metrics(config.run_dir)

    return run


def metrics(run_dir: Path) -> list[Any]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(lines: list[Any]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def best_bytes(run_dir: Path) -> bytes:
    return (run_dir / "checkpoint" / "last" / "model.safetensors").read_bytes()


def test_packs_and_anchors_are_those_of_the_store(splits, target32: Target) -> None:
    stored, tokens = splits["train"]
    sources = [
        BatchSource(rows, BLOCKS, pack_tokens=64)
        for rows in (stored, OnlineRows(tokens, target32, reading=READING))
    ]
    streams = [source.stream(epoch=0, position=0) for source in sources]
    for packs in islice(zip(*streams, strict=True), 12):
        assert packs[0] == packs[1]
        want, got = (source.load(pack) for source, pack in zip(sources, packs, strict=True))
        assert_same_blocks(got, want)
        assert_close("features", got.target_features, want.target_features, 1e-5)


def assert_same_blocks(got: TrainingBatch, want: TrainingBatch) -> None:
    for name in ("anchor_ids", "labels", "label_mask", "num_tokens"):
        assert torch.equal(*(torch.as_tensor(getattr(each, name)) for each in (got, want))), name
    assert torch.equal(got.blocks.anchor_positions, want.blocks.anchor_positions)
    assert got.blocks.context_offsets == want.blocks.context_offsets
    assert got.blocks.block_offsets == want.blocks.block_offsets


@pytest.mark.parametrize("prefetch", [0, 3])
def test_every_step_of_an_online_run_has_the_loss_of_the_store(start, prefetch: int) -> None:
    stored = start("stored", max_steps=20)
    online = start("online", max_steps=20, prefetch=prefetch)
    assert len(losses(stored)) == 20
    assert losses(online) == pytest.approx(losses(stored), rel=1e-6)
    lengths = [
        [line["validation"]["acceptance_length"] for line in lines if "validation" in line]
        for lines in (stored, online)
    ]
    assert lengths[0] == lengths[1]


def test_a_resumed_online_run_ends_with_the_bytes_of_an_undisturbed_one(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = start("whole", max_steps=12, prefetch=0)
    calls = 0
    step = Trainer.train_step

    def dying_step(self: Trainer, window: list[Pack]) -> StepResult:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise RuntimeError("power cut")
        return step(self, window)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", dying_step)
        with pytest.raises(RuntimeError, match="power cut"):
            start("cut", max_steps=12, prefetch=2)
    cut = start("cut", max_steps=12, prefetch=2)
    assert losses(cut) == losses(whole)
    assert best_bytes(tmp_path / "cut") == best_bytes(tmp_path / "whole")


PROGRAM = """
import sys
from pathlib import Path
import torch
from dflash_train.config import *
from dflash_train.features.online_rows import OnlineRows, Reading
from dflash_train.features.store import FeatureStore
from dflash_train.testing import tiny_drafter, tiny_target
from dflash_train.training.accelerator import build_accelerator
from dflash_train.training.trainer import Trainer

folder = Path(sys.argv[1])
target = tiny_target(dtype=torch.float32)
stored = FeatureStore.open(folder / "features" / "train")
tokens = FeatureStore.open(folder / "tokens" / "train", needs_features=False)
reading = Reading(dtype=torch.float32, num_taps=2, teacher_top_k=0, batch_size=8)
for name, rows in {"stored": stored, "online": OnlineRows(tokens, target, reading=reading)}.items():
    config = RecipeConfig(
        name=name, runs_dir=str(folder), target=TargetConfig(name_or_path="tiny"),
        drafter=DrafterSettings(mask_token_id=3),
        data=DataConfig(features=FeaturesFrom[name], online=OnlineSettings(prefetch=0)),
        training=TrainingConfig(max_steps=20, num_anchors=4, pack_tokens=40, validate_every=20,
                                save_every=20, log_every=1),
        launch=LaunchConfig(num_threads=1),
    )
    accelerator = build_accelerator(config.launch)
    assert accelerator.num_processes == 2
    trainer = Trainer(
        config, accelerator=accelerator, drafter=tiny_drafter(target), head=target.head,
        train=rows, validation=stored, run_dir=config.run_dir,
    )
    trainer.fit()
    accelerator.free_memory()
accelerator.end_training()
"""


def test_two_ranks_online_have_the_losses_of_two_ranks_on_the_store(splits, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [sys.executable, *command, str(tmp_path / "program.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    stored, online = (losses(metrics(tmp_path / name)) for name in ("stored", "online"))
    assert len(stored) == 20
    assert online == pytest.approx(stored, rel=1e-6)


def test_rows_of_one_length_have_the_bits_of_the_pass_that_stored_them(
    tmp_path: Path, target32: Target, answer_rows
) -> None:
    rows = [row for row in answer_rows(target32, [9] * 6) if len(row.input_ids) == 25]
    assert len(rows) > 2
    tokens = write_tokens(tmp_path / "rows", rows)
    want = target32.features_of([row.input_ids.tolist() for row in rows])
    online = OnlineRows(tokens, target32, reading=READING)
    for row, features in zip(online.read(range(len(rows))), want, strict=True):
        assert torch.equal(row.features, features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_features_are_rounded_as_the_store_rounds_them(
    tmp_path: Path, target32: Target, answer_rows, dtype: torch.dtype
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
    tmp_path: Path, target32: Target, tiny_recipe
) -> None:
    stored: RecipeConfig = tiny_recipe(tmp_path, name="stored")
    stored.data = DataConfig(
        features_dtype=FeaturesDtype.float32, teacher_top_k=3, max_prompt_tokens=400
    )
    online: RecipeConfig = tiny_recipe(tmp_path, name="online")
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
        reading = Reading.of(online.data, num_taps=2)
        rows = OnlineRows(tokens, target32, reading=reading)
        for position, row in enumerate(rows.read(range(len(rows)))):
            twin = store[position]
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


def shard_tensors(folder: Path) -> set[str]:
    """Name the tensors of all shards below a folder."""
    names: set[str] = set()
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            names |= set(shard.keys())
    return names


def test_calls_of_one_row_share_its_pass(tmp_path: Path, target32: Target, tiny_recipe) -> None:
    config: RecipeConfig = tiny_recipe(tmp_path)
    config.data = DataConfig(features=FeaturesFrom.online, max_prompt_tokens=400)
    collected(config, target32)
    folder = config.run_dir / "features" / "train"
    reader = CountingReader(target32)
    tokens = FeatureStore.open(folder, needs_features=False)
    rows = OnlineRows(tokens, reader, reading=READING)
    assert len(rows.read(range(len(rows)))) == 18
    assert sum(reader.passes) == 6


def line(row: int, num_tokens: int) -> IndexLine:
    return IndexLine(
        id=f"{row}-{num_tokens}", tenant=None, session=None, shard="a", row=row,
        num_tokens=num_tokens, prompt_length=1, max_length=99, finish_reason="stop", weight=1,
    )  # fmt: skip


def test_passes_hold_each_call_once_and_pad_little() -> None:
    lines = [line(number, 10 + 7 * (number * 5 % 13)) for number in range(13)]
    lines += [line(3, 4), line(3, 6)]
    passes = plan_passes(lines, range(15), batch_size=6)
    assert sorted(call for each in passes for row in each for call in row) == list(range(15))
    assert next(row for each in passes for row in each if 3 in row) == (3, 14, 13)
    for each in passes:
        lengths = [lines[row[0]].num_tokens for row in each]
        assert len(lengths) <= 6
        assert max(lengths) * len(lengths) <= PADDED * sum(lengths)
    assert len(passes) < 6
    assert plan_passes(lines, [*range(14, -1, -1), 2], batch_size=6) == passes


@pytest.mark.parametrize("kept_bytes", [0, 30_000, 10**9])
def test_kept_rows_are_read_once_and_others_again_to_the_same_bits(
    splits, target32: Target, kept_bytes: int
) -> None:
    reader = CountingReader(target32)
    rows = OnlineRows(splits["train"][1], reader, reading=READING, kept_bytes=kept_bytes)
    first = rows.read(range(len(rows)))
    num_passes = len(reader.passes)
    assert num_passes > 1
    for row, twin in zip(rows.read(range(len(rows))), first, strict=True):
        assert torch.equal(row.features, twin.features)
    again = len(reader.passes) - num_passes
    assert (again == 0) == (kept_bytes == 10**9)
    assert (again == num_passes) == (kept_bytes == 0)


def test_threads_read_in_turn_and_nothing_is_read_after_the_end(splits, target32: Target) -> None:
    tokens = splits["train"][1]
    want = [row.features for row in OnlineRows(tokens, target32, reading=READING).read(range(9))]
    results: list[bool] = []
    with SharedReader(target32) as reader:
        rows = OnlineRows(tokens, reader, reading=READING)

        def read() -> None:
            for _ in range(10):
                got = [row.features for row in rows.read(range(9))]
                results.append(all(map(torch.equal, got, want)))

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [True] * 40
    with pytest.raises(RuntimeError, match="training has ended"):
        rows.read([0])


class SlowSource(BatchSource):
    """A source that remembers which packs it made."""

    made: list[Pack]

    def load(self, pack: Pack) -> TrainingBatch:
        self.made.append(pack)
        return super().load(pack)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_bounded_number_of_batches_is_made_ahead_for_this_rank(splits, num_ranks: int) -> None:
    source = SlowSource(splits["train"][0], BLOCKS, pack_tokens=64)
    source.made = []
    ahead = ReadAhead(source, depth=2, num_ranks=num_ranks, device=CPU)
    own = list(islice(ahead.stream(epoch=0, position=1), 0, 9 * num_ranks, num_ranks))
    plain = BatchSource(splits["train"][0], BLOCKS, pack_tokens=64)
    for number, pack in enumerate(own[:6], start=1):
        assert_same_blocks(ahead.load(pack), plain.load(pack))
        assert len(source.made) <= number + 2
    ahead.load(own[0])  # another place in the stream, as a second trainer would ask for
    assert ahead.load(own[1]).num_tokens == plain.load(own[1]).num_tokens
    assert source.made[:6] == own[:6]


def test_an_error_in_the_thread_comes_up_in_the_step(splits, target32: Target, tiny_recipe) -> None:
    class Broken:
        def read_answers(self, *_: Any, **__: Any) -> list[ReadAnswer]:
            raise ValueError("the target is gone")

    rows = OnlineRows(splits["train"][1], Broken(), reading=READING)
    config: RecipeConfig = tiny_recipe(Path("unused"))
    online = OnlineSettings(prefetch=2)
    config.data = replace(config.data, features=FeaturesFrom.online, online=online)
    batches = open_batches(rows, BLOCKS, config=config, num_ranks=1, device=CPU)
    assert isinstance(batches, ReadAhead)
    with pytest.raises(ValueError, match="the target is gone"):
        batches.load(next(batches.stream(epoch=0, position=0)))


def test_a_cpu_prefetches_only_where_products_are_float32(splits, tiny_recipe) -> None:
    config: RecipeConfig = tiny_recipe(Path("unused"))
    config.launch.mixed_precision = Precision.bf16
    open_them = partial(
        open_batches, splits["train"][0], BLOCKS, config=config, num_ranks=1, device=CPU
    )
    assert isinstance(open_them(), BatchSource)
    config.data = replace(config.data, features=FeaturesFrom.online)
    assert isinstance(open_them(), BatchSource), "on a CPU nothing is made ahead unless asked for"
    config.data.online = OnlineSettings(prefetch=2)
    with pytest.raises(ValueError, match=r"data\.online\.prefetch \(=2\)"):
        open_them()


@pytest.fixture
def whole_run(tmp_path: Path) -> Callable[..., RecipeConfig]:
    """Give a function that takes open conversations through the stages up to `evaluate`."""
    target = save_tiny_target(tmp_path / "target")

    def run(
        name: str, stages: str = "regenerate collect train", *, steps: int = 2, **data: Any
    ) -> RecipeConfig:
        config = RecipeConfig(
            name=name,
            runs_dir=str(tmp_path),
            target=TargetConfig(name_or_path=str(target)),
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
        folder = config.run_dir / "conversations"
        if not folder.exists():
            write_conversations(config, open_conversations())
            outputs = [FileEntry.of(path, folder) for path in sorted(folder.glob("*.gz"))]
            Manifest(stage="ingest", recipe_hash="sha256:0", outputs=outputs).write(folder)
        workshop = Workshop(config)
        for stage in stages.split():
            run_stage(workshop, stage)
        return config

    return run


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


def key_of(config: RecipeConfig, stage_folder: str) -> str:
    manifest = Manifest.read(config.run_dir / stage_folder)
    assert manifest is not None
    return manifest.key


def test_a_run_without_a_store_learns_what_a_run_with_one_learns(whole_run) -> None:
    stages = "regenerate collect train evaluate"
    stored = whole_run("stored", stages, steps=8)
    online = whole_run("online", stages, steps=8, features=FeaturesFrom.online)
    for folder in ("regenerated", "features"):
        assert "features" in shard_tensors(stored.run_dir / folder)
        assert "features" not in shard_tensors(online.run_dir / folder)
        manifests = [Manifest.read(config.run_dir / folder) for config in (stored, online)]
        assert manifests[0] is not None
        assert manifests[1] is not None
        assert manifests[0].counts == manifests[1].counts
    lines = [read_index(config.run_dir / "features" / "train") for config in (stored, online)]
    assert [each.id for each in lines[0]] == [each.id for each in lines[1]]
    want, got = (losses(metrics(config.run_dir)) for config in (stored, online))
    assert len(want) == 8
    assert got == pytest.approx(want, rel=1e-6)
    traces = [config.run_dir / "traces" / "replay-test.jsonl" for config in (stored, online)]
    assert traces[0].read_bytes() == traces[1].read_bytes()


def test_what_decides_rows_decides_the_key_of_train_and_prefetching_does_not(whole_run) -> None:
    plain = whole_run("plain", features=FeaturesFrom.online)
    key = key_of(plain, "checkpoint")
    whole_run("plain", features=FeaturesFrom.online, online=OnlineSettings(prefetch=1))
    assert key_of(plain, "checkpoint") == key
    whole_run("plain", features=FeaturesFrom.online, teacher_top_k=2)
    with_teacher = key_of(plain, "checkpoint")
    assert with_teacher != key
    whole_run("plain", teacher_top_k=2)
    assert key_of(plain, "checkpoint") not in (key, with_teacher)


def test_answers_that_came_without_features_can_be_stored_later(whole_run) -> None:
    online = whole_run("run", "regenerate collect", features=FeaturesFrom.online)
    want = {each.id for each in read_index(online.run_dir / "features" / "train")}
    stored = whole_run("run", "regenerate collect")
    store = FeatureStore.open(stored.run_dir / "features" / "train")
    assert {row.id for row in store} == want
    assert all(row.features.any() for row in store)


def test_a_target_is_put_where_the_recipe_wants_it(whole_run) -> None:
    config = whole_run(
        "run",
        "regenerate collect",
        features=FeaturesFrom.online,
        online=OnlineSettings(device="cpu"),
    )
    workshop = Workshop(config)
    with training_rows(workshop) as open_split:
        assert workshop.target.device == CPU
        assert open_split("train")[0].features.device == CPU
    config.data.online = OnlineSettings(device="cuda:99")
    with (
        pytest.raises(ValueError, match=r"data\.online\.device \(=cuda:99\)"),
        training_rows(workshop),
    ):
        raise AssertionError("it was moved")


def test_a_vllm_that_stays_up_gives_training_its_features(
    whole_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "vllm").mkdir()
    python = python_with_stand_in(folder, monkeypatch)
    config = whole_run(
        "run", features=FeaturesFrom.online, collect_engine=CollectEngine.vllm,
        vllm_python=str(python),
    )  # fmt: skip
    assert len(losses(metrics(config.run_dir))) == 2
    workshop = Workshop(config)
    with training_rows(workshop) as open_split:
        rows = open_split("train")
        for row in rows.read(range(len(rows))):
            want = stand_in_features(row.input_ids.tolist(), workshop.target.target_layer_ids)
            assert torch.allclose(row.features, want)
    assert not (config.run_dir / "stream").exists()


def alive_bytes() -> int:
    """Sum the bytes of all tensors that Python still holds."""
    gc.collect()
    return sum(each.nbytes for each in gc.get_objects() if type(each) is torch.Tensor)


def test_epochs_leave_nothing_behind(splits, target32: Target) -> None:
    rows = OnlineRows(splits["train"][1], target32, reading=READING)
    ahead = ReadAhead(BatchSource(rows, BLOCKS, pack_tokens=64), depth=2, num_ranks=1, device=CPU)
    stream = ahead.stream(epoch=0, position=0)
    held: list[int] = []
    for epoch in range(6):
        while (pack := next(stream)).epoch == epoch:
            ahead.load(pack)
        held.append(alive_bytes())
    largest = max(ahead.load(next(stream)).target_features.nbytes for _ in range(4))
    # What is read ahead, computed and in use differs by up to four packs, ids and masks beside.
    assert max(held[2:]) - min(held[2:]) <= 6 * largest, held


@pytest.mark.slow
@pytest.mark.parametrize("is_online", [False, True])
def test_ten_epochs_over_1280_rows_hold_no_more_memory_than_two(
    tmp_path: Path, target32: Target, answer_rows, write_split, tiny_recipe, is_online: bool
) -> None:
    lengths = [8 + number % 40 for number in range(1280)]
    parts = [answer_rows(target32, lengths[n : n + 128], seed=n) for n in range(0, 1280, 128)]
    rows = [row for part in parts for row in part]
    store = write_split(tmp_path / "stored", rows)
    tokens = write_tokens(tmp_path / "tokens", rows)
    config: RecipeConfig = tiny_recipe(tmp_path, max_steps=10_000, pack_tokens=1024)
    one_layer = replace(config.drafter, num_hidden_layers=1)
    shape = DrafterConfig.for_target(one_layer, target32.model.config)
    config.data = replace(config.data, online=OnlineSettings(prefetch=2))
    if is_online:
        config.data = replace(config.data, features=FeaturesFrom.online)
    trainer = Trainer(
        config,
        accelerator=build_accelerator(config.launch),
        drafter=Drafter(shape),
        head=target32.head,
        train=OnlineRows(tokens, target32, reading=READING) if is_online else store,
        validation=store,
        run_dir=config.run_dir,
    )
    stream = trainer.source.stream(epoch=0, position=0)
    resident: list[float] = []
    for epoch in range(10):
        while (window := trainer.next_window(stream))[-1].epoch == epoch:
            trainer.train_step(window)
        gc.collect()
        resident.append(psutil.Process().memory_info().rss / 2**20)
    slope, error = fitted_slope(resident[2:])
    print(f"resident MiB by epoch: {resident}; slope {slope:.3f} +- {error:.3f} MiB an epoch")
    features = sum(row.features.nbytes for row in rows) / 2**20
    assert abs(slope) <= max(3 * error, 0.005 * features)


def fitted_slope(values: list[float]) -> tuple[float, float]:
    """Give slope and standard error of a straight line through evenly spaced values."""
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.arange(len(values), dtype=torch.float64)
    x = x - x.mean()
    slope = (x * (y - y.mean())).sum() / (x * x).sum()
    rest = y - y.mean() - slope * x
    error = ((rest * rest).sum() / (len(values) - 2) / (x * x).sum()).sqrt()
    return float(slope), float(error)


@pytest.mark.gpu
def test_a_stream_of_its_own_gives_the_batches_of_none(splits, target32: Target) -> None:
    device = torch.device("cuda", 0)
    nn.Module.to(target32.model, device)
    target = Target(
        target32.model, target32.tokenizer, target32.target_layer_ids,
        name="tiny", revision="gpu",
    )  # fmt: skip
    try:
        rows = OnlineRows(splits["train"][1], target, reading=READING, device=device)
        source = BatchSource(rows, BLOCKS, pack_tokens=64)
        ahead = ReadAhead(source, depth=2, num_ranks=1, device=device)
        packs = list(islice(source.stream(epoch=0, position=0), 30))
        want = [source.load(pack) for pack in packs]
        busy = torch.zeros(2000, 2000, device=device)
        for pack, batch in zip(packs, want, strict=True):
            got = ahead.load(pack)
            busy = busy @ busy  # the drafter's own stream has work
            assert torch.equal(got.target_features, batch.target_features)
    finally:
        nn.Module.to(target32.model, CPU)
