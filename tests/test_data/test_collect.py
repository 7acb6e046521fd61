import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dflash_data.collect import collect
from dflash_data.regenerate import regenerate
from dflash_train.config import Dtype, RecipeConfig
from dflash_train.features.store import FeatureRow, FeatureStore
from dflash_train.features.target import Target
from dflash_train.records.conversation import Conversation, read_split
from dflash_train.records.manifest import Manifest, file_hash
from dflash_train.testing import ask, assert_close, write_conversations


def never() -> Target:
    raise AssertionError("the target was loaded although nothing had to run through it")


def run_regenerate(config: RecipeConfig, target: Target) -> None:
    regenerate(config, target=target, manifest=Manifest(stage="regenerate", recipe_hash="r"))


def collected(config: RecipeConfig, split: str = "train") -> dict[str, FeatureRow]:
    return {row.id: row for row in FeatureStore.open(config.run_dir / "features" / split)}


def run_collect(config: RecipeConfig, load_target: object) -> Manifest:
    manifest = Manifest(stage="collect", recipe_hash="c", target={"name": "tiny"})
    return collect(config, load_target=load_target, manifest=manifest)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def answered(config: RecipeConfig, target: Target) -> list[Conversation]:
    """Conversations with the target's answers, as a log of its own traffic would hold them."""
    config.data.features_dtype = Dtype.float32
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
    config.data.features_dtype = Dtype.float32
    write_conversations(config, [ask(f"{name}0", f"question {name}") for name in "abcdef"])
    run_regenerate(config, target)
    assert run_collect(config, never).details == {"teacher_top_k": 4}
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
    logged = replace(ask("a0", "question", "answer"), on_policy=True, turn=0, finish_reason="stop")
    empty = replace(ask("b0", "question", ""), on_policy=True, turn=0)
    write_conversations(config, [logged, empty])
    manifest = run_collect(config, lambda: target)
    assert manifest.counts is not None
    assert manifest.counts.kept == 2
    rows = {row.id: row for row in FeatureStore.open(config.run_dir / "features" / "train")}
    text = target.tokenizer.decode(rows["a0"].input_ids[rows["a0"].loss_mask])
    assert text == "answer<|im_end|>"
    assert int(rows["b0"].loss_mask.sum()) == 1


def test_an_interrupted_collection_ends_with_the_same_bytes(
    config: RecipeConfig, answered: list[Conversation], target: Target, tmp_path: Path
) -> None:
    whole, broken = (replace(config, runs_dir=str(tmp_path / name)) for name in ("whole", "broken"))
    for run in (whole, broken):
        write_conversations(run, answered)
    run_collect(whole, lambda: target)
    calls: list[int] = []

    class Dies:
        """A target that dies with the second batch."""

        tokenizer, stop_token_ids = target.tokenizer, target.stop_token_ids

        def read_answers(self, rows: list[list[int]], **settings: Any) -> object:
            calls.append(len(rows))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return target.read_answers(rows, **settings)

    with pytest.raises(KeyboardInterrupt):
        run_collect(broken, Dies)
    assert Manifest.read(broken.run_dir / "features") is None
    run_collect(broken, lambda: target)
    for path in sorted((whole.run_dir / "features").rglob("*.*")):
        twin = broken.run_dir / "features" / path.relative_to(whole.run_dir / "features")
        assert file_hash(path) == file_hash(twin)


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
