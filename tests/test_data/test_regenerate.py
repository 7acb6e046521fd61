import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dflash_data.drops import DropReason
from dflash_data.privacy.pseudonyms import Pseudonyms
from dflash_data.regenerate.answers import Answer, finish_record
from dflash_data.regenerate.estimate import estimate_regeneration
from dflash_data.regenerate.stage import regenerate
from dflash_train.config import FeaturesDtype, RecipeConfig, ServingSampling
from dflash_train.features.generated_row import GeneratedRow
from dflash_train.features.store import read_index
from dflash_train.features.target import Target
from dflash_train.records.chat_template import render_prompt
from dflash_train.records.conversation import (
    Conversation,
    Turn,
    read_shard,
    read_split,
    write_shard,
)
from dflash_train.records.manifest import Manifest, file_hash
from dflash_train.testing import ask, assert_close, write_conversations

RECORDS = [
    ask("a0", "one"),
    ask("a1", "one", None, "two"),
    ask("a2", "one", None, "two", None, "three"),
    ask("b0", "a longer first message than the others"),
    ask("c0", "short", split="test"),
    ask("c1", "short", None, "and on", split="test"),
]


def run(config: RecipeConfig, target: Target) -> Manifest:
    manifest = Manifest(stage="regenerate", recipe_hash="sha256:test")
    return regenerate(config, target=target, manifest=manifest)


def answers(config: RecipeConfig, split: str) -> dict[str, Conversation]:
    folder = config.run_dir / "regenerated"
    return {record.id: record for record in read_split(folder, split)}


def files(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_hash(path) for path in paths}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl.gz"))


def test_each_answer_is_the_targets_own_greedy_answer(config: RecipeConfig, target: Target) -> None:
    write_conversations(config, RECORDS)
    manifest = run(config, target)
    assert manifest.counts is not None
    assert (manifest.counts.read, manifest.counts.kept) == (6, 6)
    for record in [*answers(config, "train").values(), *answers(config, "test").values()]:
        prompt_ids = render_prompt(target.tokenizer, record.messages[:-1])
        alone = target.generate_batch([prompt_ids], max_new_tokens=12)[0]
        assert record.prompt_token_ids == prompt_ids
        assert record.output_token_ids == alone.output_ids
        assert record.finish_reason == alone.finish_reason
        assert record.origin == "regenerated"
        assert record.on_policy


def test_a_later_turn_holds_the_targets_earlier_answers(
    config: RecipeConfig, target: Target
) -> None:
    write_conversations(config, RECORDS)
    run(config, target)
    found = answers(config, "train")
    third = found["a2"].messages
    assert [turn.role for turn in third] == ["user", "assistant"] * 3
    assert third[1].content == found["a0"].messages[1].content
    assert third[3].content == found["a1"].messages[3].content


def test_features_are_those_of_a_teacher_forced_pass(config: RecipeConfig, target: Target) -> None:
    config.data.features_dtype = FeaturesDtype.float32
    write_conversations(config, RECORDS)
    run(config, target)
    folder = config.run_dir / "regenerated" / "features" / "train"
    found = answers(config, "train")
    for line in read_index(folder):
        record = found[line.id]
        ids = (record.prompt_token_ids or []) + (record.output_token_ids or [])
        tensors = load_file(folder / line.shard)
        first, end = tensors["offsets"][line.row : line.row + 2].tolist()
        assert tensors["input_ids"][first:end].tolist() == ids
        assert line.max_length == len(record.prompt_token_ids or []) + 12
        assert_close(line.id, tensors["features"][first:end], target.features_of([ids])[0], 1e-5)
        assert not tensors["features"][end - 1].any()


def test_the_teacher_stands_beside_features_that_it_does_not_change(
    config: RecipeConfig, target: Target
) -> None:
    kept = replace(config, name="kept", data=replace(config.data, teacher_top_k=3))
    for each in (config, kept):
        write_conversations(each, RECORDS)
        manifest = run(each, target)
        assert manifest.details["teacher_top_k"] == each.data.teacher_top_k
    folder = config.run_dir / "regenerated" / "features"
    for path in folder.rglob("*.safetensors"):
        plain = load_file(path)
        beside = load_file(kept.run_dir / "regenerated" / "features" / path.relative_to(folder))
        ids, masses = beside.pop("teacher_ids"), beside.pop("teacher_probabilities")
        assert plain.keys() == beside.keys()
        assert all(torch.equal(plain[name], beside[name]) for name in plain)
        wrote = plain["loss_mask"]
        assert ids.shape == masses.shape == (len(wrote), 3)
        before = wrote.roll(-1)  # rows start with a prompt, so nothing wraps into an answer
        assert ids[before, 0].tolist() == plain["input_ids"][wrote].tolist()
        assert (masses[before].sum(-1) > 0).all()
        assert not masses[~before].any()


def test_a_log_answer_of_another_model_is_replaced(config: RecipeConfig, target: Target) -> None:
    logged = ask("d0", "hello", "an answer that some other model wrote")
    logged.turn = 0
    write_conversations(config, [logged])
    run(config, target)
    record = answers(config, "train")["d0"]
    assert len(record.messages) == 2
    assert record.messages[-1].content != "an answer that some other model wrote"


def test_an_interrupted_run_ends_with_the_same_bytes(
    config: RecipeConfig, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_conversations(config, RECORDS)
    folder = config.run_dir / "regenerated"
    run(config, target)
    undisturbed = files(folder)
    shutil.rmtree(folder)
    generate, calls = target.generate_batch, []

    def generate_twice(prompts: list[list[int]], **settings: Any) -> object:
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(prompts, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(target, "generate_batch", generate_twice)
        with pytest.raises(KeyboardInterrupt):
            run(config, target)
    assert Manifest.read(folder) is None
    finished = sorted((folder / "batches").rglob("*.gz"))
    assert len(finished) == 2
    times = [path.stat().st_mtime_ns for path in finished]
    run(config, target)
    assert [path.stat().st_mtime_ns for path in finished] == times
    assert files(folder) == undisturbed


def test_prompts_that_may_grow_too_long_are_counted(config: RecipeConfig, target: Target) -> None:
    config.data.max_prompt_tokens = 75
    write_conversations(config, RECORDS)
    manifest = run(config, target)
    assert manifest.counts is not None
    assert 0 < manifest.counts.kept < 6
    assert manifest.counts.dropped["too_long"] == 6 - manifest.counts.kept
    kept = answers(config, "train") | answers(config, "test")
    assert all(len(record.prompt_token_ids or []) <= 75 for record in kept.values())


def test_a_turn_whose_history_nobody_can_answer_is_dropped(
    config: RecipeConfig, target: Target
) -> None:
    write_conversations(config, [ask("a0", "one"), ask("e1", "never asked", None, "two")])
    manifest = run(config, target)
    assert manifest.counts is not None
    assert manifest.counts.dropped["content_missing"] == 1
    assert answers(config, "train").keys() == {"a0"}


def test_a_limit_that_drops_everything_is_an_error(config: RecipeConfig, target: Target) -> None:
    config.data.max_prompt_tokens = 3
    write_conversations(config, RECORDS)
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens \(=3\)"):
        run(config, target)


def test_a_finished_row_leaves_the_batch_without_changing_the_others(target: Target) -> None:
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    alone = [target.generate_batch([prompt], max_new_tokens=10)[0] for prompt in prompts]
    # A token that one row writes late, so that this row leaves while the others go on.
    leaver, length, stop = next(
        (row, place + 1, token)
        for row, single in enumerate(alone)
        for place, token in enumerate(single.output_ids)
        if place > 1 and token not in single.output_ids[:place]
    )
    stops, target.stop_token_ids = target.stop_token_ids, frozenset([stop])
    try:
        together = target.generate_batch(prompts, max_new_tokens=10)
    finally:
        target.stop_token_ids = stops
    assert together[leaver].output_ids == alone[leaver].output_ids[:length]
    assert together[leaver].finish_reason == "stop"
    for row, single in zip(together, alone, strict=True):
        assert row.output_ids == single.output_ids[: len(row.output_ids)]
        want = single.features[: len(row.features) - 1]
        assert_close("features", row.features[:-1], want, 1e-5)
        assert not torch.any(row.features[-1])


def test_a_sampled_run_that_was_interrupted_ends_with_the_same_answers(
    config: RecipeConfig, target: Target
) -> None:
    config.data.serving_sampling = ServingSampling(temperature=1.0, top_k=50)
    config.data.batch_size = 2
    write_conversations(config, [ask(f"{name}0", "the same question") for name in "abcd"])
    run(config, target)
    folder = config.run_dir / "regenerated"
    said = [record.output_token_ids for record in answers(config, "train").values()]
    assert len({tuple(ids or []) for ids in said}) == 4
    before = files(folder)
    (folder / "batches" / "train-00000" / "00001.jsonl.gz").unlink()
    run(config, target)
    assert files(folder) == before


def test_rows_of_redacted_and_dropped_answers_stand_in_no_shard(
    config: RecipeConfig, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {
        "tell me a key": "The key is AKIAQ7RZ4M2WXK5TB3NC today.",
        "tell me an address": "Write to ida.holm@example.com now.",
    }
    generate = target.generate_batch

    def generate_private(prompts: list[list[int]], **settings: Any) -> list[GeneratedRow]:
        rows = generate(prompts, **settings)
        for place, prompt in enumerate(prompts):
            shown = str(target.tokenizer.decode(prompt)).split("\n")
            question = shown[1].split("<")[0]
            if question in said and "and?" not in str(shown):
                ids = [*target.tokenizer(said[question]).input_ids, 2]
                features = target.features_of([prompt + ids])[0]
                rows[place] = replace(rows[place], output_ids=ids, features=features)
        return rows

    records = [ask("a0", "tell me a key"), ask("b0", "tell me an address"), ask("c0", "hello")]
    records += [
        ask("a1", "tell me a key", None, "and?"),
        ask("b1", "tell me an address", None, "and?"),
    ]
    write_conversations(config, records)
    monkeypatch.setattr(target, "generate_batch", generate_private)
    manifest = run(config, target)
    assert manifest.counts is not None
    assert (manifest.counts.read, manifest.counts.kept) == (5, 3)
    assert manifest.counts.dropped["secret_in_answer"] == 1
    assert manifest.counts.dropped["content_missing"] == 1  # its next turn has no history
    folder = config.run_dir / "regenerated"
    assert {line.id for line in read_index(folder / "features" / "train")} == {"c0", "b1"}
    shards = (folder / "features" / "train").glob("*.safetensors")
    assert sum(len(load_file(path)["offsets"]) - 1 for path in shards) == 2
    redacted = answers(config, "train")["b0"]
    assert redacted.output_token_ids is None
    assert redacted.messages[1].content == "Write to EMAIL_1 now."
    assert answers(config, "train")["b1"].messages[1] == redacted.messages[1]
    before = files(folder)
    run(config, target)
    assert files(folder) == before


@pytest.mark.parametrize(
    ("thought", "outcome"), [("Hm.", None), ("Ask ana.lima@example.org.", DropReason.off_policy)]
)
def test_ids_with_private_reasoning_that_the_server_took_out_are_not_kept(
    target: Target, thought: str, outcome: DropReason | None
) -> None:
    output = target.tokenizer(f"<think>{thought}</think>Yes.<|im_end|>").input_ids
    answer = Answer(
        turn=Turn(role="assistant", content="Yes."),
        finish_reason="stop",
        prompt_ids=[4, 5],
        output_ids=output,
    )
    pseudonyms = Pseudonyms(b"the key of this test")
    found = finish_record(ask("a0", "one"), answer, target=target, pseudonyms=pseudonyms)
    if outcome is None:
        assert isinstance(found, Conversation)
        assert found.output_token_ids == output
    else:
        assert found is outcome


def test_messages_of_a_turn_are_never_shared(config: RecipeConfig, target: Target) -> None:
    record = ask("a1", "one", None, "two")
    before = [Turn(role=turn.role, content=turn.content) for turn in record.messages]
    write_conversations(config, [ask("a0", "one"), record])
    run(config, target)
    assert record.messages == before


def test_each_shard_of_conversations_becomes_one_shard_of_answers(
    config: RecipeConfig, target: Target
) -> None:
    write_conversations(config, RECORDS[:3])
    second = config.run_dir / "conversations" / "train-00001.jsonl.gz"
    write_shard(second, [ask("d0", "one"), ask("d1", "one", None, "four")])
    manifest = run(config, target)
    folder = config.run_dir / "regenerated"
    found = {path.name: [record.id for record in read_shard(path)] for path in shards(folder)}
    assert found == {
        "train-00000.jsonl.gz": ["a0", "a1", "a2"],
        "train-00001.jsonl.gz": ["d0", "d1"],
    }
    assert [entry.rows for entry in manifest.outputs[:2]] == [3, 2]
    lines = read_index(folder / "features" / "train")
    assert [line.id for line in lines] == ["a0", "a1", "a2", "d0", "d1"]
    before = files(folder)
    (folder / "batches" / "train-00001" / "00000.jsonl.gz").unlink()
    (folder / "train-00001.jsonl.gz").unlink()
    run(config, target)
    assert files(folder) == before


def test_a_dry_run_bounds_calls_tokens_and_disk_and_leaves_nothing(
    config: RecipeConfig, target: Target
) -> None:
    records = [ask(f"{name}0", f"question {name}") for name in "abcdef"]
    write_conversations(config, records)
    before = sorted(config.run_dir.rglob("*"))
    estimate = estimate_regeneration(config, target=target)
    assert sorted(config.run_dir.rglob("*")) == before
    run(config, target)
    kept = answers(config, "train").values()
    prompts = sum(record.usage["prompt_tokens"] for record in kept)
    written = sum(record.usage["completion_tokens"] for record in kept)
    features = (config.run_dir / "regenerated" / "features").rglob("*.safetensors")
    assert estimate.num_calls == 6
    assert estimate.prompt_tokens == prompts
    assert written <= estimate.answer_tokens == 6 * 12
    headers = 1024 * 6
    assert sum(path.stat().st_size for path in features) <= (estimate.disk_bytes or 0) + headers
    assert 0 < (estimate.seconds or 0) < 60
    config.data.endpoints.urls = ["http://127.0.0.1:9/v1"]
    lines = estimate_regeneration(config, target=target).lines()
    assert [line.split(":")[0] for line in lines] == ["calls", "tokens"]
