"""Request logs of all ten formats, invented from a seed, as large as you like.

Sessions of several turns, each call with its whole history behind a system prompt of its tenant:
about 4 KB a record. Some texts hold private values, some sessions open with the words of an
earlier one (one changed or none), and a few lines stand twice. Time runs over four weeks. Each
format has a folder with a file a day (larger steps in a small log), some gzip, some zstd.
Nothing is held but one session and a ring of earlier openings.
"""

import gzip
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast

import orjson

from dflash_data.logs.compression import zstd

NUM_DAYS = 28
FIRST_MOMENT = 1_792_000_000
MIN_FILE_RECORDS = 5_000
"""Of all formats together: what the files of one step hold at least."""
NUM_TENANTS = 40
MODEL = "support-small"
SETTINGS = {"temperature": 0.3, "top_p": 0.95, "max_tokens": 512}
REPEATED_LINE_SHARE = 0.005
REPEATED_OPENING_SHARE = 0.04
PRIVATE_SHARE = 0.08
REPEATING = ("openai", "litellm", "langfuse", "helicone", "sglang", "opentelemetry")
"""Formats whose lines may stand twice; elsewhere a line is not a call."""


@dataclass(frozen=True, kw_only=True)
class LoggedCall:
    """One call before it is written in the form of some format."""

    number: int
    session: str
    tenant: str
    moment: float
    messages: list[dict[str, str]]
    answer: str

    @property
    def time(self) -> str:
        """The start as RFC 3339."""
        return datetime.fromtimestamp(self.moment, UTC).isoformat()[:19] + "Z"

    @property
    def request(self) -> dict[str, Any]:
        """The body of an OpenAI request."""
        return {"model": MODEL, "messages": self.messages, "user": self.tenant, **SETTINGS}

    @property
    def response(self) -> dict[str, Any]:
        """The body of an OpenAI response."""
        message = {"role": "assistant", "content": self.answer}
        return {
            "id": f"chatcmpl-{self.number:x}",
            "object": "chat.completion",
            "created": int(self.moment),
            "model": MODEL,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 4 * self.num_words, "completion_tokens": 160},
        }

    @property
    def num_words(self) -> int:
        """Words of the prompt."""
        return sum(len(message["content"]) for message in self.messages) // 6


def write_corpus(folder: Path, num_records: int, *, seed: int = 1) -> int:
    """Write the logs below a folder and give their size before compression, in bytes.

    Args:
        folder: Gets one folder for each format.
        num_records: Calls that the adapters will find, repeated lines included.
        seed: Same seed, same logs.
    """
    rng = random.Random(seed)
    # A small log has larger steps: otherwise the cost of a task would hide that of a record.
    num_files = min(NUM_DAYS, 1 + num_records // MIN_FILE_RECORDS)
    num_bytes = num_written = 0
    day = -1
    with ExitStack() as stack:
        logs: dict[str, IO[bytes]] = {}
        for turns, name in _sessions(rng, num_records):
            while day < int(num_files * num_written / num_records):
                day += 1
                stack.close()
                logs = {log: stack.enter_context(_open(folder, log, day)) for log in LOGS}
            for log, lines in FORMATS[name](turns):
                content = b"".join(line + b"\n" for line in lines)
                logs[log].write(content)
                num_bytes += len(content)
            num_written += len(turns)
    return num_bytes


def _sessions(rng: random.Random, num_records: int) -> Iterator[tuple[list[LoggedCall], str]]:
    """Yield the calls of one session after another, and the format of their log."""
    words = _words(rng)
    systems = [_text(rng, words, 90) for _ in range(NUM_TENANTS)]
    openings: deque[str] = deque(maxlen=500)
    names = list(FORMATS)
    number = 0
    while number < num_records:
        name = names[rng.randrange(len(names))]
        tenant = rng.randrange(NUM_TENANTS)
        num_turns = min(rng.choice((1, 2, 3, 4, 6)), num_records - number)
        if openings and rng.random() < REPEATED_OPENING_SHARE:
            opening = _changed(rng, rng.choice(openings), words)
        else:
            opening = _user_text(rng, words)
        openings.append(opening)
        messages = [{"role": "system", "content": systems[tenant]}]
        calls: list[LoggedCall] = []
        for turn in range(num_turns):
            asked = _user_text(rng, words) if turn else opening
            messages = [*messages, {"role": "user", "content": asked}]
            answer = _text(rng, words, rng.randint(40, 130))
            call = LoggedCall(
                number=number,
                session=f"session-{number - turn:x}",
                tenant=f"tenant-{tenant}",
                moment=FIRST_MOMENT + 86_400 * NUM_DAYS * number / num_records + 40 * turn,
                messages=messages,
                answer=answer,
            )
            calls.append(call)
            number += 1
            messages = [*messages, {"role": "assistant", "content": answer}]
        is_repeated = name in REPEATING and rng.random() < REPEATED_LINE_SHARE * len(calls)
        if is_repeated and number < num_records:
            calls.append(calls[-1])  # a log shipper that sends a line again
            number += 1
        yield calls, name


def _words(rng: random.Random) -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(20_000)]


def _text(rng: random.Random, words: list[str], num_words: int) -> str:
    """Invent lines of a dozen words, as answers in Markdown have, some of them quoted."""
    chosen = rng.choices(words, k=num_words)
    lines = [" ".join(chosen[place : place + 12]) for place in range(0, num_words, 12)]
    lines[-1] = f'"{lines[-1]}"'
    return "\n- ".join(lines).capitalize() + "."


def _user_text(rng: random.Random, words: list[str]) -> str:
    text = _text(rng, words, rng.randint(20, 90))
    return f"{text} {_private(rng, words)}" if rng.random() < PRIVATE_SHARE else text


def _private(rng: random.Random, words: list[str]) -> str:
    """Invent a private value, or a number that only looks like one."""
    kind = rng.randrange(5)
    if kind == 0:
        return f"Write to {rng.choice(words)}.{rng.choice(words)}@example.org please."
    if kind == 1:
        return f"It came from 203.0.113.{rng.randrange(256)} at noon."
    if kind == 2:
        return f"Call me: +1 202-555-{rng.randrange(10_000):04}."
    if kind == 3:
        return f"My key is sk-proj-{rng.randbytes(24).hex()} now."
    return f"Order {rng.randrange(10_000, 99_999)}, version 2.{rng.randrange(20)}.1."


def _changed(rng: random.Random, text: str, words: list[str]) -> str:
    """Give a text with one word changed, or none."""
    parts = text.split(" ")
    if rng.random() < 0.5:
        parts[rng.randrange(len(parts))] = rng.choice(words)
    return " ".join(parts)


def _open(folder: Path, log: str, day: int) -> IO[bytes]:
    """Open the file of one log and day; Helicone's are gzip and Langfuse's zstd."""
    name, _, side = log.partition("/")
    path = folder / name / f"day-{day:02}"
    if side:  # requests and answers of a batch share a folder
        path = path / side
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "helicone":
        return cast(IO[bytes], gzip.open(f"{path}.jsonl.gz", "wb", compresslevel=1))
    if name == "langfuse":
        return cast(IO[bytes], zstd.open(f"{path}.jsonl.zst", "wb"))
    return open(f"{path}.{'log' if name == 'vllm' else 'jsonl'}", "wb")


Lines = list[bytes]
Logged = list[tuple[str, Lines]]
"""Lines by the log that they go to."""


def _one_line(name: str, line: Callable[[LoggedCall], dict[str, Any]]) -> Callable[..., Logged]:
    """Give the writer of a format with a line for each call."""

    def write(calls: list[LoggedCall]) -> Logged:
        return [(name, [orjson.dumps(line(call)) for call in calls])]

    return write


def _openai(call: LoggedCall) -> dict[str, Any]:
    request = call.request | {"metadata": {"session_id": call.session}}
    return {"id": f"req-{call.number:x}", "request": request, "response": call.response}


def _batch(calls: list[LoggedCall]) -> Logged:
    asked = [
        {"custom_id": f"row-{call.number}", "method": "POST", "url": "/v1/chat/completions",
         "body": call.request} for call in calls
    ]  # fmt: skip
    answered = [
        {"id": f"batch-{call.number:x}", "custom_id": f"row-{call.number}",
         "response": {"status_code": 200, "body": call.response}, "error": None}
        for call in calls
    ]  # fmt: skip
    return [
        ("openai_batch/input", list(map(orjson.dumps, asked))),
        ("openai_batch/output", list(map(orjson.dumps, answered))),
    ]


def _litellm(call: LoggedCall) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{call.number:x}",
        "trace_id": call.session,
        "call_type": "acompletion",
        "status": "success",
        "cache_hit": False,
        "model": MODEL,
        "startTime": call.moment,
        "endTime": call.moment + 2,
        "messages": call.messages,
        "response": call.response,
        "model_parameters": SETTINGS,
        "metadata": {"user_api_key_team_id": call.tenant},
    }


def _langfuse(call: LoggedCall) -> dict[str, Any]:
    return {
        "id": f"ob-{call.number:x}",
        "trace_id": f"trace-{call.number:x}",
        "type": "GENERATION",
        "start_time": call.time[:10] + " " + call.time[11:19] + ".000000",
        "provided_model_name": MODEL,
        "model_parameters": orjson.dumps(SETTINGS).decode(),
        "input": orjson.dumps(call.messages).decode(),
        "output": orjson.dumps({"role": "assistant", "content": call.answer}).decode(),
        "usage_details": {"input": 4 * call.num_words, "output": 160},
        "level": "DEFAULT",
        "user_id": call.tenant,
        "session_id": call.session,
    }


def _helicone(call: LoggedCall) -> dict[str, Any]:
    return {
        "request_id": f"r-{call.number:x}",
        "request_created_at": call.time,
        "request_model": MODEL,
        "request_user_id": call.tenant,
        "request_properties": {"Helicone-Session-Id": call.session},
        "request_body": call.request,
        "response_body": call.response,
        "response_status": 200,
    }


def _vllm(calls: list[LoggedCall]) -> Logged:
    """Write what vLLM 0.32 logs at DEBUG: five lines a call."""
    lines: Lines = []
    for call in calls:
        name, number = f"chatcmpl-{call.number:x}", call.number
        prompt = _rendered(call.messages)
        asked, answered = _ids(prompt, number), _ids(call.answer, number)
        stamp = datetime.fromtimestamp(call.moment, UTC).strftime("%m-%d %H:%M:%S")
        info, debug = f"INFO {stamp} [logger.py:39] ", f"DEBUG {stamp} [logger.py:49] "
        lines += [
            f"{info}Received request {name}: params: SamplingParams(n=1, temperature=0.3, "
            "top_p=0.95, max_tokens=512), lora_request: None.".encode(),
            f"{debug}Request {name} details: prompt: {prompt!r}, prompt_token_ids: {asked}, "
            "prompt_embeds shape: None.".encode(),
            f"{debug}Request {name} JSON body: ".encode() + orjson.dumps(call.request),
            f"{info}Generated response {name}: output: {call.answer!r}, "
            "finish_reason: stop".encode(),
            f"{debug}Generated response {name} details: output_token_ids: {answered}".encode(),
        ]
    return [("vllm", lines)]


def _sglang(call: LoggedCall) -> dict[str, Any]:
    prompt = _rendered(call.messages)
    meta = {"finish_reason": {"type": "stop"}, "prompt_tokens": 4 * call.num_words,
            "completion_tokens": 160, "spec_accept_length": 2.4}  # fmt: skip
    return {
        "timestamp": call.time[:19],
        "event": "request.finished",
        "rid": f"rid-{call.number:x}",
        "obj": {
            "text": prompt,
            "sampling_params": {"temperature": 0.3, "top_p": 0.95, "max_new_tokens": 512},
        },
        "out": {
            "text": call.answer,
            "output_ids": _ids(call.answer, call.number),
            "meta_info": meta,
        },
    }


def _weave(call: LoggedCall) -> dict[str, Any]:
    return {
        "id": f"w-{call.number:x}",
        "project_id": "acme/desk",
        "op_name": "weave:///acme/desk/op/openai.chat.completions.create:1f9",
        "trace_id": call.session,
        "parent_id": None,
        "started_at": call.time,
        "exception": None,
        "inputs": call.request,
        "output": call.response,
        "summary": {"usage": {}},
    }


def _opentelemetry(call: LoggedCall) -> dict[str, Any]:
    asked = [_parts(message["role"], message["content"]) for message in call.messages]
    answered = [_parts("assistant", call.answer) | {"finish_reason": "stop"}]
    texts = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": MODEL,
        "gen_ai.conversation.id": call.session,
        "user.id": call.tenant,
        "gen_ai.input.messages": orjson.dumps(asked).decode(),
        "gen_ai.output.messages": orjson.dumps(answered).decode(),
    }
    attributes: list[dict[str, Any]] = [
        {"key": key, "value": {"stringValue": text}} for key, text in texts.items()
    ]
    attributes += [
        {"key": "gen_ai.request.temperature", "value": {"doubleValue": 0.3}},
        {"key": "gen_ai.request.top_p", "value": {"doubleValue": 0.95}},
        {"key": "gen_ai.usage.output_tokens", "value": {"intValue": "160"}},
    ]
    return {
        "traceId": f"{call.number:032x}",
        "spanId": f"{call.number:016x}",
        "name": f"chat {MODEL}",
        "startTimeUnixNano": str(int(call.moment) * 10**9),
        "attributes": attributes,
    }


def _sharegpt(calls: list[LoggedCall]) -> Logged:
    """Write the session as one conversation, which holds a record for each of its answers."""
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [
        {"from": speakers[message["role"]], "value": message["content"]}
        for message in [
            *calls[-1].messages,
            {"role": "assistant", "content": calls[-1].answer},
        ]
    ]
    line = {"id": calls[0].session, "conversations": turns}
    return [("sharegpt", [orjson.dumps(line)])]


def _rendered(messages: list[dict[str, str]]) -> str:
    turns = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def _ids(text: str, number: int) -> list[int]:
    """Give as many ids as a tokenizer would, about: one for four characters."""
    return [(number + 31 * place) % 49_000 for place in range(len(text) // 4)]


def _parts(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}


FORMATS: dict[str, Callable[[list[LoggedCall]], Logged]] = {
    "openai": _one_line("openai", _openai),
    "openai_batch": _batch,
    "litellm": _one_line("litellm", _litellm),
    "langfuse": _one_line("langfuse", _langfuse),
    "helicone": _one_line("helicone", _helicone),
    "vllm": _vllm,
    "sglang": _one_line("sglang", _sglang),
    "weave": _one_line("weave", _weave),
    "opentelemetry": _one_line("opentelemetry", _opentelemetry),
    "sharegpt": _sharegpt,
}
"""Format -> what writes the lines of one session."""
LOGS = tuple(
    log
    for name in FORMATS
    for log in (("openai_batch/input", "openai_batch/output") if "batch" in name else (name,))
)
