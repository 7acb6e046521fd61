"""Random values in random places of a good sample of each format: a record or a drop, always."""

import copy
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_data.adapters import FORMATS
from dflash_data.adapters.log_format import Line
from dflash_data.drops import Drop
from dflash_train.records.conversation import Conversation

USER = {"role": "user", "content": "Is bay 4 free?"}
ASKED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "function": {"name": "find", "arguments": "{}"}}],
}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "row 2"}
MESSAGES = [USER, ASKED, RESULT]
ANSWER = {"role": "assistant", "content": "Bay 4 is free.", "reasoning_content": "Look."}
REQUEST = {"model": "small", "messages": MESSAGES, "temperature": 0.2, "stop": ["x"], "user": "u"}
RESPONSE = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": ANSWER, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}},
}
PARTS = [{"role": "user", "parts": [{"type": "text", "content": "Is bay 4 free?"}]}]
OUTPUT = [{"role": "assistant", "parts": [{"type": "text", "content": "Yes."}]}]
SAMPLES: dict[str, list[dict[str, Any]]] = {
    "openai": [{"id": "1", "request": REQUEST, "response": RESPONSE, "created": 1792000800}],
    "litellm": [
        {
            "id": "1",
            "trace_id": "t",
            "call_type": "acompletion",
            "status": "success",
            "cache_hit": False,
            "startTime": 1792000801.2,
            "messages": MESSAGES,
            "response": RESPONSE,
            "model_parameters": {"temperature": 0.2, "extra_body": {"top_k": 2}},
            "metadata": {"user_api_key_team_id": "w"},
            "guardrail_information": [{"guardrail_status": "success"}],
        }
    ],
    "langfuse": [
        {
            "id": "1",
            "trace_id": "t",
            "type": "GENERATION",
            "start_time": "2026-10-14 08:41:10.000000",
            "model_parameters": '{"temperature":0.3}',
            "input": {"messages": MESSAGES},
            "output": ANSWER,
            "usage_details": {"input": 14},
        }
    ],
    "helicone": [
        {
            "request_id": "1",
            "request_created_at": "2026-10-14T08:42:00Z",
            "request_properties": {"Helicone-Session-Id": "s"},
            "request_body": REQUEST,
            "response_body": RESPONSE,
            "response_status": 200,
        }
    ],
    "sglang": [
        {
            "timestamp": "2026-10-14T08:43:20",
            "event": "request.finished",
            "rid": "q",
            "obj": {"text": "Hi", "input_ids": [1, 2], "sampling_params": {"temperature": 0.2}},
            "out": {
                "text": "Yes.",
                "output_ids": [3, 4],
                "meta_info": {"finish_reason": {"type": "stop"}, "spec_accept_length": 2.4},
            },
        }
    ],
    "weave": [
        {
            "id": "1",
            "op_name": ".../op/openai.chat.completions.create:1f9",
            "trace_id": "t",
            "started_at": "2026-10-14T08:44:00Z",
            "inputs": REQUEST,
            "output": RESPONSE,
            "summary": {"usage": {"small": {"prompt_tokens": 3}}},
        }
    ],
    "opentelemetry": [
        {
            "traceId": "0a",
            "spanId": "b9",
            "startTimeUnixNano": "1792000900000000000",
            "status": {"code": 0},
            "attributes": {
                "gen_ai.operation.name": "chat",
                "gen_ai.request.temperature": 0.2,
                "gen_ai.tool.definitions": [{"name": "find"}],
                "gen_ai.system_instructions": [{"type": "text", "content": "Hi"}],
                "gen_ai.input.messages": PARTS,
                "gen_ai.output.messages": OUTPUT,
            },
        },
        {
            "traceId": "0a",
            "spanId": "b9",
            "attributes": [
                {"key": "openinference.span.kind", "value": {"stringValue": "LLM"}},
                {
                    "key": "llm.input_messages.0.message.role",
                    "value": {"stringValue": "user"},
                },
                {
                    "key": "llm.input_messages.0.message.content",
                    "value": {"stringValue": "Hi"},
                },
            ],
            "events": [
                {
                    "name": "gen_ai.choice",
                    "attributes": {"message": {"content": "Yes."}, "finish_reason": "stop"},
                }
            ],
        },
    ],
    "sharegpt": [
        {
            "id": "1",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}],
        },
        {"messages": [*MESSAGES, ANSWER]},
    ],
}
KIND_KEYS = ("type", "event", "op_name", "gen_ai.operation.name", "openinference.span.kind", "key")
"""Whether a line is a call at all hangs on these; they are fuzzed with the rest of the bytes."""

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(
        ["user", "assistant", "tool", "stop", "text", "{}", "[]", '{"a":1}', "9" * 30]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "name", "id", "value", "messages"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


def places(value: Any) -> list[list[Any]]:
    """All paths of a JSON value, its own empty path excepted."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found: list[list[Any]] = []
    for key, one in inner:
        if isinstance(key, str) and key in KIND_KEYS:
            continue
        found.append([key])
        if isinstance(one, (dict, list)):
            found += [[key, *rest] for rest in places(one)]
    return found


def with_value(sample: Any, path: list[Any], value: Any) -> Any:
    changed = copy.deepcopy(sample)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return changed


def check(name: str, lines: list[bytes], *, at_least: int) -> None:
    calls = list(FORMATS[name].read(Line(f"log:{n}", text) for n, text in enumerate(lines)))
    assert len(calls) >= at_least
    for call in calls:
        if isinstance(call, Conversation):
            assert Conversation.from_json(call.to_json()) == call
            assert call.messages
        else:
            assert isinstance(call, Drop)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_samples_are_of_their_format_and_kept(name: str):
    for sample in SAMPLES[name]:
        assert next(form.name for form in FORMATS.values() if form.recognises(sample)) == name
        (call, *_) = FORMATS[name].read([Line("log:1", orjson.dumps(sample))])
        assert isinstance(call, Conversation)


@pytest.mark.parametrize("name", sorted(SAMPLES))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_values_in_any_places_give_writable_records_or_drops(name: str, data: st.DataObject):
    sample = data.draw(st.sampled_from(SAMPLES[name]))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(sample)))
        sample = with_value(sample, path, data.draw(JSON))
    # A span that lost the attributes of a call is none.
    check(name, [orjson.dumps(sample)], at_least=0 if name == "opentelemetry" else 1)


@pytest.mark.parametrize("name", sorted(SAMPLES))
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_bytes_in_any_places_give_writable_records_or_drops(name: str, data: st.DataObject):
    text = bytearray(orjson.dumps(data.draw(st.sampled_from(SAMPLES[name]))))
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    check(name, [bytes(text[: data.draw(st.integers(1, len(text)))])], at_least=0)


VLLM_LINES = [
    b"INFO 10-14 08:43:20 [logger.py:43] Received request c-1: prompt: 'Hi\\n', params: "
    b"SamplingParams(n=1, temperature=0.2, stop=['\\n'], max_tokens=6), prompt_token_ids: [1, 2], "
    b"prompt_embeds shape: None, lora_request: None.",
    b'DEBUG Request chatcmpl-2 JSON body: {"messages":[{"role":"user","content":"Hi"}]}',
    b"DEBUG Request chatcmpl-2 details: prompt: 'Hi', prompt_token_ids: [1], x: None.",
    b"INFO Generated response c-1: output: 'Yes.', output_token_ids: (3, 4), finish_reason: stop",
    b"DEBUG Generated response chatcmpl-2 details: output_token_ids: [7]",
    b"INFO Generated response chatcmpl-2: output: '[tool_calls: f({})]', finish_reason: tool_calls",
]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_bytes_and_order_of_text_lines_give_writable_records_or_drops(data: st.DataObject):
    lines = [bytearray(line) for line in data.draw(st.permutations(VLLM_LINES))]
    for _ in range(data.draw(st.integers(0, 4))):
        line = lines[data.draw(st.integers(0, len(lines) - 1))]
        line[data.draw(st.integers(60, len(line) - 1))] = data.draw(st.integers(0, 255))
    check("vllm_log", [bytes(line) for line in lines], at_least=2)


@pytest.mark.parametrize("name", sorted(SAMPLES))
@pytest.mark.parametrize("depth", [90, 200, 900])
def test_deep_nesting_anywhere_gives_writable_records_or_drops(name: str, depth: int):
    opening, closing = b'{"arrayValue":{"values":[{"extra_body":', b"}]}}"
    deep = b"[" * depth + b"]" * depth, opening * (depth // 4) + b"1" + closing * (depth // 4)
    for sample in SAMPLES[name]:
        for path in places(sample):
            line = orjson.dumps(with_value(sample, path, "@"))
            check(name, [line.replace(b'"@"', value) for value in deep], at_least=0)


def test_every_format_is_fuzzed():
    assert {*SAMPLES, "vllm_log"} >= set(FORMATS) - {"openai_batch"}  # joined files: its own test
