"""Prompts as requests of OpenAI's API, and replies as answers with their exact token ids.

`completions` sends the prompt as token ids of our own rendering (vLLM, SGLang and llama.cpp take
them); `chat` sends messages, which the server renders. `return_token_ids`, an extension of vLLM
(0.10) and SGLang (2026-07), brings the ids of prompt and answer back: `token_ids` in the choice,
`prompt_token_ids` in the choice or, for vLLM's chat, beside it. Servers that do not know it leave
them out, and the answer is text only. Sampling settings are sent even where they change nothing:
servers put the target's `generation_config.json` in the place of those that are missing.
"""

from dataclasses import dataclass
from typing import Any

from dflash_data.drops import DropReason, UnusableError
from dflash_data.regenerate.answers import Answer, answer_text
from dflash_data.regenerate.endpoint_replies import GarbledReplyError
from dflash_train.config import DataConfig, EndpointApi, require
from dflash_train.features.target_text import WrittenTarget
from dflash_train.records.conversation import Conversation, Turn

FINISH_REASONS = {
    "stop": "stop",
    "eos_token": "stop",  # TGI
    "stop_sequence": "stop",  # TGI
    "length": "length",
    "tool_calls": "tool_calls",
}
"""What servers write, and what a record holds."""


@dataclass(kw_only=True)
class Question:
    """What the servers are asked for one record."""

    record: Conversation
    """It ends where the answer begins, with its history complete."""
    prompt_ids: list[int]
    """The same, rendered."""
    seed: int


class CompletionApi:
    """Writes requests and reads replies of one recipe."""

    def __init__(self, data: DataConfig, target: WrittenTarget) -> None:
        self._data = data
        self._target = target
        self._is_chat = data.endpoints.api is EndpointApi.chat
        self._vocabulary_size = len(target.tokenizer)

    @property
    def path(self) -> str:
        """Where requests go, below the address of a server."""
        return "/chat/completions" if self._is_chat else "/completions"

    def request(self, question: Question, model: str, *, max_tokens: int) -> dict[str, Any]:
        """Write the JSON body that asks for one answer."""
        sampling = self._data.serving_sampling
        settings = {
            "model": model,
            "max_tokens": max_tokens,
            "seed": question.seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,  # SGLang's "off"; vLLM and llama.cpp know it, too
            "min_p": sampling.min_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "repetition_penalty": sampling.repetition_penalty,
            "stop_token_ids": sorted(self._target.stop_token_ids),
            "return_token_ids": True,
        }
        if not self._is_chat:
            return settings | {"prompt": question.prompt_ids}
        return settings | self._as_chat(question.record)

    def check(self, reply: dict[str, Any], model: str) -> None:
        """See that a reply has the API's form and comes from the model that was asked.

        Raises:
            GarbledReplyError: It has another form.
            ValueError: Another model answered.
        """
        _choice(reply)
        name = reply.get("model")
        require(
            name == model,
            f"data.endpoints.model (={model}) was asked, and another one answered. Name the "
            "target as the servers' replies do, and no server that answers with other models.",
        )

    def read(self, reply: dict[str, Any], question: Question, model: str) -> Answer:
        """Read a reply.

        Raises:
            GarbledReplyError: It has not the API's form.
            UnusableError: It holds no answer that can be kept, for the reason that it carries.
            ValueError: Another model answered.
        """
        self.check(reply, model)
        choice = _choice(reply)
        turn = _turn(choice)
        finish_reason = _finish_reason(choice)
        prompt_ids, output_ids = self._ids(reply, choice, question)
        if output_ids is None:
            if not (turn.content or turn.reasoning or turn.tool_calls):
                raise UnusableError(DropReason.empty_output)
            return Answer(turn=turn, finish_reason=finish_reason, usage=_usage(reply))
        if output_ids[-1] in self._target.stop_token_ids and finish_reason == "length":
            finish_reason = "stop"
        if not self._is_chat:
            turn.content = self._checked_text(output_ids, turn.content or "")
        return Answer(
            turn=turn,
            finish_reason=finish_reason,
            prompt_ids=prompt_ids,
            output_ids=output_ids,
            usage={"prompt_tokens": len(prompt_ids), "completion_tokens": len(output_ids)},
        )

    def _as_chat(self, record: Conversation) -> dict[str, Any]:
        """Give the fields that a chat request has in place of a prompt."""
        sampling = self._data.serving_sampling
        fields: dict[str, Any] = {"messages": [_message(turn) for turn in record.messages]}
        if record.tools:
            fields["tools"] = record.tools
        if sampling.enable_thinking is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": sampling.enable_thinking}
        if sampling.reasoning_effort is not None:
            fields["reasoning_effort"] = sampling.reasoning_effort
        return fields

    def _ids(
        self, reply: dict[str, Any], choice: dict[str, Any], question: Question
    ) -> tuple[list[int], list[int] | None]:
        """Give the ids of prompt and answer; None for the answer where they are not known exactly.

        A stop token that the server cut off is such a case: which one it was is not told.
        """
        output = _id_list(choice.get("token_ids"))
        prompt = _id_list(choice.get("prompt_token_ids"))
        if prompt is None:
            prompt = _id_list(reply.get("prompt_token_ids"))
        if prompt is None and not self._is_chat:
            prompt = question.prompt_ids
        if output is None or prompt is None:
            return [], None
        if not output:
            raise UnusableError(DropReason.empty_output)
        if max(output) >= self._vocabulary_size:
            raise UnusableError(DropReason.ids_mismatch)
        stops = self._target.stop_token_ids
        end = next((i + 1 for i, token_id in enumerate(output) if token_id in stops), None)
        if end is None and choice.get("finish_reason") != "length":
            return [], None
        return prompt, output[:end]

    def _checked_text(self, output_ids: list[int], served: str) -> str:
        """Decode an answer as `regenerate` does in process, and compare it with the server's text.

        Raises:
            UnusableError: The server's tokenizer is not ours.
        """
        text = answer_text(output_ids, self._target)
        # A budget may end within a character; servers differ in how they show that.
        if text.rstrip("\ufffd").strip() != served.rstrip("\ufffd").strip():
            raise UnusableError(DropReason.ids_mismatch)
        return text


def _choice(reply: dict[str, Any]) -> dict[str, Any]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise GarbledReplyError
    return choices[0]


def _turn(choice: dict[str, Any]) -> Turn:
    """Read the answer's message, or its text where the API has no messages."""
    message = choice.get("message", {"content": choice.get("text")})
    if not isinstance(message, dict):
        raise GarbledReplyError
    content = message.get("content")
    reasoning = message.get("reasoning_content") or message.get("reasoning") or None
    calls = message.get("tool_calls") or None
    if not all(isinstance(text, str | None) for text in (content, reasoning)):
        raise GarbledReplyError
    return Turn(
        role="assistant",
        content=content if calls else content or "",
        reasoning=reasoning,
        tool_calls=[_tool_call(call) for call in calls] if calls else None,
    )


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    try:
        function = call["function"]
        return {
            "id": call.get("id"), "name": function["name"], "arguments": function["arguments"]
        }  # fmt: skip
    except (KeyError, TypeError, AttributeError):
        raise UnusableError(DropReason.tool_error) from None


def _message(turn: Turn) -> dict[str, Any]:
    """Give a message as the API wants it: a call's name and arguments lie in its function."""
    message = turn.as_message()
    if turn.tool_calls:
        message["tool_calls"] = [
            call if "function" in call else {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in turn.tool_calls
        ]  # fmt: skip
    return message


def _finish_reason(choice: dict[str, Any]) -> str:
    served = choice.get("finish_reason")
    if served == "content_filter":
        raise UnusableError(DropReason.content_filter)
    if served not in FINISH_REASONS:  # abort, error, null
        raise UnusableError(DropReason.not_success)
    return FINISH_REASONS[served]


def _id_list(value: Any) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise GarbledReplyError
    return value


def _usage(reply: dict[str, Any]) -> dict[str, int]:
    usage = reply.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return {
        name: counts[name]
        for name in ("prompt_tokens", "completion_tokens")
        if isinstance(counts.get(name), int)
    }
