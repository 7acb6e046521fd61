from typing import Any

import orjson
import pytest

from dflash_data.adapters.log_format import Line
from dflash_data.adapters.weave import FORMAT
from dflash_data.drops import Drop
from dflash_train.records.conversation import Conversation, Turn

USER: dict[str, Any] = {"role": "user", "content": "Who approves refunds?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "Your shift lead does."}
CHAT = "weave:///acme/desk/op/openai.chat.completions.create:1f9"


def weave_call(call_id: str = "w-5", **changes: Any) -> dict[str, Any]:
    return {
        "id": call_id,
        "project_id": "acme/desk",
        "op_name": CHAT,
        "trace_id": "t-2",
        "parent_id": None,
        "started_at": "2026-10-14T08:44:00Z",
        "ended_at": "2026-10-14T08:44:01Z",
        "exception": None,
        "inputs": {"model": "support-small", "messages": [USER], "temperature": 0.2},
        "output": {"choices": [{"message": ANSWER, "finish_reason": "stop"}]},
        "summary": {"usage": {"support-small": {"prompt_tokens": 9, "output_tokens": 5}}},
    } | changes


def read(*lines: Any) -> list[Any]:
    return list(FORMAT.read(Line(f"log:{n}", orjson.dumps(line)) for n, line in enumerate(lines)))


def only(line: Any) -> Conversation:
    (call,) = read(line)
    assert isinstance(call, Conversation), call
    return call


def kinds(*lines: Any) -> list[str]:
    return [call.reason.value if isinstance(call, Drop) else "kept" for call in read(*lines)]


def test_documented_call_maps_every_field():
    call = only(weave_call())
    assert call.messages == [Turn(**USER), Turn(**ANSWER)]
    assert (call.source, call.source_ref, call.model) == ("weave", "w-5", "support-small")
    assert (call.ts, call.finish_reason) == ("2026-10-14T08:44:00Z", "stop")
    assert call.sampling == {"temperature": 0.2}
    assert call.usage == {"prompt_tokens": 9, "completion_tokens": 5}


def test_camel_case_and_json_in_strings_read_the_same():
    line = weave_call()
    line |= {"opName": line.pop("op_name"), "startedAt": line.pop("started_at")}
    for key in ("inputs", "output", "summary"):
        line[key] = orjson.dumps(line[key]).decode()
    assert only(line) == only(weave_call())


@pytest.mark.parametrize("name", ["litellm.acompletion", "mistralai.chat.complete:ab1", CHAT])
def test_operations_that_end_in_a_chat_completion_are_calls(name: str):
    assert kinds(weave_call(op_name=f".../op/{name}")) == ["kept"]


@pytest.mark.parametrize("name", ["desk.answer:3", "openai.embeddings.create:1", "completions"])
def test_other_operations_are_no_calls(name: str):
    assert read(weave_call(op_name=f".../op/{name}")) == []


def test_nested_call_that_repeats_a_completion_is_a_duplicate():
    outer = weave_call(op_name=".../op/litellm.completion:2")
    assert kinds(outer, weave_call("w-6", parent_id="w-5")) == ["kept", "duplicate"]


def test_same_completion_in_another_trace_or_with_another_id_is_kept():
    other_trace = weave_call("w-6", trace_id="t-3")
    assert kinds(weave_call(), other_trace) == ["kept", "kept"]
    first, second = (
        weave_call(name, output={"id": name, **weave_call()["output"]}) for name in ("a", "b")
    )
    assert kinds(first, second) == ["kept", "kept"]
    assert kinds(first, first) == ["kept", "duplicate"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"exception": "Timeout"}, "not_success"),
        ({"op_name": None}, "unparsable"),
        ({"inputs": {}}, "content_missing"),
        ({"output": {"choices": [{"delta": {}}]}}, "stream_fragment"),
    ],
)
def test_unusable_call_is_dropped_for_its_reason(changes: dict[str, Any], reason: str):
    assert kinds(weave_call(**changes)) == [reason]


def test_call_without_output_is_kept_for_regeneration():
    assert only(weave_call(output=None)).on_policy_reason == "no_answer"


def test_only_calls_are_recognised():
    assert FORMAT.recognises(weave_call())
    assert not FORMAT.recognises({"inputs": {"messages": [USER]}})
