from typing import Any

import orjson
import pytest

from dflash_data.adapters.langfuse import FORMAT
from dflash_data.adapters.log_format import Line
from dflash_data.drops import Drop
from dflash_train.records.conversation import Conversation, Turn

USER: dict[str, Any] = {"role": "user", "content": "Can I export to CSV?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "Yes, from the Reports tab."}


def text(value: Any) -> str:
    return orjson.dumps(value).decode()


def observation(**changes: Any) -> dict[str, Any]:
    return {
        "id": "ob-31",
        "trace_id": "tr-8",
        "type": "GENERATION",
        "name": "answer",
        "start_time": "2026-10-14 08:41:10.000000",
        "end_time": "2026-10-14 08:41:11.250000",
        "provided_model_name": "support-small",
        "model_parameters": '{"temperature":0.3}',
        "input": text([USER]),
        "output": text(ANSWER),
        "usage_details": {"input": 14, "output": 8},
        "level": "DEFAULT",
        "user_id": "u-7",
        "session_id": "s-19",
    } | changes


def read(*lines: Any) -> list[Any]:
    return list(FORMAT.read(Line(f"log:{n}", orjson.dumps(line)) for n, line in enumerate(lines)))


def only(line: Any) -> Conversation:
    (call,) = read(line)
    assert isinstance(call, Conversation), call
    return call


def test_documented_observation_maps_every_field():
    call = only(observation())
    assert call.messages == [Turn(**USER), Turn(**ANSWER)]
    assert (call.source, call.source_ref, call.model) == ("langfuse", "ob-31", "support-small")
    assert (call.session, call.tenant) == ("s-19", "u-7")
    assert call.ts == "2026-10-14T08:41:10Z"
    assert call.sampling == {"temperature": 0.3}
    assert call.usage == {"prompt_tokens": 14, "completion_tokens": 8}
    assert call.finish_reason is None


def test_interface_export_in_camel_case_reads_the_same():
    snake = observation()
    names = {
        "trace_id": "traceId",
        "start_time": "startTime",
        "provided_model_name": "model",
        "model_parameters": "modelParameters",
        "usage_details": "usage",
        "user_id": "userId",
        "session_id": "sessionId",
    }
    camel = {names.get(key, key): value for key, value in snake.items()}
    camel["usage"] = {"promptTokens": 14, "completionTokens": 8}
    assert only(camel) == only(snake)


@pytest.mark.parametrize(
    "request_",
    [[USER], text([USER]), {"messages": [USER]}, text({"messages": [USER]}), USER["content"]],
)
def test_input_has_several_shapes(request_: Any):
    assert only(observation(input=request_)).prompt == [Turn(**USER)]


@pytest.mark.parametrize(
    "output",
    [ANSWER, text(ANSWER), [ANSWER], ANSWER["content"], {"choices": [{"message": ANSWER}]}],
)
def test_output_has_several_shapes_and_no_finish_reason_is_assumed(output: Any):
    call = only(observation(output=output))
    assert (call.answer, call.finish_reason) == (Turn(**ANSWER), None)


@pytest.mark.parametrize("answer", ['{"port": 8443}', '{"name": "Ada", "role": "lead"}', "[1]"])
def test_answer_that_is_json_stays_the_text_it_was(answer: str):
    assert only(observation(output=answer)).messages[-1].content == answer


def test_other_observations_of_a_trace_are_no_calls():
    assert read(observation(type="SPAN"), observation(type="EVENT")) == []


def test_missing_output_is_kept_for_regeneration():
    assert only(observation(output=None)).on_policy_reason == "no_answer"


def test_further_outputs_are_drops_beside_the_first():
    kept, dropped = read(observation(output=[ANSWER, ANSWER]))
    assert isinstance(kept, Conversation)
    assert dropped.reason.value == "extra_choice"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"level": "ERROR"}, "not_success"),
        ({"type": None}, "unparsable"),
        ({"input": None}, "content_missing"),
        ({"input": {"question": "CSV?"}}, "content_missing"),
        ({"input": '[{"role":"user","content":"Can I'}, "unparsable"),
        ({"output": '{"role":"assistant","content":"Ye'}, "unparsable"),
        ({"output": ""}, "empty_output"),
        ({"output": 3}, "unparsable"),
        ({"input": [{"role": "narrator", "content": "x"}]}, "unknown_role"),
    ],
)
def test_unusable_generation_is_dropped_for_its_reason(changes: dict[str, Any], reason: str):
    (call,) = read(observation(**changes))
    assert isinstance(call, Drop)
    assert call.reason.value == reason


def test_only_observations_are_recognised():
    assert FORMAT.recognises(observation(type="SPAN"))
    assert not FORMAT.recognises({"traceId": "0af7", "spanId": "b9", "startTimeUnixNano": "1"})
