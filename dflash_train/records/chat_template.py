"""Conversations to token ids: prompts for the target, rows with a loss mask for training.

The template is the tokenizer's own, whichever that is: nothing here knows one by name. Where ids
are logged or were generated they rule, and no text is tokenised again. Otherwise a row is rendered
with and without its answer, and the answer begins where the common token prefix ends. A row is
refused, loudly, where that would not be what the target saw or wrote: the prompt does not come back
unchanged (a template that rewrites it, a merge of tokens across the boundary), or the template
alters the answer (trims it, leaves its reasoning out).

A prompt that was logged as the engine was fed it (`has_rendered_prompt`) meets no template: its ids
rule if they are this tokenizer's, else its text is tokenised as it stands.

What the template prints behind the answer is supervised up to the stop token, and only where the
log shows that the target stopped by itself.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jinja2 import TemplateError
from msgspec.structs import replace
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dflash_train.config import ServingSampling
from dflash_train.records.conversation import Conversation, Turn

THINKING_SETTINGS = ("enable_thinking", "reasoning_effort")
"""Sampling keys that servers hand to the template."""
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
"""Names under which templates look for a message's reasoning; each family reads one of them."""
UNDATED = datetime(2026, 1, 1, tzinfo=UTC)
"""What a template that prints today's date is told for a record without a time."""
_MARK = "\ue002"
"""Stands for the answer while we look for what the template prints behind any answer."""


@dataclass(kw_only=True)
class RenderedRow:
    """Token ids of a whole call and where the assistant wrote."""

    input_ids: list[int]
    loss_mask: list[bool]
    """True where the supervised assistant turn wrote the token, its stop token included; False
    on tokens that a privacy placeholder touches."""

    @property
    def prompt_length(self) -> int:
        """Tokens before the first supervised one."""
        return self.loss_mask.index(True)


class UnstableBoundaryError(ValueError):
    """The template does not print the prompt that was served, or the answer that was written."""


class NoSupervisedTokenError(ValueError):
    """No token of the row was written by the target."""


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Turn],
    *,
    tools: list[dict[str, Any]] | None = None,
    settings: dict[str, Any] | None = None,
) -> list[int]:
    """Give the ids that a server feeds for these messages, ready for the assistant's turn.

    Args:
        tokenizer: The target's, with its chat template.
        messages: All messages before the answer.
        tools: Tool schemas as sent.
        settings: Further variables of the template, see `template_settings`.

    Raises:
        UnstableBoundaryError: The template refuses the messages.
    """
    template = _Template(tokenizer, tools=tools, settings=settings or {})
    return tokenizer(template.prompt(messages), add_special_tokens=False).input_ids


def render_request(
    tokenizer: PreTrainedTokenizerBase,
    record: Conversation,
    *,
    serving: ServingSampling | None = None,
) -> list[int]:
    """Give the ids that a server feeds for a record: its tools, thinking mode and date included.

    Raises:
        UnstableBoundaryError: The template refuses the messages, or a rendered prompt is empty.
    """
    if record.has_rendered_prompt:
        return _rendered_ids(tokenizer, record)
    settings = template_settings(record, serving=serving)
    return render_prompt(tokenizer, record.prompt, tools=record.tools, settings=settings)


def template_settings(
    record: Conversation, *, serving: ServingSampling | None = None
) -> dict[str, Any]:
    """Give the template's variables beside the messages: thinking mode and clock.

    Templates that print today's date are told the day of the request, so that a row is what was
    served, on whichever day it is rendered.

    Args:
        record: Its logged thinking mode counts where serving sets none.
        serving: How the target is served; a server may switch thinking on or off for requests that
            say nothing of it.
    """
    settings: dict[str, Any] = {}
    for key in THINKING_SETTINGS:
        served = None if serving is None else getattr(serving, key)
        setting = record.sampling.get(key) if served is None else served
        if setting is not None:
            settings[key] = setting
    moment = UNDATED if record.ts is None else datetime.fromisoformat(record.ts)
    return {**settings, "strftime_now": moment.strftime}


def render_row(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    *,
    stop_token_ids: frozenset[int],
    serving: ServingSampling | None = None,
) -> RenderedRow:
    """Give ids and loss mask of an answered conversation.

    Args:
        tokenizer: The target's, with its chat template.
        conversation: With the target's own answer.
        stop_token_ids: Ids that end the target's answers.
        serving: How the target is served, see `template_settings`.

    Raises:
        UnstableBoundaryError: The template changes the prompt when the answer is there, or alters
            the answer.
        NoSupervisedTokenError: The answer has no token, or placeholders cover all of it.
    """
    if conversation.prompt_token_ids is not None and conversation.output_token_ids is not None:
        prompt, output = conversation.prompt_token_ids, conversation.output_token_ids
        row = RenderedRow(
            input_ids=[*prompt, *output], loss_mask=[False] * len(prompt) + [True] * len(output)
        )
    else:
        template = _Template(
            tokenizer,
            tools=conversation.tools,
            settings=template_settings(conversation, serving=serving),
        )
        row = _render_text(template, conversation, stop_token_ids)
    if True not in row.loss_mask:
        raise NoSupervisedTokenError("the answer has no token that the target wrote")
    return row


def _render_text(
    template: "_Template", record: Conversation, stop_token_ids: frozenset[int]
) -> RenderedRow:
    tokenizer = template.tokenizer
    stops = {str(tokenizer.decode([token_id])) for token_id in stop_token_ids} - {""}
    is_rendered = record.has_rendered_prompt
    text = (_put_behind if is_rendered else _find_answer)(template, record, stops)
    adds_special = is_rendered and _adds_special(tokenizer, text.whole)
    prompt_ids = tokenizer(text.whole[: text.prompt_end], add_special_tokens=adds_special).input_ids
    has_offsets = bool(tokenizer.is_fast)
    encoded = tokenizer(
        text.whole[: text.end], add_special_tokens=adds_special, return_offsets_mapping=has_offsets
    )
    ids: list[int] = encoded.input_ids
    if ids[: len(prompt_ids)] != prompt_ids:
        raise UnstableBoundaryError("a token reaches across the boundary of prompt and answer")
    loss_mask = [place >= len(prompt_ids) for place in range(len(ids))]
    for index, first, stop, _kind in record.privacy.spans:
        if index != len(record.messages) - 1:
            continue
        start, end = text.content_start + first, text.content_start + stop
        if has_offsets:
            touched = _touched_by_offsets(encoded.offset_mapping, start, end)
        else:
            touched = _touched_by_ids(tokenizer, text.whole[: text.end], ids, start, end)
        for place in touched:
            loss_mask[place] = False
    return RenderedRow(input_ids=ids, loss_mask=loss_mask)


@dataclass(kw_only=True)
class _AnswerText:
    """A rendered call and where its answer stands in it, in characters."""

    whole: str
    prompt_end: int
    content_start: int
    end: int
    """End of what the target wrote, its stop token included if it wrote one."""


def _find_answer(template: "_Template", record: Conversation, stops: set[str]) -> _AnswerText:
    """Find prompt, content and end of the answer in the rendered text.

    Raises:
        UnstableBoundaryError: The answer does not stand there as it was logged.
    """
    answer = record.answer
    assert answer is not None, "only answered conversations have a row"
    prompt, whole = template.prompt(record.prompt), template.whole(record.messages)
    if not whole.startswith(prompt):
        raise UnstableBoundaryError("the template prints the prompt differently with its answer")
    _check_words(answer, whole[len(prompt) :], stops)
    if answer.content:
        text, marked = answer.content, replace(answer, content=_MARK)
    elif answer.reasoning:
        text, marked = answer.reasoning.strip(), replace(answer, reasoning=_MARK)
    else:
        text, marked = "", None
    tail = whole[len(prompt) :]
    if marked is not None:
        with_mark = template.whole([*record.prompt, marked])
        tail = with_mark.rpartition(_MARK)[2]
        is_verbatim = with_mark.count(_MARK) == 1 and whole.endswith(text + tail)
        if not is_verbatim or len(whole) - len(text + tail) < len(prompt):
            raise UnstableBoundaryError("the template alters the answer")
    end_of_text = len(whole) - len(tail)
    return _AnswerText(
        whole=whole,
        prompt_end=len(prompt),
        content_start=end_of_text - len(answer.content or ""),
        end=end_of_text + _written_tail(tail, record, stops),
    )


def _put_behind(template: "_Template", record: Conversation, stops: set[str]) -> _AnswerText:
    """Put the answer behind a prompt that is rendered already.

    Raises:
        UnstableBoundaryError: Nothing tells how the target wrote the parts of the answer.
    """
    answer = record.answer
    assert answer is not None, "only answered conversations have a row"
    if answer.reasoning or answer.tool_calls:
        raise UnstableBoundaryError("only a template can print reasoning and tool calls")
    prompt, content = _rendered_text(record), answer.content or ""
    _check_words(answer, content, stops)
    tail = _chat_tail(template, prompt)
    end_of_text = len(prompt) + len(content)
    return _AnswerText(
        whole=prompt + content + tail,
        prompt_end=len(prompt),
        content_start=len(prompt),
        end=end_of_text + _written_tail(tail, record, stops),
    )


def _chat_tail(template: "_Template", prompt: str) -> str:
    """Give what the template prints behind an answer; nothing if the prompt is no chat of it.

    It is one if it ends as the template ends a prompt. Any other text may end in many ways.
    """
    asked = Turn(role="user", content=_MARK)
    opening = template.prompt([asked]).rpartition(_MARK)[2]
    if not opening.strip() or not prompt.endswith(opening):
        return ""
    whole = template.whole([asked, Turn(role="assistant", content=_MARK)])
    return whole.rpartition(_MARK)[2] if whole.count(_MARK) == 2 else ""


def _rendered_ids(tokenizer: PreTrainedTokenizerBase, record: Conversation) -> list[int]:
    """Give the logged ids of a rendered prompt if they spell its text here, else the text's."""
    text, ids = _rendered_text(record), record.prompt_token_ids
    if ids is not None and all(0 <= token_id < len(tokenizer) for token_id in ids):
        spelt = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if str(spelt).rstrip("\ufffd") == text.rstrip("\ufffd"):  # a character may be cut off
            return ids
    return tokenizer(text, add_special_tokens=_adds_special(tokenizer, text)).input_ids


def _rendered_text(record: Conversation) -> str:
    prompt = record.prompt
    if len(prompt) != 1 or not prompt[0].content:
        raise UnstableBoundaryError("a rendered prompt is one text, and not an empty one")
    return prompt[0].content


def _adds_special(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Say whether the tokenizer puts its own tokens around a text, as engines have it do.

    A text that begins with one, as many templates print it, must not get a second.
    """
    first = tokenizer.bos_token
    return not (first and text.startswith(str(first)))


def _check_words(answer: Turn, printed: str, stops: set[str]) -> None:
    """Refuse an answer that spells a stop token, or whose reasoning is not printed."""
    calls = [text for call in answer.tool_calls or () for text in (call["name"], call["arguments"])]
    written = [answer.content or "", answer.reasoning or "", *calls]
    if any(stop in part for stop in stops for part in written):
        raise UnstableBoundaryError("the answer spells a stop token, which ended no answer there")
    # Templates frame reasoning with line ends of their own; servers may or may not log those.
    if (answer.reasoning or "").strip() not in printed:
        raise UnstableBoundaryError("the template leaves the answer's reasoning out")
    if any(call["name"] not in printed for call in answer.tool_calls or ()):
        raise UnstableBoundaryError("the template leaves the answer's tool calls out")


def _written_tail(tail: str, record: Conversation, stops: set[str]) -> int:
    """Give how many characters behind the answer's text are the target's own.

    Tool calls stand there, and the stop token if the target wrote one. It did if the call finished
    by itself: not at its budget, not at a stop string of the client, not for a reason unknown.
    """
    assert record.answer is not None
    has_calls = bool(record.answer.tool_calls)
    places = [(tail.find(stop), len(stop)) for stop in stops if stop in tail]
    first, length = min(places, default=(len(tail) if has_calls else 0, 0))
    logged = record.sampling.get("stop") or []
    client_stops = logged if isinstance(logged, list) else [logged]
    may_be_cut = any(not isinstance(stop, str) or stop not in stops for stop in client_stops)
    if record.finish_reason in ("stop", "tool_calls") and not may_be_cut:
        return first + length
    return first if has_calls else 0


def _touched_by_offsets(offsets: list[tuple[int, int]], start: int, end: int) -> list[int]:
    """Give the tokens that overlap the characters `[start, end)`.

    A token reaches from where the one before it ends: tokenizers leave spaces out of offsets, and
    the pieces of one character all claim it, or nothing.
    """
    touched = []
    reached = 0
    for place, (first, stop) in enumerate(offsets):
        first, stop = min(first, reached), max(stop, reached)
        overlaps = first < end and stop > start
        if overlaps or (first == stop and start <= first <= end):
            touched.append(place)
        reached = stop
    return touched


def _touched_by_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], start: int, end: int
) -> range:
    """Do the same without offsets: tokens stay only if the text beside the span alone gives them.

    Ids that begin the tokens of `text[:start]` and of the whole text alike cover nothing behind
    `start`; likewise at the end. Tokens beside the span that merged otherwise go, too.
    """
    before = tokenizer(text[:start], add_special_tokens=False).input_ids
    behind = tokenizer(text[end:], add_special_tokens=False).input_ids
    return range(_common_prefix(before, ids), len(ids) - _common_prefix(behind[::-1], ids[::-1]))


def _common_prefix(left: list[int], right: list[int]) -> int:
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return min(len(left), len(right))


class _Template:
    """The tokenizer's chat template with the tools and settings of one call."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tools: list[dict[str, Any]] | None,
        settings: dict[str, Any],
    ) -> None:
        self.tokenizer, self._tools = tokenizer, tools
        self._settings: dict[str, Any] = {"strftime_now": UNDATED.strftime, **settings}

    def prompt(self, messages: list[Turn]) -> str:
        """Print messages up to where the answer begins."""
        return self._print(messages, add_generation_prompt=True)

    def whole(self, messages: list[Turn]) -> str:
        """Print messages that end with the answer."""
        return self._print(messages, add_generation_prompt=False)

    def _print(self, messages: list[Turn], *, add_generation_prompt: bool) -> str:
        apply: Callable[..., Any] = self.tokenizer.apply_chat_template
        try:
            text = apply(
                [_template_message(turn) for turn in messages],
                tools=self._tools,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self._settings,
            )
        except (TemplateError, TypeError):  # its message may repeat what it was given
            raise UnstableBoundaryError("the chat template refuses these messages") from None
        return str(text)


def _template_message(turn: Turn) -> dict[str, Any]:
    """Give a message as servers hand it to templates: no nulls, arguments as objects."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.content or ""}
    if turn.reasoning:
        message |= dict.fromkeys(REASONING_NAMES, turn.reasoning)
    if turn.tool_calls:
        message["tool_calls"] = [_template_call(call) for call in turn.tool_calls]
    if turn.tool_call_id is not None:
        message["tool_call_id"] = turn.tool_call_id
    if turn.name is not None:
        message["name"] = turn.name
    return message


def _template_call(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["arguments"]
    try:
        parsed = json.loads(arguments)
    except json.JSONDecodeError:
        parsed = None  # the target wrote no JSON: it is printed as it stands
    return {
        "id": call.get("id"),
        "type": "function",
        "function": {
            "name": call["name"],
            "arguments": parsed if isinstance(parsed, dict) else arguments,
        },
    }
