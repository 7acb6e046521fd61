from typing import Any

import orjson
import pytest

from dflash_data.adapters.helicone import FORMAT
from dflash_data.adapters.log_format import Line
from dflash_data.drops import Drop
from dflash_train.records.conversation import Conversation, Turn

USER: dict[str, Any] = {"role": "user", "content": "Reset my PIN?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "Press Forgot PIN on the keypad."}


def export(**changes: Any) -> dict[str, Any]:
    return {
        "request_id": "r-40",
        "request_created_at": "2026-10-14T08:42:00Z",
        "request_model": "support-small",
        "request_user_id": "u-12",
        "request_properties": {"app": "kiosk"},
        "request_body": {"model": "support-small", "messages": [USER], "top_p": 0.9},
        "response_body": {"choices": [{"message": ANSWER, "finish_reason": "stop"}]},
        "response_status": 200,
        "cache_enabled": False,
    } | changes


def read(*lines: Any) -> list[Any]:
    return list(FORMAT.read(Line(f"log:{n}", orjson.dumps(line)) for n, line in enumerate(lines)))


def only(line: Any) -> Conversation:
    (call,) = read(line)
    assert isinstance(call, Conversation), call
    return call


def test_documented_export_maps_every_field():
    call = only(export())
    assert call.messages == [Turn(**USER), Turn(**ANSWER)]
    assert (call.source, call.source_ref, call.model) == ("helicone", "r-40", "support-small")
    assert (call.tenant, call.session, call.ts) == ("u-12", None, "2026-10-14T08:42:00Z")
    assert (call.finish_reason, call.sampling) == ("stop", {"top_p": 0.9})


def test_model_that_answered_wins_over_the_model_that_was_asked():
    body = export()["response_body"] | {"model": "support-small-0926"}
    assert only(export(response_body=body)).model == "support-small-0926"


def test_camel_case_and_bodies_in_strings_read_the_same():
    camel = {
        "requestId": "r-40",
        "requestCreatedAt": "2026-10-14T10:42:00+02:00",
        "requestUserId": "u-12",
        "requestBody": orjson.dumps(export()["request_body"]).decode(),
        "responseBody": orjson.dumps(export()["response_body"]).decode(),
        "responseStatus": "200",
    }
    assert only(camel) == only(export())


def test_session_header_is_the_session():
    assert only(export(request_properties={"Helicone-Session-Id": "s-1"})).session == "s-1"


def test_enabled_cache_is_no_hit():
    reference = "00000000-0000-0000-0000-000000000000"
    assert only(export(cache_enabled=True, cache_reference_id=reference)).answer is not None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"response_status": 500}, "not_success"),
        ({"response_status": -1}, "not_success"),
        ({"response_status": 201}, "not_success"),
        ({"cache_hit": True}, "cache_hit"),
        ({"cache_reference_id": "5d6c"}, "cache_hit"),
        ({"request_body": {"helicone_message": "omitted"}}, "content_missing"),
        ({"response_body": {"streamed_data": []}}, "stream_fragment"),
        ({"response_body": {"error": {"code": 1}}}, "not_success"),
    ],
)
def test_unusable_export_is_dropped_for_its_reason(changes: dict[str, Any], reason: str):
    (call,) = read(export(**changes))
    assert isinstance(call, Drop)
    assert call.reason.value == reason


def test_only_exports_are_recognised():
    assert FORMAT.recognises(export())
    assert not FORMAT.recognises({"request_body": {"messages": [USER]}, "response_body": {}})
