"""Conversations to token ids: prompts for the target, rows with a loss mask for training.

The template is the tokenizer's own. Where ids are logged or were generated they rule, and no
text is tokenised again. Otherwise a row is rendered with and without its answer, and the answer
begins where the common prefix ends; if the prompt does not come back unchanged, the row is
refused, since the target never saw those ids.
"""

from dataclasses import dataclass
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dflash_train.records.conversation import Conversation, Turn


@dataclass(kw_only=True)
class RenderedRow:
    """Token ids of a whole call and where the assistant wrote."""

    input_ids: list[int]
    loss_mask: list[bool]
    """True where the supervised assistant turn wrote the token, its stop token included."""


class UnstableBoundaryError(ValueError):
    """Rendering with and without the answer does not share the prompt's ids."""


class NoSupervisedTokenError(ValueError):
    """The answer renders to no token."""


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Turn],
    *,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Give the ids that a server feeds for these messages, ready for the assistant's turn."""
    return _render(tokenizer, messages, tools=tools, add_generation_prompt=True)


def render_row(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    *,
    stop_token_ids: frozenset[int],
) -> RenderedRow:
    """Give ids and loss mask of an answered conversation.

    Raises:
        UnstableBoundaryError: The template changes the prompt when the answer is there.
        NoSupervisedTokenError: The answer has no token.
    """
    if conversation.prompt_token_ids is not None and conversation.output_token_ids is not None:
        prompt, output = conversation.prompt_token_ids, conversation.output_token_ids
    else:
        prompt = render_prompt(tokenizer, conversation.prompt, tools=conversation.tools)
        whole = _render(
            tokenizer, conversation.messages, tools=conversation.tools, add_generation_prompt=False
        )
        if whole[: len(prompt)] != prompt:
            raise UnstableBoundaryError(
                "the chat template renders the prompt differently with its answer"
            )
        output = _until_stop(whole[len(prompt) :], stop_token_ids)
    if not output:
        raise NoSupervisedTokenError("the answer has no token")
    return RenderedRow(
        input_ids=[*prompt, *output], loss_mask=[False] * len(prompt) + [True] * len(output)
    )


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Turn],
    *,
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
) -> list[int]:
    text = tokenizer.apply_chat_template(
        [turn.as_message() for turn in messages],
        tools=list(tools) if tools is not None else None,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
    )
    return tokenizer(str(text), add_special_tokens=False).input_ids


def _until_stop(ids: list[int], stop_token_ids: frozenset[int]) -> list[int]:
    """Cut what a template prints after the stop token: the target never writes it."""
    for index, token_id in enumerate(ids):
        if token_id in stop_token_ids:
            return ids[: index + 1]
    return ids
