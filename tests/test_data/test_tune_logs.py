"""Logs of the tuning protocol: invented questions, as ingest reads them."""

import json
from itertools import pairwise
from pathlib import Path

import orjson

from benchmarks.tune_logs import (
    GSM8K,
    MODEL,
    OASST,
    Call,
    gsm8k_calls,
    oasst_calls,
    spread_over_time,
    write_logs,
)
from dflash_data.adapters.openai import adapt
from dflash_data.ingest.explode import instant
from dflash_data.ingest.on_policy import judge
from dflash_data.ingest.splits import time_cuts
from dflash_train.config import DataConfig
from dflash_train.records.conversation import Conversation
from dflash_train.testing import tiny_tokenizer

TREE = {
    "message_tree_id": "t1",
    "prompt": {
        "role": "prompter",
        "text": "Why?",
        "replies": [
            {
                "role": "assistant",
                "text": "Because.",
                "replies": [
                    {"role": "prompter", "text": "Really?", "replies": []},
                    {"role": "prompter", "text": "Since when?", "replies": []},
                ],
            },
            {"role": "assistant", "text": "Who knows.", "replies": []},
        ],
    },
}


def write_data(folder: Path) -> Path:
    """Write files in the form of the data sets: four questions, a tree, two prompts."""
    files = {
        "gsm8k/train.jsonl": [{"question": f"How many are {n} and {n}?"} for n in range(4)],
        "gsm8k/test.jsonl": [{"question": "How many are left?"}],
        "gsm8k_smollm2/train-1280.jsonl": [_stored(2), _stored(0)],
        "gsm8k_smollm2/test-64.jsonl": [_stored(0)],
        "oasst/en_100_tree.jsonl": [TREE],
        "oasst/prompt_lottery_en_250_text.jsonl": ["What is rain?", "Sing!"],
    }
    for name, lines in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _stored(index: int) -> dict[str, object]:
    ids = tiny_tokenizer().encode("Four, I think.")
    return {
        "index": index, "prompt_token_ids": [5, 6], "output_token_ids": ids, "finish_reason": "stop"
    }  # fmt: skip


def records_of(path: Path) -> list[Conversation]:
    found = [adapt(orjson.loads(line), "log:1")[0] for line in path.read_bytes().splitlines()]
    assert all(isinstance(each, Conversation) for each in found)
    return [each for each in found if isinstance(each, Conversation)]


def test_every_turn_of_a_prompter_is_a_call_with_the_path_to_it(tmp_path: Path):
    calls = oasst_calls(write_data(tmp_path))
    said = [[message["content"] for message in call.messages] for call in calls]
    assert said == [
        ["Why?"],
        ["Why?", "Because.", "Really?"],
        ["Why?", "Because.", "Since when?"],
        ["What is rain?"],
        ["Sing!"],
    ]
    assert [message["role"] for message in calls[1].messages] == ["user", "assistant", "user"]
    assert len({call.session for call in calls}) == 3


def test_stored_answers_come_back_from_the_log_as_the_targets_own(tmp_path: Path):
    calls = gsm8k_calls(write_data(tmp_path), tiny_tokenizer(), budget=100)
    assert write_logs(tmp_path / "logs", spread_over_time(calls, seed=0)) == {GSM8K: 3}
    records = records_of(tmp_path / "logs" / f"{GSM8K}.jsonl")
    for record in records:
        judge(record, DataConfig(target_aliases=[MODEL]))
        assert record.on_policy, record.on_policy_reason
        assert record.prompt_token_ids == [5, 6]
        assert record.output_token_ids == _stored(0)["output_token_ids"]
        assert record.tenant == GSM8K
        assert record.answer is not None
        assert record.answer.content == "Four, I think."
    asked = {record.messages[0].content for record in records}
    assert asked == {"How many are 0 and 0?", "How many are 2 and 2?", "How many are left?"}


def test_an_answer_beyond_the_budget_is_cut_and_says_so(tmp_path: Path):
    calls = gsm8k_calls(write_data(tmp_path), tiny_tokenizer(), budget=4)
    for call in calls:
        assert call.answer is not None
        assert len(call.answer.output_token_ids) == 4
        assert call.answer.finish_reason == "length"


def test_a_log_without_answers_is_left_for_regenerate(tmp_path: Path):
    write_logs(tmp_path / "logs", spread_over_time(oasst_calls(write_data(tmp_path)), seed=0))
    for record in records_of(tmp_path / "logs" / f"{OASST}.jsonl"):
        assert record.answer is None
        judge(record, DataConfig(target_aliases=[MODEL]))
        assert record.on_policy_reason == "no_answer"


def test_time_is_shared_out_by_calls_and_sessions_stay_together():
    calls = [
        Call(tenant="t", session=f"s{n // 3}", messages=[{"role": "user", "content": str(n)}])
        for n in range(90)
    ]
    placed = spread_over_time(calls, seed=0)
    assert placed == spread_over_time(calls, seed=0) != spread_over_time(calls, seed=1)
    sessions = [call.session for call in placed]
    assert sum(a != b for a, b in pairwise(sessions)) == 29
    moments = [float(call.created or 0) for call in placed]
    cuts = time_cuts(moments, DataConfig(test_share=0.3, validation_share=0.1))
    assert cuts is not None
    windows = [cuts.window(moment) for moment in moments]
    assert abs(windows.count("test") - 27) <= 1
    assert abs(windows.count("validation") - 9) <= 1


def test_a_log_is_in_order_of_time_and_every_call_has_a_name_of_its_own(tmp_path: Path):
    calls = spread_over_time(oasst_calls(write_data(tmp_path)), seed=3)
    write_logs(tmp_path / "logs", reversed(calls))
    records = records_of(tmp_path / "logs" / f"{OASST}.jsonl")
    moments = [instant(record) for record in records]
    assert moments == sorted(moments, key=lambda moment: moment or 0.0)
    assert len({record.id for record in records}) == len(records)
