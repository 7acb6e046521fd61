import warnings
from collections.abc import Iterable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dflash_data.adapters import vllm_log
from dflash_data.adapters.log_format import Line
from dflash_data.adapters.vllm_log import FORMAT
from dflash_data.adapters.vllm_request import read_literal
from dflash_data.drops import Drop, UnusableError
from dflash_train.records.conversation import Conversation, Turn

PROMPT = "<|im_start|>user\nIs bay 4 free?<|im_end|>\n<|im_start|>assistant\n"
USER: dict[str, Any] = {"role": "user", "content": "Is bay 4 free?"}
TEXT = "Bay 4 is free."
OUTPUT_IDS = [33, 347, 216, 36, 314, 1989, 30, 2]
PARAMS = (
    "SamplingParams(n=1, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, "
    "temperature=0.2, top_p=0.9, top_k=0, min_p=0.0, seed=None, stop=['\\n', 'seed=7,'], "
    "max_tokens=64, structured_outputs=None)"
)


def received(name: str = "chatcmpl-c3", params: str = PARAMS, lora: str = "None") -> str:
    return f"INFO  Received request {name}: params: {params}, lora_request: {lora}."


def details(name: str = "chatcmpl-c3", prompt: str = PROMPT, ids: Any = (1, 4093, 198)) -> str:
    return (
        f"DEBUG Request {name} details: prompt: {prompt!r}, prompt_token_ids: {list(ids)}, "
        "prompt_embeds shape: None."
    )


def body(name: str = "chatcmpl-c3", **more: Any) -> str:
    request = {"model": "support-small", "messages": [USER], "user": "acme", **more}
    return f"DEBUG Request {name} JSON body: {orjson.dumps(request).decode()}"


def generated(name: str = "chatcmpl-c3", text: str = TEXT, reason: str = "stop") -> str:
    return f"INFO  Generated response {name}: output: {text!r}, finish_reason: {reason}"


def generated_ids(name: str = "chatcmpl-c3", ids: Any = OUTPUT_IDS) -> str:
    return f"DEBUG Generated response {name} details: output_token_ids: {ids}"


def old_request(name: str, prompt: str = PROMPT, ids: Any = (1, 4093)) -> str:
    return (
        f"INFO 10-14 08:43:20 [logger.py:43] Received request {name}: prompt: {prompt!r}, "
        f"params: {PARAMS}, prompt_token_ids: {list(ids)}, prompt_embeds shape: None, "
        "lora_request: None, prompt_adapter_request: None."
    )


def old_answer(name: str, text: str = TEXT, ids: Any = OUTPUT_IDS) -> str:
    return (
        f"INFO 10-14 08:43:22 [logger.py:71] Generated response {name}: output: {text!r}, "
        f"output_token_ids: {ids}, finish_reason: stop"
    )


def read(lines: Iterable[str]) -> list[Any]:
    return list(FORMAT.read(Line(f"log:{n}", line.encode()) for n, line in enumerate(lines)))


def only(*lines: str) -> Conversation:
    (call,) = read(lines)
    assert isinstance(call, Conversation), call
    return call


def kinds(*lines: str) -> list[str]:
    return [call.reason.value if isinstance(call, Drop) else "kept" for call in read(lines)]


REQUEST = (received(), details(), body(), generated(), generated_ids())


@given(st.text() | st.text("'\"\\/nu0\n\x00\x85"))
def test_any_text_comes_back_from_its_literal(text: str):
    assert read_literal(repr(text)) == text


def test_documented_lines_are_joined_into_one_call():
    call = only(*REQUEST)
    assert call.messages == [Turn(**USER), Turn(role="assistant", content=TEXT)]
    assert (call.prompt_token_ids, call.output_token_ids) == ([1, 4093, 198], OUTPUT_IDS)
    assert (call.source, call.model, call.tenant) == ("vllm_log", "support-small", "acme")
    assert (call.finish_reason, call.adapter, call.ts) == ("stop", None, None)
    assert call.sampling == {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 0.2,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "stop": ["\n", "seed=7,"],
        "max_tokens": 64,
    }


def test_order_of_lines_and_bare_id_of_the_body_make_no_difference():
    as_written = (body("c3"), details(), received(), generated_ids(), generated())
    assert only(*as_written) == only(*REQUEST)


def test_colours_processes_times_and_other_lines_are_passed_over():
    prefix = "2026-10-14T08:43:20.5Z stderr F \x1b[0;36m(APIServer pid=7)\x1b[0;0m \x1b[32m"
    noise = "INFO 10-14 08:43:21 [loggers.py:118] Engine 000: Running: 3 reqs"
    call = only(*(line for text in REQUEST for line in (prefix + text, noise)))
    assert call.ts == "2026-10-14T08:43:20.500000Z"
    assert call.messages == only(*REQUEST).messages


def test_interleaved_requests_are_kept_apart():
    names = ("chatcmpl-a", "chatcmpl-b")
    lines = [
        *(body(name, user=name) for name in names),
        *(details(name) for name in names),
        *(generated(name, text=f"For {name}.") for name in reversed(names)),
        *(generated_ids(name) for name in names),
    ]
    answers = {call.tenant: call.messages[-1].content for call in read(lines)}
    assert answers == {name: f"For {name}." for name in names}


def test_lines_up_to_version_0_12_hold_prompt_and_ids():
    call = only(old_request("cmpl-1"), old_answer("cmpl-1"))
    assert call.messages == [
        Turn(role="user", content=PROMPT),
        Turn(role="assistant", content=TEXT),
    ]
    assert (call.prompt_token_ids, call.output_token_ids) == ([1, 4093], OUTPUT_IDS)
    assert (call.sampling["temperature"], call.finish_reason) == (0.2, "stop")


@pytest.mark.parametrize("text", ['It\'s "4".', "line\n\ttab \\ end", "\u00e4\U0001f600\x00", "'"])
def test_texts_are_python_literals(text: str):
    assert only(body(), generated(text=text)).messages[-1].content == text


def test_escapes_that_python_does_not_know_stay_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_literal(r"'\d \/ \x41'") == r"\d \/ A"


@pytest.mark.parametrize("literal", [r"'\ud83d\ude00'", r"'\uD83D\uDE00'", r"'\ud83d'"])
def test_halves_of_a_character_are_not_joined_as_in_json(literal: str):
    with pytest.raises(UnusableError):
        read_literal(literal)


def test_code_in_place_of_a_literal_is_never_run():
    line = "INFO Generated response chatcmpl-c3: output: __import__('os'), finish_reason: stop"
    assert kinds(body(), line) == ["unparsable"]


def test_adapter_and_structured_output_are_kept():
    lora = "LoRARequest(lora_name='desk-v2', lora_int_id=1, lora_path='/x')"
    params = PARAMS.replace("outputs=None", "outputs=StructuredOutputsParams(json={})")
    call = only(received(params=params, lora=lora), body(), generated())
    assert call.adapter == "desk-v2"
    assert call.sampling["response_format"] == {"type": "structured_outputs"}


def test_streaming_deltas_are_skipped_and_the_complete_line_is_kept():
    delta = "INFO Generated response c3 (streaming delta): output: 'Bay', finish_reason: None"
    complete = (
        "INFO Generated response chatcmpl-c3 (streaming complete): output: 'Bay 4 is free.', "
        "finish_reason: streaming_complete"
    )
    call = only(body(), delta, delta, complete)
    assert (call.messages[-1].content, call.finish_reason) == (TEXT, None)
    unknown = complete.replace(TEXT, "<streaming_complete: 5 tokens>")
    assert only(body(), unknown).on_policy_reason == "no_answer"


def test_tool_calls_are_read_back_from_the_text():
    text = '[tool_calls: find({"bay": "4)"}), lights()]'
    answer = only(body(), generated(text=text, reason="tool_calls")).messages[-1]
    assert answer.tool_calls == [
        {"id": None, "name": "find", "arguments": '{"bay": "4)"}'},
        {"id": None, "name": "lights", "arguments": "{}"},
    ]


def test_request_without_answer_is_kept_if_its_messages_or_its_prompt_were_logged():
    assert only(received(), body()).on_policy_reason == "no_answer"
    call = only(received(), details())
    assert (call.messages, call.on_policy_reason) == (
        [Turn(role="user", content=PROMPT)], "no_answer",
    )  # fmt: skip
    assert (call.prompt_token_ids, call.output_token_ids) == (None, None)
    assert kinds(received()) == ["content_missing"]


def test_prompt_is_marked_as_rendered_where_no_messages_were_logged():
    assert not only(*REQUEST).has_rendered_prompt
    without_body = (received(), details(), generated())
    assert only(*without_body, generated_ids()).has_rendered_prompt
    call = only(*without_body)
    assert call.has_rendered_prompt
    assert call.messages == [
        Turn(role="user", content=PROMPT), Turn(role="assistant", content=TEXT)
    ]  # fmt: skip
    completion = f"DEBUG Request c3 JSON body: {orjson.dumps({'prompt': PROMPT}).decode()}"
    assert only(*without_body, completion).has_rendered_prompt


def test_further_choices_are_drops_beside_the_first():
    assert kinds(body(), generated(), generated(text="No.")) == ["kept", "extra_choice"]
    asked = (received(params=PARAMS.replace("n=1", "n=2")), details(), body())
    answered = (generated(), generated_ids(), generated(text="No."))
    assert kinds(*asked, *answered) == ["kept", "extra_choice"]


@pytest.mark.parametrize("answer", [REQUEST[3:], REQUEST[:2:-1]])
def test_request_goes_out_with_the_last_line_of_its_only_choice(answer: tuple[str, ...]):
    lines = iter([Line("log", line.encode()) for line in (*REQUEST[:3], *answer, *REQUEST)])
    assert isinstance(next(FORMAT.read(lines)), Conversation)
    assert len(list(lines)) == len(REQUEST)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ((received(), generated()), "content_missing"),
        ((generated(), generated_ids()), "content_missing"),
        ((body(), generated(reason="abort")), "not_success"),
        ((body(), "INFO Request chatcmpl-c3 aborted."), "not_success"),
        ((body(), generated(text="")), "empty_output"),
        ((body(), generated().replace("'", "", 1)), "unparsable"),
        ((details().replace("'", "", 1), generated()), "unparsable"),
        ((body(), generated(text="\ud800")), "unparsable"),
        ((body()[:-20], generated()), "truncated_log"),
        (("INFO non-default args: {'max_log_len': 14}", body(), generated()), "truncated_log"),
        (("args: max_log_len=8,", body(), details(), generated_ids()), "truncated_log"),
    ],
)
def test_unusable_request_is_dropped_for_its_reason(lines: tuple[str, ...], reason: str):
    assert kinds(*lines) == [reason]


def test_cut_body_tells_the_length_of_every_cut():
    cut = body("a").removeprefix("DEBUG Request a JSON body: ")[:40]
    lines = [f"DEBUG Request a JSON body: {cut}", body("b"), generated("b", text="x" * 40)]
    assert kinds(*lines) == ["kept", "truncated_log"]


def test_texts_of_one_greatest_length_that_end_differently_were_cut():
    cut = [old_request(name, PROMPT * 3 + "x" * 20 + name) for name in "abc"]
    lines = [
        line for text, name in zip(cut, "abc", strict=True) for line in (text, old_answer(name))
    ]
    assert kinds(*lines) == ["truncated_log"] * 3
    assert kinds(*lines[:4]) == ["kept"] * 2


def test_whole_prompts_of_one_length_are_not_taken_for_cut_ones():
    lines = [
        line
        for name in "abc"
        for line in (old_request(name, PROMPT.replace("4", name)), old_answer(name))
    ]
    assert kinds(*lines) == ["kept"] * 3


def test_longer_text_refutes_a_length_that_looked_like_the_cut():
    same = [old_request(name, "x" * 90 + name) for name in "ab"]
    longer = old_request("c", "x" * 200)
    answers = [old_answer(name) for name in "abc"]
    assert kinds(*same, longer, *answers) == ["kept"] * 3


def test_memory_is_bounded_when_no_request_ever_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_log, "MAX_OPEN", 3)
    lines = (Line("log", body(f"r{number}").encode()) for number in range(10))
    calls = FORMAT.read(lines)
    next(calls)
    assert next(lines).text == body("r4").encode()
    assert 1 + len(list(calls)) == 9


def test_only_lines_of_the_server_are_recognised():
    assert FORMAT.recognises_text is not None
    assert all(FORMAT.recognises_text(line.encode()) for line in REQUEST)
    assert not FORMAT.recognises_text(b"[2026-10-14 08:43:20] Decode batch, #running-req: 3")
