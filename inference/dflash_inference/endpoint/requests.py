"""A client's request as the decoder takes it: prompt ids and sampling, nothing left open.

What a request leaves out is the server's default, `data.serving_sampling`; what decided the tokens
is written down for the log, so that a recorded call says all about itself.
"""

import secrets
from dataclasses import dataclass
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dflash_inference.endpoint.options import CHAT, COMPLETIONS, StreamOptions, read_fields
from dflash_inference.endpoint.refusal import RefusedError, shown
from dflash_inference.sampling import SamplingParams
from dflash_train.config import ServingSampling
from dflash_train.records.chat_template import UnstableBoundaryError, render_request
from dflash_train.records.conversation import Conversation, Turn

GREEDY_BELOW = 1e-6
"""Temperature under which serving engines take the likeliest token."""


@dataclass(frozen=True, kw_only=True)
class ServingDefaults:
    """What a request leaves open."""

    model: str
    sampling: ServingSampling
    max_new_tokens: int
    max_positions: int
    """Positions that the target knows: prompt and answer, in tokens."""
    stop_token_ids: frozenset[int]
    """The target's own; a request may add to them."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request that was understood."""

    prompt_ids: list[int]
    params: SamplingParams
    is_chat: bool
    is_streamed: bool = False
    includes_usage: bool = False
    returns_token_ids: bool = False
    logged: dict[str, Any]
    """The request as the log shows it: every setting that decided tokens, with its value."""


def read_ask(
    body: Any,
    *,
    is_chat: bool,
    defaults: ServingDefaults,
    tokenizer: PreTrainedTokenizerBase,
    moment: str,
) -> Ask:
    """Read the JSON body of a request.

    Args:
        body: The parsed body.
        is_chat: Whether messages are asked about, or a prompt is continued.
        defaults: What the server takes for fields left out.
        tokenizer: The target's.
        moment: When the request came, RFC 3339 UTC, for templates that print the date.

    Raises:
        RefusedError: A field is missing, malformed, unknown or not supported.
    """
    given = read_fields(body, CHAT if is_chat else COMPLETIONS)
    if given["model"] != defaults.model:
        raise RefusedError(
            f"model (={shown(given['model'])}) is not served here. Set it to "
            f"{shown(defaults.model)}.",
            param="model", status=404, kind="not_found_error", code="model_not_found",
        )  # fmt: skip
    if is_chat:
        turns = [message.as_turn() for message in given["messages"]]
        prompt_ids = _render(turns, defaults, tokenizer, moment)
        said: dict[str, Any] = {"messages": [turn.as_message() for turn in turns]}
    else:
        prompt_ids, text = _read_prompt(given["prompt"], tokenizer)
        said = {"prompt": text}
    params = _params(given, defaults, num_prompt_tokens=len(prompt_ids))
    options = given.get("stream_options") or StreamOptions()
    is_streamed = given.get("stream", False)
    if "stream_options" in given and not is_streamed:
        raise RefusedError(
            "stream_options (=given) needs stream (=false) to be true. Set stream to true, or "
            "leave stream_options out.",
            param="stream_options",
        )
    return Ask(
        prompt_ids=prompt_ids,
        params=params,
        is_chat=is_chat,
        is_streamed=is_streamed,
        includes_usage=options.include_usage,
        returns_token_ids=given.get("return_token_ids", False),
        logged=_logged(given, params, defaults, said),
    )


def _render(
    turns: list[Turn], defaults: ServingDefaults, tokenizer: PreTrainedTokenizerBase, moment: str
) -> list[int]:
    """Give the ids of a chat, ready for the answer."""
    if turns[-1].role == "assistant" or all(turn.role != "user" for turn in turns):
        raise RefusedError(
            f"messages (of the roles {shown([turn.role for turn in turns])}) must hold a user's "
            "and end before the assistant's turn. Add a message of the role user.",
            param="messages",
        )
    record = Conversation(id="", source="serve", messages=turns, ts=moment)
    try:
        return render_request(tokenizer, record, serving=defaults.sampling)
    except UnstableBoundaryError as error:
        raise RefusedError(
            f"messages (of the roles {shown([turn.role for turn in turns])}) are refused by the "
            f"chat template: {error}",
            param="messages",
        ) from error


def _read_prompt(
    prompt: str | list[Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], str]:
    """Give the ids and the text of a completion's prompt."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        (prompt,) = prompt
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
    else:
        ids = prompt
    size = len(tokenizer)
    if not ids or not all(type(token) is int and 0 <= token < size for token in ids):
        raise RefusedError(
            f"prompt (={shown(prompt)}) must be a text, a list of one text, or token ids between 0 "
            f"and {size - 1}, at least one. Send several prompts as several requests.",
            param="prompt",
        )
    return ids, prompt if isinstance(prompt, str) else str(tokenizer.decode(ids))


def _params(
    given: dict[str, Any], defaults: ServingDefaults, *, num_prompt_tokens: int
) -> SamplingParams:
    """Complete the sampling settings; what a request leaves out is the server's default."""
    serving = defaults.sampling
    setting = {
        name: given.get(name, getattr(serving, name))
        for name in ("temperature", "top_p", "top_k", "min_p")
    }
    stop = given.get("stop", ())
    if setting["temperature"] < GREEDY_BELOW or setting["top_k"] == 1:
        setting["temperature"] = 0.0
    return SamplingParams(
        max_new_tokens=_budget(given, defaults, num_prompt_tokens=num_prompt_tokens),
        temperature=setting["temperature"],
        top_k=max(0, setting["top_k"]),
        top_p=setting["top_p"],
        min_p=setting["min_p"],
        seed=given.get("seed", secrets.randbits(31)),
        stop_token_ids=defaults.stop_token_ids.union(given.get("stop_token_ids", ())),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )


def _budget(given: dict[str, Any], defaults: ServingDefaults, *, num_prompt_tokens: int) -> int:
    """Give the budget in tokens: what is asked for, or what the server grants and has room for."""
    room = defaults.max_positions - num_prompt_tokens
    name = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    if "max_tokens" in given and given.get(name) != given["max_tokens"]:
        raise RefusedError(
            f"max_tokens (={given['max_tokens']}) and {name} (={given[name]}) contradict each "
            "other. Leave one out.",
            param="max_tokens",
        )
    asked = given.get(name)
    if (asked or 1) > room:
        raise RefusedError(
            f"{name} (={shown(asked)}) and a prompt of {num_prompt_tokens} tokens exceed the "
            f"{defaults.max_positions} positions of the model. Shorten the prompt, or lower "
            f"{name}.",
            param=name,
            code="context_length_exceeded",
        )
    return min(defaults.max_new_tokens, room) if asked is None else asked


def _logged(
    given: dict[str, Any], params: SamplingParams, defaults: ServingDefaults, said: dict[str, Any]
) -> dict[str, Any]:
    """Give the request with every setting that decided tokens, for whoever reads the log."""
    logged: dict[str, Any] = {
        "model": given["model"],
        **said,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": params.max_new_tokens,
    }
    if not params.is_greedy:
        logged["seed"] = params.seed
    if params.stop:
        logged["stop"] = list(params.stop)
    for name in ("enable_thinking", "reasoning_effort"):
        value = getattr(defaults.sampling, name)
        if value is not None:
            logged[name] = value
    return logged | {name: given[name] for name in _COPIED if name in given}


_COPIED = ("stop_token_ids", "user", "metadata")
"""Fields that the log shows as they were sent."""
