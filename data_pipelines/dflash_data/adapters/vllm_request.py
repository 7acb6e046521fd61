"""One request of a vLLM log: what its lines told, and the conversation they make."""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

from dflash_data.adapters.completion import read_finish_reason
from dflash_data.adapters.fields import find_text, parse_object, read_number, record_id
from dflash_data.adapters.log_cut import LogCut
from dflash_data.adapters.messages import (
    SAMPLING_ALIASES,
    num_answers,
    read_messages,
    read_sampling,
    read_tools,
)
from dflash_data.adapters.token_ids import parse_token_ids
from dflash_data.drops import DropReason, UnusableError
from dflash_train.records.conversation import Conversation, Turn

SOURCE = "vllm_log"
LITERAL = r"""(?:'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")"""
"""A string as Python's repr writes it."""
ANY_LITERAL = re.compile(LITERAL)
PROMPT = "prompt: "
NO_PROMPT = "prompt: None, "
OUTPUT = "output: "
PARAMS = re.compile(r"params: (?=\w+\()")
PARAMS_END = re.compile(r"\), (?:prompt_token_ids|lora_request): ")
SETTING = re.compile(r"\b(\w+)=(-?\d[\d.e+-]*)[,)]")
SETTINGS = frozenset(SAMPLING_ALIASES)
STOP = re.compile(rf"\bstop=(\[{LITERAL}(?:, {LITERAL})*\])")
CONSTRAINT = re.compile(r"\b(?:structured_outputs|guided_decoding)=(?!None)\w")
QUOTES = ("'", '"')
PROMPT_IDS = "prompt_token_ids: "
OUTPUT_IDS = "output_token_ids: "
SEPARATOR = ", "
CLOSING = {"[": "]", "(": ")"}
FINISH_REASON = re.compile(r"finish_reason: (\w+)")
LORA_NAME = re.compile(rf"lora_request: LoRARequest\(.*?lora_name=({LITERAL})")
NOT_LOGGED = ("None", "streaming_complete")
"""What stands for a finish reason that the log does not know."""
UNKNOWN_OUTPUT = re.compile(r"<streaming_complete: \d+ tokens>")
TOOL_CALLS = "[tool_calls: "
CALL_NAME = re.compile(r"\s*([\w.-]+)\(")


@dataclass(kw_only=True)
class VllmRequest:
    """What the lines of one request told so far; each text once."""

    key: str
    ts: str | None
    body: dict[str, Any] | None = None
    params: str = ""
    prompt: str | None = None
    prompt_ids: str = ""
    """As logged, like the ids of the answer: numbers would take ten times the space."""
    output: str | None = None
    output_ids: str = ""
    finish_reason: str | None = None
    adapter: str | None = None
    num_further: int = 0
    """Choices after the first."""
    longest: int = 0
    """Length of the longest text or id list, in characters or ids."""
    unusable: DropReason | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing is to come: the only choice is there, with its ids."""
        return bool(self.output and self.output_ids) and read_params(self.params).get("n") == 1

    def conversation(self, cut: LogCut) -> Conversation:
        """Give the record of this request.

        Raises:
            UnusableError: It failed, it was cut, or neither messages nor ids were logged.
        """
        if self.unusable is not None:
            raise UnusableError(self.unusable)
        prompt_ids = parse_token_ids(self.prompt_ids)
        output_ids = parse_token_ids(self.output_ids)
        if self.longest and cut.is_cut(self.longest):
            raise UnusableError(DropReason.truncated_log)
        body = self.body or {}
        answer = None if self.output is None else read_answer(self.output)
        has_ids = bool(answer and prompt_ids and output_ids)
        is_rendered = "messages" not in body
        if not is_rendered:
            messages = read_messages(body["messages"])
        elif has_ids or (self.prompt and prompt_ids):
            messages = [Turn(role="user", content=self.prompt or "")]
        else:
            raise UnusableError(DropReason.content_missing)
        turn = num_answers(messages)
        return Conversation(
            id=record_id(SOURCE, self.key, turn),
            source=SOURCE,
            source_ref=self.key,
            ts=self.ts,
            model=find_text(body, "model"),
            adapter=self.adapter,
            messages=[*messages, answer] if answer else messages,
            tools=read_tools(body),
            sampling=read_sampling(body) | dict(read_params(self.params)),
            finish_reason=self.finish_reason if answer else None,
            usage=_usage(prompt_ids, output_ids),
            session=find_text(body, "session_id"),
            tenant=find_text(body, "user"),
            turn=turn,
            prompt_token_ids=prompt_ids if has_ids else None,
            output_token_ids=output_ids if has_ids else None,
            has_rendered_prompt=is_rendered,
            on_policy_reason="other_model" if answer else "no_answer",
        )


def add_message(request: VllmRequest, kind: bytes, text: memoryview, cut: LogCut) -> None:
    """Add what one line tells; a line that cannot be read makes the request unusable.

    Args:
        request: The request that the line names.
        kind: `Generated response`, ` JSON body`, or anything else for prompt and parameters.
        text: The rest of the message.
        cut: Learns from the lengths.
    """
    try:
        message = str(text, "utf-8")
        if kind == b"Generated response":
            _add_response(request, message, cut)
        elif kind == b" JSON body":
            _add_body(request, message, cut)
        else:
            _add_prompt(request, message, cut)
    except UnicodeDecodeError:
        request.unusable = DropReason.unparsable
    except UnusableError as unusable:
        request.unusable = unusable.reason


def read_literal(literal: str) -> str:
    """Give the text of a Python string literal.

    Raises:
        UnusableError: It is no string that can be written as UTF-8.
    """
    if "\\" not in literal:
        return literal[1:-1]
    text = _read_like_json(literal)
    if text is not None:
        return text
    try:
        with warnings.catch_warnings():  # of escapes that Python does not know, which stay
            warnings.simplefilter("ignore")
            text = ast.literal_eval(literal)
        text.encode()
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise UnusableError(DropReason.unparsable) from None
    return text


def _read_like_json(literal: str) -> str | None:
    """Give the text of a literal whose escapes mean the same in JSON; None for any other.

    That is ten times as fast as Python's parser.
    """
    try:
        text = _json_text(literal)
    except orjson.JSONDecodeError:
        return None
    # JSON alone escapes a slash and joins surrogates; the first tests are there for their speed.
    is_slash_escaped = "/" in text and "\\/" in literal
    is_unicode_escaped = not text.isascii() and "\\u" in literal
    return None if is_slash_escaped or is_unicode_escaped else text


def _json_text(literal: str) -> str:
    """Read a literal as if it were JSON.

    Python's `repr` escapes no double quote between single ones, and single ones by one backslash.

    Raises:
        orjson.JSONDecodeError: It has escapes that JSON does not know.
    """
    inner = literal[1:-1] if literal[0] == '"' else literal[1:-1].replace('"', '\\"')
    try:
        return orjson.loads(f'"{inner}"')
    except orjson.JSONDecodeError:
        pieces = inner.split("\\\\")  # what follows an escaped backslash is no escape
        known = [one.replace("\\'", "'").replace("\\x", "\\u00") for one in pieces]
        return orjson.loads('"' + "\\\\".join(known) + '"')


def read_answer(text: str) -> Turn | None:
    """Give the answer; None if the log has only its number of tokens.

    vLLM writes tool calls as `[tool_calls: name(arguments), ...]`.
    """
    if not text:
        raise UnusableError(DropReason.empty_output)
    if text[0] == "<" and UNKNOWN_OUTPUT.fullmatch(text):
        return None
    if text[0] == "[" and text.startswith(TOOL_CALLS) and text.endswith("]"):
        return Turn(role="assistant", tool_calls=_tool_calls(text[len(TOOL_CALLS) : -1]))
    return Turn(role="assistant", content=text)


@lru_cache(maxsize=1024)
def read_params(params: str) -> Mapping[str, Any]:
    """Give the sampling settings of `SamplingParams(...)`: those that were really used.

    Clients send few different settings, so most requests find theirs read already.
    """
    settings = ANY_LITERAL.sub("''", params)  # a stop text may look like a setting
    sampling: dict[str, Any] = {
        name: read_number(number) for name, number in SETTING.findall(settings) if name in SETTINGS
    }
    stop = STOP.search(params)
    if stop:
        sampling["stop"] = [read_literal(text) for text in ANY_LITERAL.findall(stop[1])]
    if CONSTRAINT.search(settings):
        sampling["response_format"] = {"type": "structured_outputs"}
    return sampling


def _usage(prompt_ids: list[int], output_ids: list[int]) -> dict[str, int]:
    counts = {"prompt_tokens": len(prompt_ids), "completion_tokens": len(output_ids)}
    return {name: count for name, count in counts.items() if count}


def _add_body(request: VllmRequest, message: str, cut: LogCut) -> None:
    message = message.rstrip()
    try:
        request.body = parse_object(message)
    except UnusableError:
        if not message.endswith("}"):
            cut.see_cut(len(message))
            raise UnusableError(DropReason.truncated_log) from None
        raise
    cut.see_whole(len(message))


def _add_prompt(request: VllmRequest, message: str, cut: LogCut) -> None:
    """Read prompt, parameters, ids and adapter: all in one line, or in two lines of their own."""
    start = 0
    if message.startswith(NO_PROMPT):
        start = len(NO_PROMPT)
    elif message.startswith(PROMPT) and request.body is None:
        literal = _literal_after(PROMPT, message)
        start = len(PROMPT) + len(literal) + len(SEPARATOR)
        request.prompt = read_literal(literal)
        _note_text(request, cut, request.prompt)
    elif message.startswith(PROMPT):
        # Nobody needs the prompt beside the body; only numbers follow the ids.
        start = max(0, message.rfind(PROMPT_IDS))
    params = PARAMS.match(message, start)
    if params:
        found = PARAMS_END.search(message, start)
        start = found.start() + 1 if found else len(message)
        request.params = message[params.end() : start]
        lora = LORA_NAME.search(message, start)
        request.adapter = read_literal(lora[1]) if lora else None
    ids = _read_ids(message, PROMPT_IDS, start)
    if ids:
        request.prompt_ids = ids
        _note_ids(request, cut, ids)


def _add_response(request: VllmRequest, message: str, cut: LogCut) -> None:
    if message.startswith(OUTPUT):
        literal = _literal_after(OUTPUT, message)
        if request.output is not None:
            request.num_further += 1
            return
        request.output = read_literal(literal)
        _note_text(request, cut, request.output)
        start = len(OUTPUT) + len(literal)
        reason = FINISH_REASON.search(message, start)
        if reason and reason[1] not in NOT_LOGGED:
            request.finish_reason = read_finish_reason(reason[1])
    else:
        start = 0
    ids = _read_ids(message, OUTPUT_IDS, start)
    if ids and not request.output_ids:
        request.output_ids = ids
        _note_ids(request, cut, ids)


def _literal_after(name: str, message: str) -> str:
    """Give the literal of the first field of a message; further fields follow it.

    Raises:
        UnusableError: There is none, or its end is missing.
    """
    start = len(name)
    quote = message[start : start + 1]
    end = message.find(quote, start + 1) + 1 if quote in QUOTES else 0
    if end and message[end - 2] == "\\":  # the quote may be escaped
        found = ANY_LITERAL.match(message, start)
        end = found.end() if found else 0
    if not end or not message.startswith(SEPARATOR, end):
        raise UnusableError(DropReason.unparsable)
    return message[start:end]


def _read_ids(message: str, name: str, start: int) -> str:
    """Find the ids that stand under a name, first thing from `start` on; empty if none do."""
    start += len(SEPARATOR) if message.startswith(SEPARATOR, start) else 0
    if not message.startswith(name, start):
        return ""
    start += len(name)
    bracket = message[start : start + 1]
    end = message.find(CLOSING[bracket], start) if bracket in CLOSING else -1
    # A tuple of one has a comma more.
    return message[start + 1 : max(start, end)].rstrip(", ")


def _note_text(request: VllmRequest, cut: LogCut, text: str) -> None:
    if text:
        cut.see(len(text), text[-1])
        request.longest = max(request.longest, len(text))


def _note_ids(request: VllmRequest, cut: LogCut, ids: str) -> None:
    num_ids = ids.count(",") + 1
    cut.see(num_ids, ids[ids.rfind(",") + 1 :])
    request.longest = max(request.longest, num_ids)


def _tool_calls(text: str) -> list[dict[str, Any]]:
    """Read `name(arguments), ...` in which the arguments are JSON."""
    calls: list[dict[str, Any]] = []
    position = 0
    while position < len(text):
        found = CALL_NAME.match(text, position)
        if found is None:
            raise UnusableError(DropReason.unparsable)
        start = end = found.end()
        try:
            if text[start : start + 1] != ")":
                _, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            raise UnusableError(DropReason.unparsable) from None
        calls.append({"id": None, "name": found[1], "arguments": text[start:end] or "{}"})
        position = end + len("),")
    return calls
