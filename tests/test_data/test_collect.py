import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from dflash_data.collect.estimate import plan_collection
from dflash_data.collect.stage import collect
from dflash_data.drops import DropReason
from dflash_data.regenerate.stage import regenerate
from dflash_train.cli import main
from dflash_train.config import FeaturesDtype, RecipeConfig, UnavailableError
from dflash_train.features.shard import bytes_per_token
from dflash_train.features.store import FeatureRow, FeatureStore
from dflash_train.features.target import ReadAnswer, Target
from dflash_train.records.conversation import Conversation, read_split
from dflash_train.records.manifest import Manifest, file_hash
from dflash_train.testing import (
    MASK_TOKEN_ID,
    ask,
    assert_close,
    save_tiny_target,
    write_conversations,
)
from dflash_train.training.batching import BlockSettings, collate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes of a launch have
    yield
    torch.set_num_threads(before)


def never() -> Target:
    raise AssertionError("the target was loaded although nothing had to run through it")


def run_regenerate(config: RecipeConfig, target: Target) -> None:
    regenerate(config, target=target, manifest=Manifest(stage="regenerate", recipe_hash="r"))


def collected(config: RecipeConfig, split: str = "train") -> dict[str, FeatureRow]:
    return {row.id: row for row in FeatureStore.open(config.run_dir / "features" / split)}


def run_collect(config: RecipeConfig, load_target: Any) -> Manifest:
    manifest = Manifest(stage="collect", recipe_hash="c", target={"name": "tiny"})
    return collect(config, load_target=load_target, manifest=manifest)


def shards_of(config: RecipeConfig, split: str = "train") -> list[Path]:
    return sorted((config.run_dir / "features" / split).glob("*.safetensors"))


def same_bytes(one: RecipeConfig, other: RecipeConfig) -> bool:
    """Compare all files of two feature folders."""
    folders = [config.run_dir / "features" for config in (one, other)]
    files = [sorted(p.relative_to(f) for p in f.rglob("*.*") if p.is_file()) for f in folders]
    assert files[0]
    same = (file_hash(folders[0] / path) == file_hash(folders[1] / path) for path in files[0])
    return files[0] == files[1] and all(same)


class CountingTarget(Target):
    """A target that counts the rows it reads and may die on the way."""

    def __init__(self, target: Target, *, dies_at: int | None = None) -> None:
        vars(self).update(vars(target))
        self._dies_at = dies_at
        self.num_rows = self.num_passes = 0

    def read_answers(self, rows: list[list[int]], **settings: Any) -> list[ReadAnswer]:
        self.num_passes += 1
        if self.num_passes == self._dies_at:
            raise KeyboardInterrupt
        self.num_rows += len(rows)
        return super().read_answers(rows, **settings)


@pytest.fixture
def answered(config: RecipeConfig, target: Target) -> list[Conversation]:
    """Conversations with the target's answers, as a log of its own traffic would hold them."""
    config.data.features_dtype = FeaturesDtype.float32
    asked = [
        ask(f"{name}0", f"question {name}" * (place + 1)) for place, name in enumerate("abcdef")
    ]
    write_conversations(config, [*asked, ask("g0", "held out", split="test")])
    run_regenerate(config, target)
    folder = config.run_dir / "regenerated"
    return [record for split in ("train", "test") for record in read_split(folder, split)]


def test_regenerated_rows_are_linked_and_the_target_is_not_needed(
    config: RecipeConfig, answered: list[Conversation]
) -> None:
    manifest = run_collect(config, never)
    assert manifest.counts is not None
    assert manifest.counts.kept == len(answered)
    source = config.run_dir / "regenerated" / "features" / "train"
    for shard in source.glob("*.safetensors"):
        assert os.path.samefile(shard, config.run_dir / "features" / "train" / shard.name)
    assert len(FeatureStore.open(config.run_dir / "features" / "train")) == 6
    assert len(FeatureStore.open(config.run_dir / "features" / "test")) == 1


def test_an_answer_of_the_log_gives_the_row_that_generation_gave(
    config: RecipeConfig, answered: list[Conversation], target: Target, tmp_path: Path
) -> None:
    run_collect(config, never)
    generated = {row.id: row for row in FeatureStore.open(config.run_dir / "features" / "train")}
    logged = replace(config, runs_dir=str(tmp_path / "logged"))
    write_conversations(logged, answered)
    run_collect(logged, lambda: target)
    store = FeatureStore.open(logged.run_dir / "features" / "train")
    assert len(store) == len(generated)
    for row in store:
        twin = generated[row.id]
        assert row.input_ids.tolist() == twin.input_ids.tolist()
        assert row.loss_mask.tolist() == twin.loss_mask.tolist()
        assert row.prompt_length == twin.prompt_length
        assert_close(row.id, row.features, twin.features, 1e-5)


def test_an_answer_of_the_log_gives_the_teacher_that_generation_gave(
    config: RecipeConfig, target: Target, tmp_path: Path
) -> None:
    config.data.teacher_top_k = 4
    config.data.features_dtype = FeaturesDtype.float32
    write_conversations(config, [ask(f"{name}0", f"question {name}") for name in "abcdef"])
    run_regenerate(config, target)
    assert run_collect(config, never).details == {
        "teacher_top_k": 4,
        "engine": "transformers",
    }
    logged = replace(config, runs_dir=str(tmp_path / "logged"))
    write_conversations(logged, list(read_split(config.run_dir / "regenerated", "train")))
    run_collect(logged, lambda: target)
    generated, found = collected(config), collected(logged)
    assert found.keys() == generated.keys()
    for name, row in found.items():
        teacher, twin = row.teacher, generated[name].teacher
        assert teacher is not None
        assert twin is not None
        wrote = row.loss_mask.roll(-1)
        assert torch.equal(teacher.ids, twin.ids)
        assert teacher.ids[wrote, 0].tolist() == row.input_ids[row.loss_mask].tolist()
        assert_close(name, teacher.probabilities, twin.probabilities, 1e-5)
        assert not teacher.probabilities[~wrote].any()


def test_collecting_a_teacher_changes_no_features(
    config: RecipeConfig, answered: list[Conversation], target: Target, tmp_path: Path
) -> None:
    plain, kept = (replace(config, runs_dir=str(tmp_path / name)) for name in ("plain", "kept"))
    kept.data = replace(config.data, teacher_top_k=4)
    for run in (plain, kept):
        write_conversations(run, answered)
        run_collect(run, lambda: target)
    found = collected(kept)
    for name, row in collected(plain).items():
        assert row.teacher is None
        assert found[name].teacher is not None
        assert torch.equal(found[name].features, row.features)
        assert torch.equal(found[name].input_ids, row.input_ids)


def test_text_without_ids_is_rendered_and_cut_at_the_stop_token(
    config: RecipeConfig, target: Target
) -> None:
    logged = structs.replace(
        ask("a0", "question", "answer"), on_policy=True, turn=0, finish_reason="stop"
    )
    write_conversations(config, [logged])
    assert run_collect(config, lambda: target).counts is not None
    row = collected(config)["a0"]
    assert target.tokenizer.decode(row.input_ids[row.loss_mask]) == "answer<|im_end|>"


def test_what_rendering_refuses_is_counted_by_its_reason(
    config: RecipeConfig, answered: list[Conversation], target: Target, tmp_path: Path
) -> None:
    ids = answered[0].output_token_ids
    assert ids is not None
    config.data.max_prompt_tokens = 100
    logged = replace(config, runs_dir=str(tmp_path / "logged"))
    records = [
        answered[0],
        structs.replace(answered[1], id="other-tokenizer", tokenizer="sha256:0"),
        structs.replace(answered[0], id="changed", output_token_ids=[*ids[:-1], ids[-1] ^ 1]),
        structs.replace(answered[0], id="short", output_token_ids=ids[:-1]),
        structs.replace(ask("empty", "question", ""), on_policy=True),
        structs.replace(ask("stops", "question", "an <|im_end|> inside"), on_policy=True),
        structs.replace(ask("long", "question" * 50, "answer"), on_policy=True),
    ]
    write_conversations(logged, records)
    counts = run_collect(logged, lambda: target).counts
    assert counts is not None
    assert (counts.read, counts.kept) == (7, 1)
    assert {reason: number for reason, number in counts.dropped.items() if number} == {
        "ids_mismatch": 2, "truncated_log": 1, "no_supervised_token": 1, "unstable_boundary": 1,
        "too_long": 1,
    }  # fmt: skip
    assert counts.dropped.keys() == {reason.value for reason in DropReason}


@pytest.fixture
def sessions(config: RecipeConfig) -> RecipeConfig:
    """A run whose log holds three conversations of three answered turns."""
    config.data.features_dtype = FeaturesDtype.float32
    records = []
    for name in "abc":
        texts = [f"ask {name}", f"{name} it is", f"and {name}?", "no", f"{name} again", "yes, so"]
        for turn in range(3):
            call = ask(f"{name}{turn}", *texts[: 2 * turn + 2])
            records.append(structs.replace(call, turn=turn, on_policy=True, finish_reason="stop"))
    write_conversations(config, records)
    return config


def alone(config: RecipeConfig, tmp_path: Path) -> RecipeConfig:
    """The same run, but no call knows its session."""
    other = replace(config, runs_dir=str(tmp_path / "alone"))
    records = read_split(config.run_dir / "conversations", "train")
    write_conversations(other, [structs.replace(record, session=None) for record in records])
    return other


@pytest.mark.parametrize("teacher_top_k", [0, 3])
def test_a_session_is_read_once_and_each_call_comes_back_as_if_alone(
    sessions: RecipeConfig, target: Target, tmp_path: Path, teacher_top_k: int
) -> None:
    sessions.data.teacher_top_k = teacher_top_k
    counting = CountingTarget(target)
    run_collect(sessions, lambda: counting)
    assert counting.num_rows == 3
    run_collect(other := alone(sessions, tmp_path), lambda: target)
    shared, single = collected(sessions), collected(other)
    assert shared.keys() == single.keys()
    assert len(shared) == 9
    for name, row in shared.items():
        twin = single[name]
        assert torch.equal(row.input_ids, twin.input_ids)
        assert torch.equal(row.loss_mask, twin.loss_mask)
        assert_close(name, row.features, twin.features, 1e-5)
        for field in ("tenant", "max_length", "finish_reason", "weight", "prompt_length"):
            assert getattr(row, field) == getattr(twin, field)
        if row.teacher is not None and twin.teacher is not None:
            assert torch.equal(row.teacher.ids, twin.teacher.ids)
            assert_close(name, row.teacher.probabilities, twin.teacher.probabilities, 1e-5)
        assert (row.teacher is None) == (twin.teacher is None) == (teacher_top_k == 0)


def test_training_batches_of_shared_rows_are_those_of_rows_alone(
    sessions: RecipeConfig, target: Target, tmp_path: Path
) -> None:
    run_collect(sessions, lambda: target)
    run_collect(other := alone(sessions, tmp_path), lambda: target)
    settings = BlockSettings(block_size=4, num_anchors=3, seed=0)
    names = sorted(collected(sessions))
    one, two = (
        collate([collected(run)[name] for name in names], settings, epoch=0)
        for run in (sessions, other)
    )
    assert int(one.label_mask.sum()) > 20
    for name in ("anchor_ids", "labels", "label_mask"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert torch.equal(one.blocks.anchor_positions, two.blocks.anchor_positions)
    assert_close("features", one.target_features, two.target_features, 1e-5)


def test_disk_and_passes_grow_with_the_tokens_of_a_session(
    sessions: RecipeConfig, target: Target, tmp_path: Path
) -> None:
    run_collect(sessions, lambda: target)
    run_collect(other := alone(sessions, tmp_path), lambda: target)
    stored, single = (sum(p.stat().st_size for p in shards_of(c)) for c in (sessions, other))
    rows = collected(sessions)
    longest = sum(len(rows[f"{name}2"].input_ids) for name in "abc")
    everything = sum(len(row.input_ids) for row in rows.values())
    assert stored / single == pytest.approx(longest / everything, rel=0.05)


def test_answers_of_servers_come_without_features_and_are_read_too(
    config: RecipeConfig, answered: list[Conversation], target: Target
) -> None:
    want = {record.id for record in answered if record.split == "train"}
    shutil.rmtree(config.run_dir / "regenerated" / "features")
    (config.run_dir / "regenerated" / "manifest.json").unlink()
    manifest = run_collect(config, lambda: target)
    assert manifest.counts is not None
    assert (manifest.counts.read, manifest.counts.kept) == (7, 7)
    assert collected(config).keys() == want


def test_features_in_8_bits_are_stored_with_a_scale_for_each_tap(
    config: RecipeConfig, answered: list[Conversation], target: Target, tmp_path: Path
) -> None:
    full, small = (replace(config, runs_dir=str(tmp_path / name)) for name in ("full", "small"))
    small.data = replace(config.data, features_dtype=FeaturesDtype.float8_e4m3fn)
    for run in (full, small):
        write_conversations(run, answered)
        run_collect(run, lambda: target)
    read = collected(small)
    for name, row in collected(full).items():
        assert_close(name, read[name].features, row.features, 2**-5)


@pytest.fixture
def many(config: RecipeConfig, answered: list[Conversation], tmp_path: Path) -> RecipeConfig:
    """A run whose logged answers fill several small shards."""
    run = replace(config, runs_dir=str(tmp_path / "many"))
    run.data = replace(config.data, shard_bytes=40_000)
    copies = [
        structs.replace(record, id=f"{record.id}-{n}") for n in range(4) for record in answered
    ]
    write_conversations(run, [structs.replace(record, session=None) for record in copies])
    return run


def twin(config: RecipeConfig, folder: Path) -> RecipeConfig:
    """The same input in another folder."""
    other = replace(config, runs_dir=str(folder))
    shutil.copytree(config.run_dir / "conversations", other.run_dir / "conversations")
    return other


def test_shards_are_bounded_and_hold_all_rows(many: RecipeConfig, target: Target) -> None:
    run_collect(many, lambda: target)
    sizes = [path.stat().st_size for path in shards_of(many)]
    assert len(sizes) > 3
    assert max(sizes) <= many.data.shard_bytes + 1024  # its header
    assert len(collected(many)) == 24


def test_an_interrupted_collection_goes_on_behind_its_last_shard(
    many: RecipeConfig, target: Target, tmp_path: Path
) -> None:
    broken = twin(many, tmp_path / "broken")
    whole = CountingTarget(target)
    run_collect(many, lambda: whole)
    with pytest.raises(KeyboardInterrupt):
        run_collect(broken, lambda: CountingTarget(target, dies_at=6))
    assert Manifest.read(broken.run_dir / "features") is None
    done = [path.name for path in shards_of(broken)]
    assert 0 < len(done) < len(shards_of(many))
    rest = CountingTarget(target)
    run_collect(broken, lambda: rest)
    assert 0 < rest.num_rows < whole.num_rows
    assert same_bytes(many, broken)


def test_a_shard_that_is_damaged_or_lost_is_computed_again_and_no_other(
    many: RecipeConfig, target: Target, tmp_path: Path
) -> None:
    run_collect(many, lambda: target)
    broken = twin(many, tmp_path / "broken")
    run_collect(broken, lambda: target)
    lost, damaged, *kept = shards_of(broken)
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    times = {path: path.stat().st_mtime_ns for path in kept}
    run_collect(broken, lambda: target)
    assert same_bytes(many, broken)
    assert {path: path.stat().st_mtime_ns for path in kept} == times


PROGRAM = """
import sys
from dflash_data.collect.stage import collect
from dflash_train.config import *
from dflash_train.records.manifest import Manifest
from dflash_train.testing import MASK_TOKEN_ID, tiny_target
from dflash_train.training.accelerator import build_accelerator

config = RecipeConfig(
    name="run", runs_dir=sys.argv[1], target=TargetConfig(name_or_path="tiny"),
    drafter=DrafterSettings(mask_token_id=MASK_TOKEN_ID, num_taps=2),
    data=DataConfig(max_new_tokens=12, batch_size=4, shard_bytes=40_000,
                    features_dtype=FeaturesDtype.float32),
    launch=LaunchConfig(num_threads=1),
)
accelerator = build_accelerator(config.launch)
assert accelerator.num_processes == 2
manifest = Manifest(stage="collect", recipe_hash="c", target={"name": "tiny"})
collect(config, load_target=tiny_target, manifest=manifest, accelerator=accelerator)
accelerator.end_training()
"""


def test_two_processes_write_the_bytes_of_one(
    many: RecipeConfig, target: Target, tmp_path: Path
) -> None:
    run_collect(many, lambda: target)
    both = twin(many, tmp_path / "both")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(tmp_path / "program.py"), both.runs_dir]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "data_pipelines")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert same_bytes(many, both)
    assert result.stderr.count("collect: 100%") == 1  # the first process alone shows progress


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
    many: RecipeConfig, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(many.run_dir)._replace(free=50_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: usage)
    with pytest.raises(
        UnavailableError, match=r"take \d+ bytes, and 50000 are free.*float8_e4m3fn"
    ):
        run_collect(many, lambda: target)
    assert shards_of(many) == []


def test_a_dry_run_foretells_tokens_and_disk_and_leaves_nothing(
    many: RecipeConfig, target: Target
) -> None:
    before = sorted(many.run_dir.rglob("*"))
    estimate = plan_collection(many, load_target=lambda: target)
    assert sorted(many.run_dir.rglob("*")) == before
    run_collect(many, lambda: target)
    rows = [*collected(many).values(), *collected(many, "test").values()]
    assert (estimate.num_calls, estimate.num_rows, estimate.num_linked) == (28, 28, 0)
    assert estimate.num_tokens == sum(len(row.input_ids) for row in rows)
    assert estimate.token_bytes == bytes_per_token(
        target.features_width, dtype=torch.float32, num_taps=2, teacher_top_k=0
    )
    paths = [*shards_of(many), *shards_of(many, "test")]
    headers = sum(path.stat().st_size for path in paths) - estimate.disk_bytes
    assert 0 < headers < 1024 * len(paths)
    assert estimate.memory_bytes is not None
    assert estimate.memory_bytes > 50_000_000  # torch alone takes more
    assert estimate.seconds is not None
    assert 0 < estimate.seconds < 60


def test_the_command_prints_the_estimate_and_collects_nothing(
    many: RecipeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("conversations", "regenerated"):
        Manifest(stage=name, recipe_hash="r").write(many.run_dir / name)
    overrides = [
        f"runs_dir={many.runs_dir}", "name=run", "drafter.num_taps=2", "drafter.block_size=4",
        f"target.name_or_path={save_tiny_target(tmp_path / 'target')}",
        f"drafter.mask_token_id={MASK_TOKEN_ID}", "data.features_dtype=float8_e4m3fn",
    ]  # fmt: skip
    assert main(["collect", "--dry-run", *overrides]) == 0
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["calls", "tokens", "disk", "memory", "time"]
    assert lines["calls"] == "28 to read, 0 linked from regenerate"
    assert lines["disk"].endswith("81 a token")  # 2 taps of 32 bytes and a scale, id, mask
    assert not (many.run_dir / "features").exists()
    assert main(["evaluate", "--dry-run", *overrides]) == 2
    assert "not for `evaluate`" in capsys.readouterr().err


def test_what_regenerate_left_costs_nothing(
    config: RecipeConfig, answered: list[Conversation]
) -> None:
    estimate = plan_collection(config, load_target=never)
    assert (estimate.num_linked, estimate.disk_bytes, estimate.seconds) == (len(answered), 0, 0)


def test_a_damaged_shard_is_named(config: RecipeConfig, answered: list[Conversation]) -> None:
    run_collect(config, never)
    folder = config.run_dir / "features" / "train"
    shard = sorted(folder.glob("*.safetensors"))[0]
    copy = shutil.copy(shard, folder / "copy")
    shard.unlink()
    content = bytearray(Path(copy).read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=shard.name):
        FeatureStore.open(folder)
