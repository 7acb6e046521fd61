"""The fields that clients may send: OpenAI's, each with its type and its rule in words.

A field that is not here is refused by its name; one that we cannot honour is accepted only with the
value that changes nothing. So no option is ever ignored. null is as good as absent.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from dflash_inference.endpoint.refusal import RefusedError, shown
from dflash_train.records.conversation import Turn

MOST_STOPS = 16
WholeNumber = Annotated[int, Meta(ge=1)]
TokenIds = Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)]
StopText = Annotated[str, Meta(min_length=1)]


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def as_turn(self) -> Turn:
        """Give the canonical message; the parts of its content joined."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return Turn(role=self.role, content=text, name=self.name)


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream shows beside tokens."""

    include_usage: bool = False


@dataclass(frozen=True)
class Option:
    """A field that is honoured: its type, and the rule in words."""

    type: Any
    rule: str


SHARED: dict[str, Option] = {
    "model": Option(str, "the name of a model that GET /v1/models lists"),
    "stream": Option(bool, "true or false"),
    "stream_options": Option(StreamOptions, 'an object such as {"include_usage": true}'),
    "temperature": Option(Annotated[float, Meta(ge=0)], "a number, 0 (greedy) or above"),
    "top_p": Option(Annotated[float, Meta(gt=0, le=1)], "a number above 0 and at most 1"),
    "top_k": Option(Annotated[int, Meta(ge=-1)], "a whole number; 0 and -1 are no limit"),
    "min_p": Option(Annotated[float, Meta(ge=0, le=1)], "a number between 0 and 1"),
    "seed": Option(
        Annotated[int, Meta(ge=0, le=2**63 - 1)], "a whole number between 0 and 2**63 - 1"
    ),
    "max_tokens": Option(WholeNumber, "a whole number of at least 1"),
    "stop": Option(
        StopText | Annotated[list[StopText], Meta(max_length=MOST_STOPS)],
        f"a text or a list of at most {MOST_STOPS} texts, none of them empty",
    ),
    "stop_token_ids": Option(TokenIds, "a list of token ids"),
    "return_token_ids": Option(bool, "true or false"),
    "user": Option(str, "a text"),
    "metadata": Option(dict[str, str], "an object of texts"),
}
CHAT: dict[str, Option] = SHARED | {
    "messages": Option(
        Annotated[list[Message], Meta(min_length=1)],
        "a list of messages, each with role (system, developer, user or assistant) and content "
        "(a text, or parts of type text); tools and images are not supported",
    ),
    "max_completion_tokens": Option(WholeNumber, "a whole number of at least 1"),
}
COMPLETIONS: dict[str, Option] = SHARED | {
    "prompt": Option(
        Annotated[str, Meta(min_length=1)] | list[str | int],
        "a text, a list of token ids, or a list of one text",
    ),
}

CHANGES_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "presence_penalty": (0,), "frequency_penalty": (0,),
    "repetition_penalty": (1,), "length_penalty": (1,), "logit_bias": ({},), "logprobs": (False,),
    "top_logprobs": (0,), "prompt_logprobs": (), "response_format": ({"type": "text"},),
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
    "functions": ([],), "function_call": ("none", "auto"), "echo": (False,), "suffix": ("",),
    "ignore_eos": (False,), "min_tokens": (0,), "use_beam_search": (False,), "store": (False,),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "service_tier": ("auto", "default"),
    "chat_template": (), "chat_template_kwargs": ({},), "modalities": (["text"],), "audio": (),
    "prediction": (), "reasoning_effort": (), "guided_json": (), "guided_regex": (),
    "guided_choice": (), "guided_grammar": (), "structured_outputs": (), "allowed_token_ids": (),
    "bad_words": ([],), "logits_processors": ([],), "truncate_prompt_tokens": (),
}  # fmt: skip
"""Known fields that are not supported, and their values that ask for nothing."""


def read_fields(body: Any, options: dict[str, Option]) -> dict[str, Any]:
    """Convert each field that is given.

    Args:
        body: The parsed body of a request.
        options: `CHAT` or `COMPLETIONS`.

    Raises:
        RefusedError: The body is no object, or a field is missing, malformed, unknown or not
            supported; the first of them is named.
    """
    if not isinstance(body, dict):
        raise RefusedError(f"The body (={shown(body)}) must be a JSON object.")
    given: dict[str, Any] = {}
    for name, value in body.items():
        if value is None:
            continue
        option = options.get(name)
        if option is None:
            _check_changes_nothing(name, value, options)
            continue
        try:
            given[name] = msgspec.convert(value, option.type)
        except msgspec.ValidationError:
            raise RefusedError(
                f"{name} (={shown(value)}) must be {option.rule}.", param=name
            ) from None
    for name in ("model", "messages" if "messages" in options else "prompt"):
        if name not in given:
            raise RefusedError(f"{name} (=null) must be set: {options[name].rule}.", param=name)
    return given


def _check_changes_nothing(name: str, value: Any, options: dict[str, Option]) -> None:
    if name not in CHANGES_NOTHING:
        raise RefusedError(
            f"{shown(name)} (={shown(value)}) is not a field of this endpoint. Leave it out; known "
            f"fields are {', '.join(options)}.",
            param=name,
            code="unknown_parameter",
        )
    neutral = CHANGES_NOTHING[name]
    if not any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral
    ):
        allowed = f", or set it to {' or '.join(map(shown, neutral))}" if neutral else ""
        raise RefusedError(
            f"{name} (={shown(value)}) is not supported. Leave it out{allowed}.",
            param=name,
            code="unsupported_parameter",
        )
