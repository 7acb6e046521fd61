import gzip
import pickle
from pathlib import Path

import pytest

from dflash_train.records.conversation import (
    Conversation,
    Privacy,
    Turn,
    read_shard,
    read_split,
    write_shard,
)


def conversations(count: int) -> list[Conversation]:
    return [
        Conversation(
            id=f"c{number}",
            source="test",
            messages=[
                Turn(role="user", content=f"question {number} \N{SNOWMAN}"),
                Turn(role="assistant", content=None, tool_calls=[{"id": "t", "type": "function"}]),
            ],
            sampling={"temperature": 0.0},
            privacy=Privacy(scrubbed=True, redactions={"email": 1}, spans=[(0, 1, 3, "email")]),
        )
        for number in range(count)
    ]


def test_a_shard_comes_back_as_it_was_and_has_reproducible_bytes(tmp_path: Path):
    records = conversations(5)
    for name in ("one", "two"):
        assert write_shard(tmp_path / name / "train-00000.jsonl.gz", records) == 5
    first, second = (tmp_path / name / "train-00000.jsonl.gz" for name in ("one", "two"))
    assert list(read_shard(first)) == records
    assert first.read_bytes() == second.read_bytes()


def test_a_split_is_read_in_the_order_of_its_shards(tmp_path: Path):
    records = conversations(4)
    write_shard(tmp_path / "train-00001.jsonl.gz", records[2:])
    write_shard(tmp_path / "train-00000.jsonl.gz", records[:2])
    write_shard(tmp_path / "test-00000.jsonl.gz", conversations(1))
    assert list(read_split(tmp_path, "train")) == records
    assert list(read_split(tmp_path, "validation")) == []


def test_prompt_and_answer_are_told_apart():
    (answered,) = conversations(1)
    assert answered.answer == answered.messages[-1]
    assert answered.prompt == answered.messages[:1]
    open_call = Conversation(id="o", source="test", messages=answered.messages[:1])
    assert open_call.answer is None
    assert open_call.prompt == answered.messages[:1]


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_shard_is_named_without_its_content(tmp_path: Path, damage: str):
    path = tmp_path / "train-00000.jsonl.gz"
    write_shard(path, conversations(50))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.write_bytes(gzip.compress(b'{"question": "secret"}\n'))
    with pytest.raises(ValueError, match=r"train-00000\.jsonl\.gz is damaged") as caught:
        list(read_shard(path))
    assert "secret" not in str(caught.value)


def test_spans_come_back_as_tuples_and_tool_calls_as_plain_objects():
    (record,) = conversations(1)
    again = Conversation.from_json(record.to_json())
    assert again == record == pickle.loads(pickle.dumps(record))
    assert type(again.privacy.spans[0]) is tuple
    assert type((again.messages[1].tool_calls or [])[0]) is dict


@pytest.mark.parametrize(
    "line",
    [
        b'{"id": "secret", "source": "s"}',
        b'{"id": 7, "source": "secret", "messages": []}',
        b'{"id": "1", "source": "s", "messages": [], "secret": 1}',
        b'{"id": "1", "source": "\xff secret", "messages": []}',
        b'{"id": "1", "source": "s", "messages": [], "sampling": {"secret": ' + b"[" * 100_000,
    ],
)
def test_a_foreign_line_is_refused_without_its_text(line: bytes):
    with pytest.raises(ValueError, match="conversation record could not be read") as caught:
        Conversation.from_json(line)
    assert "secret" not in str(caught.value)
