import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import orjson
import pytest

from dflash_data.adapters.log_format import Line
from dflash_data.adapters.openai_batch import FORMAT
from dflash_data.drops import Call, Drop
from dflash_data.logs.sources import plan_parts, read_part
from dflash_train.records.conversation import Conversation, Turn


def request(custom_id: str, question: str = "Is the trial still open?", **more: Any) -> dict:
    body = {"model": "small", "messages": [{"role": "user", "content": question}], **more}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def output(custom_id: str, text: str = "Yes, until Friday.", **more: Any) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    body = {"model": "small-0926", "created": 1792000800, "choices": [choice]}
    response = {"status_code": 200, "request_id": "rq-9", "body": body}
    return {
        "id": f"batch_{custom_id}", "custom_id": custom_id, "response": response, "error": None,
    } | more  # fmt: skip


def failure(custom_id: str) -> dict:
    return output(custom_id, response=None, error={"code": "batch_expired", "message": "late"})


def write(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def read(*rows: dict) -> list[Call]:
    return list(FORMAT.read(Line(f"all:{i}", orjson.dumps(row)) for i, row in enumerate(rows)))


def read_folder(folder: Path) -> list[Call]:
    return [call for part in plan_parts(str(folder)) for call in read_part(part)]


def told(calls: list[Call]) -> list[tuple[str | None, ...] | str]:
    """Give the texts of each conversation, or the reason of its drop."""
    return [
        call.reason.value if isinstance(call, Drop) else tuple(t.content for t in call.messages)
        for call in calls
    ]


@pytest.mark.parametrize("rows", [(0, 1), (1, 0)], ids=["request first", "answer first"])
def test_pair_is_joined_on_its_id_in_any_order(rows: tuple[int, int]):
    sides = (request("row-17", temperature=0.2, user="acme"), output("row-17"))
    (call,) = read(*(sides[row] for row in rows))
    assert isinstance(call, Conversation)
    assert call.messages == [
        Turn(role="user", content="Is the trial still open?"),
        Turn(role="assistant", content="Yes, until Friday."),
    ]
    assert (call.source, call.source_ref) == ("openai_batch", "batch_row-17")
    assert (call.model, call.ts, call.tenant) == ("small-0926", "2026-10-14T18:00:00Z", "acme")
    assert (call.sampling, call.on_policy_reason) == ({"temperature": 0.2}, "other_model")


def test_sides_without_partner_are_no_answer_and_content_missing():
    calls = read(request("row-1"), output("row-2"), failure("row-3"))
    assert told(calls) == [("Is the trial still open?",), "content_missing", "not_success"]
    assert isinstance(calls[0], Conversation)
    assert calls[0].on_policy_reason == "no_answer"


def test_failed_answer_drops_its_request():
    assert told(read(request("row-1"), failure("row-1"))) == ["not_success"]
    assert told(read(failure("row-1"), request("row-1"))) == ["not_success"]
    late = output("row-1", response={"status_code": 500, "body": {}})
    assert told(read(request("row-1"), late)) == ["not_success"]


def test_id_of_two_waiting_requests_never_gets_an_answer():
    rows = (request("row-1", "A?"), request("row-1", "B?"), output("row-1", "To A."))
    assert told(read(*rows, request("row-2", "C?"), output("row-2", "To C."))) == [
        "content_missing", ("C?", "To C."), "content_missing", "content_missing",
    ]  # fmt: skip


def test_one_file_may_hold_batches_with_the_same_ids_after_each_other():
    rows = (request("1", "A?"), output("1", "To A."), request("1", "B?"), output("1", "To B."))
    assert told(read(*rows)) == [("A?", "To A."), ("B?", "To B.")]


def test_broken_lines_are_drops():
    rows = [{"body": {}}, {"custom_id": None, "response": {}}]
    assert told(read(*rows)) == ["unparsable", "unparsable"]
    assert told(list(FORMAT.read([Line("all:1", b'{"custom_id": "r')]))) == ["unparsable"]
    assert told(read({"custom_id": "1", "body": "no json"}, output("1"))) == ["unparsable"]


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_files_of_a_folder_are_joined_whatever_their_names(tmp_path: Path, packing: str):
    num_calls = 50
    write(
        tmp_path / f"z_input.jsonl{packing}",
        *(request(f"row-{i}", f"Is {i} odd?") for i in range(num_calls)),
    )
    write(tmp_path / "a_errors.jsonl", failure("row-7"))
    write(
        tmp_path / f"b_output.jsonl{packing}",
        *(output(f"row-{i}", f"On {i}.") for i in reversed(range(num_calls)) if i not in (7, 8)),
    )
    (part,) = plan_parts(str(tmp_path))
    calls = told(list(read_part(part)))
    expected = [(f"Is {i} odd?", f"On {i}.") for i in range(num_calls) if i not in (7, 8)]
    assert sorted(map(str, calls)) == sorted(map(str, [*expected, "not_success", ("Is 8 odd?",)]))


def test_folders_that_hold_both_sides_are_parts_and_may_repeat_ids(tmp_path: Path):
    for batch in ("one", "two"):
        write(tmp_path / batch / "input.jsonl", request("row-1", f"Is it {batch}?"))
        write(tmp_path / batch / "output.jsonl", output("row-1", f"It is {batch}."))
    assert len(plan_parts(str(tmp_path))) == 2
    assert told(read_folder(tmp_path)) == [
        ("Is it one?", "It is one."), ("Is it two?", "It is two."),
    ]  # fmt: skip


def test_inputs_and_outputs_in_folders_of_their_own_are_joined(tmp_path: Path):
    write(tmp_path / "answers/1.jsonl", output("row-1"), output("row-2"))
    write(tmp_path / "questions/1.jsonl", request("row-2"), request("row-1"))
    assert told(read_folder(tmp_path)) == [("Is the trial still open?", "Yes, until Friday.")] * 2


def test_byte_order_mark_of_an_input_costs_nothing(tmp_path: Path):
    write(tmp_path / "input.jsonl", request("row-1"))
    path = tmp_path / "input.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    write(tmp_path / "output.jsonl", output("row-1"))
    assert len(told(read_folder(tmp_path))[0]) == 2


def test_waiting_requests_of_a_plain_file_take_little_memory(tmp_path: Path):
    num_calls, long_question = 3000, "Why? " * 800
    rows = [request(f"row-{i}", long_question) for i in range(num_calls)]
    write(tmp_path / "input.jsonl", *rows)
    write(tmp_path / "output.jsonl", output("row-none"))
    (part,) = plan_parts(str(tmp_path))
    calls = read_part(part)
    tracemalloc.start()
    next(calls)  # given only when every request has been put aside
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    chunk_bytes = 2.5e6  # a chunk of the file and its lines
    assert used < num_calls * 200 + chunk_bytes
    assert num_calls * 200 + chunk_bytes < sum(len(orjson.dumps(row)) for row in rows) / 3
