from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_data.adapters.log_format import Line
from dflash_data.adapters.openai import FORMAT
from dflash_data.drops import Call, Drop
from dflash_train.records.conversation import Conversation, Turn

USER = {"role": "user", "content": "Where is bay 4?"}


def answer(
    content: str | None = "Left of bay 3.", finish_reason: str | None = "stop", **more: Any
) -> dict:
    message = {"role": "assistant", "content": content}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason, **more}]}


def line(messages: Any = (USER,), response: Any = None, **envelope: Any) -> bytes:
    request = {"model": "small", "messages": messages, "user": "acme"}
    return orjson.dumps({"id": "r-1", "request": request, "response": response, **envelope})


def adapt(text: bytes, place: str) -> list[Call]:
    return list(FORMAT.read([Line(place, text)]))


def only(text: bytes) -> Conversation:
    (call,) = adapt(text, "log:1")
    assert isinstance(call, Conversation), call
    return call


def reasons(text: bytes) -> list[str]:
    return [call.reason.value for call in adapt(text, "log:1") if isinstance(call, Drop)]


def test_documented_pair_maps_every_field():
    pair = {
        "request": {
            "model": "support-small",
            "messages": [{"role": "system", "content": "One sentence only."}, USER],
            "temperature": 0.3,
            "max_completion_tokens": 64,
            "user": "acme",
        },
        "response": {
            "id": "chatcmpl-7a",
            "created": 1792000800,
            "model": "support-small-0926",
            **answer(),
            "usage": {"prompt_tokens": 29, "completion_tokens": 9, "total_tokens": 38},
        },
    }
    call = only(orjson.dumps(pair))
    assert [turn.role for turn in call.messages] == ["system", "user", "assistant"]
    assert call.answer == Turn(role="assistant", content="Left of bay 3.")
    assert (call.ts, call.model) == ("2026-10-14T18:00:00Z", "support-small-0926")
    assert (call.tenant, call.source_ref, call.session) == ("acme", "chatcmpl-7a", None)
    assert call.sampling == {"temperature": 0.3, "max_tokens": 64}
    assert call.usage == {"prompt_tokens": 29, "completion_tokens": 9}
    assert (call.finish_reason, call.on_policy) == ("stop", False)
    assert call.on_policy_reason == "other_model"


def test_camel_case_and_json_in_strings_read_the_same():
    snake = {
        "request_id": "r-1",
        "created_at": "2026-10-14T08:40:00+02:00",
        "request": {"messages": [USER], "top_p": 0.9, "metadata": {"session_id": "s"}},
        "response": {**answer(), "usage": {"prompt_tokens": 3}},
    }
    camel = {
        "requestId": "r-1",
        "createdAt": 1791960000000,
        "request": orjson.dumps(
            {"messages": orjson.dumps([USER]).decode(), "topP": 0.9, "metadata": {"sessionId": "s"}}
        ).decode(),
        "response": orjson.dumps(
            {
                "choices": [{"message": answer()["choices"][0]["message"], "finishReason": "stop"}],
                "usage": {"promptTokens": 3},
            }
        ).decode(),
    }
    assert only(orjson.dumps(snake)) == only(orjson.dumps(camel))
    assert only(orjson.dumps(snake)).ts == "2026-10-14T06:40:00Z"


@pytest.mark.parametrize("response", [None, {}, {"choices": None}, {"choices": []}])
def test_request_without_answer_is_kept_for_regeneration(response: Any):
    call = only(line(response=response))
    assert call.answer is None
    assert (call.on_policy, call.on_policy_reason) == (False, "no_answer")


def test_unlogged_answers_of_the_history_stay_as_places_to_fill():
    history = [USER, {"role": "assistant", "content": None}, {"role": "user", "content": "And 5?"}]
    call = only(line(history))
    assert call.turn == 1
    assert call.messages[1] == Turn(role="assistant", content=None)


def test_id_depends_on_request_and_turn_and_on_nothing_else():
    history = [USER, {"role": "assistant", "content": "Left."}, USER]
    assert only(line()).id == only(line(response=answer())).id
    assert only(line()).id != only(line(history)).id
    assert only(line()).id != only(line(id="r-2")).id
    assert only(line(id=None)).id != adapt(line(id=None), "log:2")[0].id  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"request": {"mess', "unparsable"),
        (b"[1, 2]", "unparsable"),
        (b"\xff\xfe{}", "unparsable"),
        (b'{"a":' * 1100 + b"1" + b"}" * 1100, "unparsable"),
        (line("no json"), "unparsable"),
        (line({"role": "user"}), "unparsable"),
        (b"{}", "content_missing"),
        (line([]), "content_missing"),
        (line([{"role": "user", "content": None}]), "content_missing"),
        (line([{"role": "system", "content": "Be brief."}]), "content_missing"),
        (line([{"role": "narrator", "content": "x"}]), "unknown_role"),
        (line([{"role": "user", "content": [{"type": "image_url"}]}]), "non_text"),
        (line([USER, {"role": "tool", "content": "3"}]), "bad_tool_order"),
        (line([USER, {"role": "assistant", "content": "Left"}]), "unstable_boundary"),
        (line(status=429), "not_success"),
        (line(status="error"), "not_success"),
        (line(error={"type": "overloaded"}), "not_success"),
        (line(response={"status_code": 500, "body": answer()}), "not_success"),
        (line(response=answer(finish_reason="abort")), "not_success"),
        (line(response=answer(finish_reason="content_filter")), "content_filter"),
        (line(response=answer(content="")), "empty_output"),
        (line(response=answer(index=1)), "extra_choice"),
        (line(response={"object": "chat.completion.chunk"}), "stream_fragment"),
    ],
)
def test_unusable_line_is_dropped_for_its_reason(text: bytes, reason: str):
    assert reasons(text) == [reason]


def test_further_choices_are_dropped_beside_the_first():
    response = {"choices": [*answer(index=1)["choices"], *answer("First.")["choices"]]}
    calls = adapt(line(response=response), "log:1")
    assert isinstance(calls[0], Conversation)
    assert calls[0].messages[-1].content == "First."
    assert reasons(line(response=response)) == ["extra_choice"]


def test_tool_calls_and_results_keep_their_order_and_arguments():
    asked = {"id": "c", "function": {"name": "find", "arguments": {"bay": 4}}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": "c", "content": "row 2"},
    ]
    call = only(line(messages))
    assert call.messages[1].tool_calls == [{"id": "c", "name": "find", "arguments": '{"bay":4}'}]
    assert call.messages[2].tool_call_id == "c"


def completion(prompt: Any = "Bay 4 is", **choice: Any) -> bytes:
    choice = {"index": 0, "text": " free.", "finish_reason": "stop", **choice}
    pair = {"request": {"prompt": prompt}, "response": {"id": "cmpl-3", "choices": [choice]}}
    return orjson.dumps(pair)


@pytest.mark.parametrize("prompt", ["Bay 4 is", ["Bay 4 is"]])
def test_legacy_completion_is_kept_with_its_token_ids(prompt: Any):
    call = only(completion(prompt, prompt_token_ids=[5, 6, 7], token_ids=[8, 2]))
    assert call.messages == [
        Turn(role="user", content="Bay 4 is"),
        Turn(role="assistant", content=" free."),
    ]
    assert (call.prompt_token_ids, call.output_token_ids) == ([5, 6, 7], [8, 2])
    assert (call.finish_reason, call.on_policy_reason) == ("stop", "other_model")
    assert call.has_rendered_prompt
    assert not only(line()).has_rendered_prompt


def test_ids_returned_with_a_chat_and_the_revision_that_answered_are_kept():
    response = answer()
    response["choices"][0]["token_ids"] = [8, 2]
    response["prompt_token_ids"] = [5, 6, 7]
    call = only(line(response=response, model_revision="r-9"))
    assert (call.prompt_token_ids, call.output_token_ids) == ([5, 6, 7], [8, 2])
    assert call.model_revision == "r-9"
    assert not call.has_rendered_prompt
    assert only(line()).model_revision is None
    response["prompt_token_ids"] = ["x"]
    assert reasons(line(response=response)) == ["unparsable"]


@pytest.mark.parametrize(
    "text",
    [
        completion(),
        completion(token_ids=[8, 2]),
        completion(prompt_token_ids=[5, 6, 7]),
        completion([5, 6, 7], prompt_token_ids=[5, 6, 7], token_ids=[8, 2]),
    ],
    ids=["no ids", "no prompt ids", "no output ids", "no prompt text"],
)
def test_legacy_completion_without_ids_or_text_lacks_its_content(text: bytes):
    assert reasons(text) == ["content_missing"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(
    "id created status error request response messages role content choices message index "
    "finish_reason usage tools tool_calls function name arguments user metadata object".split()
)
LOG_LIKE = st.recursive(
    JSON | st.sampled_from(["user", "assistant", "tool", "stop", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=25,
)


def check_result(text: bytes) -> None:
    calls = adapt(text, "log:1")
    assert calls
    for call in calls:
        if isinstance(call, Conversation):
            assert Conversation.from_json(call.to_json()) == call
        else:
            assert isinstance(call, Drop)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(LOG_LIKE)
def test_any_json_gives_writable_records_or_drops(value: Any):
    try:
        text = orjson.dumps(value)
    except TypeError:  # whole numbers beyond 64 bits
        return
    check_result(text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(LOG_LIKE, LOG_LIKE, LOG_LIKE)
def test_any_request_and_response_give_writable_records_or_drops(
    content: Any, response: Any, setting: Any
):
    message = {"role": "user", "content": content}
    request = {"messages": [USER, message], "tools": setting, "stop": setting, "user": setting}
    try:
        text = orjson.dumps({"request": request, "response": response, "created": setting})
    except TypeError:
        return
    check_result(text)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_any_flipped_bytes_give_writable_records_or_drops(data: st.DataObject):
    text = bytearray(line([USER], answer(), created=1792000800))
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    check_result(bytes(text[: data.draw(st.integers(1, len(text)))]))
