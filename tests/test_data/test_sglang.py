from typing import Any

import orjson
import pytest

from dflash_data.adapters.log_format import Line
from dflash_data.adapters.sglang import FORMAT
from dflash_data.drops import Drop
from dflash_train.records.conversation import Conversation, Turn

OUTPUT_IDS = [33, 347, 216, 36, 314, 1989, 30, 2]


def event(
    request: dict[str, Any] | None = None,
    answer: dict[str, Any] | None = None,
    meta: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    meta = {
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": 11,
        "completion_tokens": 8,
        "spec_accept_length": 2.4,
    } | (meta or {})
    request = {
        "text": None,
        "input_ids": [1, 4093, 198],
        "sampling_params": {"temperature": 0.2, "max_new_tokens": 64},
    } | (request or {})
    answer = {"text": "Bay 4 is free.", "output_ids": OUTPUT_IDS, "meta_info": meta} | (
        answer or {}
    )
    return {
        "timestamp": "2026-10-14T08:43:20",
        "event": "request.finished",
        "rid": "q-77",
        "obj": request,
        "out": answer,
    } | changes


def read(*lines: Any) -> list[Any]:
    return list(FORMAT.read(Line(f"log:{n}", orjson.dumps(line)) for n, line in enumerate(lines)))


def only(line: Any) -> Conversation:
    (call,) = read(line)
    assert isinstance(call, Conversation), call
    return call


def test_documented_event_maps_every_field():
    call = only(event())
    assert call.messages == [
        Turn(role="user", content=""),
        Turn(role="assistant", content="Bay 4 is free."),
    ]
    assert (call.prompt_token_ids, call.output_token_ids) == ([1, 4093, 198], OUTPUT_IDS)
    assert (call.source, call.source_ref, call.ts) == ("sglang", "q-77", "2026-10-14T08:43:20Z")
    assert call.sampling == {"temperature": 0.2, "max_tokens": 64}
    assert call.usage == {"prompt_tokens": 11, "completion_tokens": 8}
    assert (call.finish_reason, call.served_acceptance_length) == ("stop", 2.4)
    assert (call.model, call.on_policy_reason) == (None, "other_model")


def test_logged_prompt_is_one_raw_user_message():
    prompt = "<|im_start|>user\nIs bay 4 free?<|im_end|>\n<|im_start|>assistant\n"
    call = only(event({"text": prompt, "input_ids": None}))
    assert call.prompt == [Turn(role="user", content=prompt)]
    assert call.has_rendered_prompt
    assert only(event()).has_rendered_prompt
    assert (call.prompt_token_ids, call.output_token_ids) == (None, None)


def test_adapter_and_constraints_of_the_request_are_kept():
    parameters = {"json_schema": "{}", "temperature": 0}
    call = only(event({"lora_path": "desk-v2", "sampling_params": parameters}))
    assert call.adapter == "desk-v2"
    assert call.sampling["response_format"] == {"type": "json_schema"}


def test_other_events_and_other_output_of_the_server_are_no_calls():
    noise = Line("log:1", b"[2026-10-14 08:43:20] Decode batch, #running-req: 3")
    assert read(event(event="request.received")) == []
    assert list(FORMAT.read([noise])) == []


LONG = "x" * 1024 + "..." + "y" * 1024


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (event(answer={"text": LONG}), "truncated_log"),
        (event({"text": LONG}), "truncated_log"),
        (event({"input_ids": [1, "...", 2]}), "truncated_log"),
        (event({"input_ids": None}), "content_missing"),
        (event(answer={"text": None, "output_ids": None}), "content_missing"),
        (event({"text": "Hi"}, {"text": "", "output_ids": []}), "empty_output"),
        (event(meta={"finish_reason": {"type": "abort"}}), "not_success"),
        (event({"input_ids": [1, -2]}), "unparsable"),
        (event({"input_ids": [1, 2.0]}), "unparsable"),
        (event({"text": ["a", "b"]}), "unparsable"),
        (event(event=None), "unparsable"),
    ],
)
def test_unusable_event_is_dropped_for_its_reason(line: dict[str, Any], reason: str):
    (call,) = read(line)
    assert isinstance(call, Drop)
    assert call.reason.value == reason


def test_only_events_are_recognised():
    assert FORMAT.recognises(event(event="request.received"))
    assert not FORMAT.recognises({"event": "request.finished"})
