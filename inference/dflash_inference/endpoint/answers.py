"""Replies in OpenAI's shapes, whole or as the chunks of a stream.

With `return_token_ids` they carry ids under vLLM's names: those of the prompt beside a chat's
choices and within a completion's, those of the answer in the choice.
"""

from dataclasses import dataclass, field
from typing import Any

from dflash_inference.endpoint.requests import Ask


@dataclass(kw_only=True)
class Answer:
    """What is known of one answer so far."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    ask: Ask
    text: str = ""
    output_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def usage(self) -> dict[str, int]:
        """Token counts of prompt and answer, the stop token included."""
        prompt, output = len(self.ask.prompt_ids), len(self.output_ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
        }

    def whole(self, *, with_token_ids: bool) -> dict[str, Any]:
        """Give the reply of a finished request."""
        is_chat = self.ask.is_chat
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": self.text}}
            if is_chat
            else {"text": self.text}
        )
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": self.finish_reason}
        reply = self._envelope("chat.completion" if is_chat else "text_completion", choice)
        if with_token_ids:
            choice["token_ids"] = self.output_ids
            (reply if is_chat else choice)["prompt_token_ids"] = self.ask.prompt_ids
        return reply | {"usage": self.usage}

    def opening(self) -> dict[str, Any] | None:
        """Give the first chunk of a stream, before any token; completions have none."""
        if not self.ask.is_chat:
            return None
        chunk = self._chunk({"role": "assistant", "content": ""}, new_ids=[])
        if self.ask.returns_token_ids:
            chunk["prompt_token_ids"] = self.ask.prompt_ids
        return chunk

    def piece(self, text: str, new_ids: list[int]) -> dict[str, Any]:
        """Give the chunk of the tokens and the text that a step brought, or of the end."""
        chunk = self._chunk({"content": text} if text else {}, new_ids=new_ids, text=text)
        is_first = len(new_ids) == len(self.output_ids)
        if self.ask.returns_token_ids and not self.ask.is_chat and is_first:
            chunk["choices"][0]["prompt_token_ids"] = self.ask.prompt_ids
        return chunk

    def usage_chunk(self) -> dict[str, Any]:
        """Give the last chunk of a stream that includes the usage."""
        return self._envelope(self._chunk_kind, None) | {"usage": self.usage}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.ask.is_chat else "text_completion"

    def _chunk(
        self, delta: dict[str, Any], *, new_ids: list[int], text: str = ""
    ) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": delta} if self.ask.is_chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": self.finish_reason}
        if self.ask.returns_token_ids:
            choice["token_ids"] = new_ids
        chunk = self._envelope(self._chunk_kind, choice)
        return chunk | {"usage": None} if self.ask.includes_usage else chunk

    def _envelope(self, kind: str, choice: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": [] if choice is None else [choice],
        }
