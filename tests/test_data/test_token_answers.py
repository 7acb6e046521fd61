from dataclasses import asdict
from pathlib import Path

import orjson
import pytest
from msgspec.structs import replace

from dflash_data.collect.stage import collect
from dflash_data.regenerate.stage import regenerate
from dflash_data.token_answers import (
    TokenAnswer,
    answered_record,
    check_on_policy,
    open_record,
    read_questions,
    read_token_answers,
    write_conversations,
)
from dflash_train.config import RecipeConfig
from dflash_train.features.store import FeatureStore
from dflash_train.features.target import Target
from dflash_train.records.chat_template import render_prompt
from dflash_train.records.conversation import Conversation, read_split
from dflash_train.records.manifest import Manifest
from dflash_train.testing import tiny_target

BUDGET = 12


def record(name: str, split: str = "train") -> Conversation:
    return open_record(f"question {name}", record_id=name, source="test", split=split)


def answer_of(asked: Conversation, target: Target, index: int = 0) -> TokenAnswer:
    prompt = render_prompt(target.tokenizer, asked.messages)
    (row,) = target.generate_batch([prompt], max_new_tokens=BUDGET)
    return TokenAnswer(
        index=index,
        prompt_token_ids=prompt,
        output_token_ids=row.output_ids,
        finish_reason=row.finish_reason,
    )


def answered(asked: Conversation, target: Target) -> Conversation:
    answer = answer_of(asked, target)
    return answered_record(asked, answer, target=target, max_new_tokens=BUDGET)


def write_lines(path: Path, lines: list[object]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return path


def test_answers_come_back_by_index(tmp_path: Path, target: Target) -> None:
    answers = [answer_of(record(f"q{index}"), target, index) for index in (3, 1)]
    path = write_lines(tmp_path / "answers.jsonl", [asdict(each) for each in answers])
    assert read_token_answers(path) == {3: answers[0], 1: answers[1]}


GOOD = {"index": 0, "prompt_token_ids": [1], "output_token_ids": [2], "finish_reason": "stop"}


@pytest.mark.parametrize(
    "line",
    [
        {**GOOD, "index": 7},
        {**GOOD, "output_token_ids": []},
        {**GOOD, "output_token_ids": 5},
        {**GOOD, "prompt_token_ids": ["secret"]},
        {**GOOD, "finish_reason": "error"},
        {**GOOD, "secret": 1},
        {"index": 0},
        ["secret"],
    ],
)
def test_a_broken_answer_is_named_by_its_line_and_never_shown(tmp_path: Path, line: object) -> None:
    path = write_lines(tmp_path / "answers.jsonl", [{**GOOD, "index": 7}, line])
    with pytest.raises(ValueError, match=r"answers\.jsonl:2") as raised:
        read_token_answers(path)
    assert "secret" not in str(raised.value)


def test_a_line_without_a_question_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "questions.jsonl", [{"question": "why?"}, {"answer": "so"}])
    with pytest.raises(ValueError, match=r"questions\.jsonl:2"):
        read_questions(path)
    (tmp_path / "text.jsonl").write_text("why?\n")
    with pytest.raises(ValueError, match=r"text\.jsonl:1 is not JSON"):
        read_questions(tmp_path / "text.jsonl")


def test_a_record_carries_the_exact_ids_and_the_text(target: Target) -> None:
    asked = record("a")
    answer = answer_of(asked, target)
    joined = answered_record(asked, answer, target=target, max_new_tokens=BUDGET)
    assert joined.prompt_token_ids == answer.prompt_token_ids
    assert joined.output_token_ids == answer.output_token_ids
    assert joined.answer is not None
    text = target.tokenizer.decode(answer.output_token_ids, skip_special_tokens=True)
    assert joined.answer.content == text
    assert joined.on_policy
    assert joined.tokenizer == target.tokenizer_hash


def test_answers_to_another_prompt_are_refused(target: Target) -> None:
    answer = answer_of(record("a"), target)
    with pytest.raises(ValueError, match="b: the stored prompt_token_ids"):
        answered_record(record("b"), answer, target=target, max_new_tokens=BUDGET)


def test_an_answer_past_the_budget_is_refused(target: Target) -> None:
    answer = answer_of(record("a"), target)
    short = len(answer.output_token_ids) - 1
    with pytest.raises(ValueError, match=r"data\.max_new_tokens"):
        answered_record(record("a"), answer, target=target, max_new_tokens=short)


def test_answers_of_another_model_with_the_same_tokenizer_are_refused(target: Target) -> None:
    records = [answered(record(name), target) for name in "abc"]
    check_on_policy(records, target)
    with pytest.raises(ValueError, match="chooses only"):
        check_on_policy(records, tiny_target(seed=1))


def test_stored_and_new_answers_become_rows_with_the_same_ids(
    config: RecipeConfig, target: Target
) -> None:
    stored = [answered(record(name), target) for name in ("a", "b")]
    records = [*stored, record("c", "validation"), record("d", "test")]
    folder = config.run_dir / "conversations"
    written = write_conversations(folder, records, Manifest(stage="answers", recipe_hash="r"))
    written.verify_outputs(folder)
    assert list(read_split(folder, "train")) == stored
    regenerate(config, target=target, manifest=Manifest(stage="regenerate", recipe_hash="r"))
    collect(config, load_target=lambda: target, manifest=Manifest(stage="collect", recipe_hash="c"))
    for each in [*stored, answered(record("c"), target), answered(record("d"), target)]:
        split = {"c": "validation", "d": "test"}.get(each.id, "train")
        rows = {row.id: row for row in FeatureStore.open(config.run_dir / "features" / split)}
        row = rows[each.id]
        assert each.prompt_token_ids is not None
        assert each.output_token_ids is not None
        assert row.input_ids.tolist() == each.prompt_token_ids + each.output_token_ids
        assert row.prompt_length == len(each.prompt_token_ids)
        assert row.max_length == row.prompt_length + BUDGET


def test_the_same_records_give_the_same_manifest_hash(tmp_path: Path, target: Target) -> None:
    records = [answered(record("a"), target), record("b", "test")]
    hashes = {
        write_conversations(
            tmp_path / name, records, Manifest(stage="answers", recipe_hash="r", command=name)
        ).hash
        for name in ("first", "second")
    }
    other = [replace(records[0], id="other"), records[1]]
    changed = write_conversations(
        tmp_path / "third", other, Manifest(stage="answers", recipe_hash="r")
    )
    assert len(hashes) == 1
    assert changed.hash not in hashes
