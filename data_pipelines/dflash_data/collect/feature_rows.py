"""From an answered record to token ids and loss mask, and to a row of the feature store.

Ids of an engine's log are the truth about what the target wrote, if they are this target's and
whole. Both are checked here, where its tokenizer is at hand. Text never replaces ids that fail.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dflash_data.drops import DropReason
from dflash_train.config import DataConfig, ServingSampling
from dflash_train.features.store import FeatureRow, IndexLine
from dflash_train.features.target_text import WrittenTarget
from dflash_train.features.teacher import TeacherRow
from dflash_train.records.chat_template import (
    NoSupervisedTokenError,
    RenderedRow,
    UnstableBoundaryError,
    render_row,
)
from dflash_train.records.conversation import Conversation, Turn

_CONTEXT_TOKENS = 8
"""Prompt tokens decoded before an answer, for tokenizers that drop a space at a text's start."""


def answer_row(
    record: Conversation, target: WrittenTarget, *, serving: ServingSampling
) -> RenderedRow | DropReason:
    """Give ids and loss mask of an answered record, or why it has none.

    Its own ids rule where it has them and they hold; a record without them, as every redacted one
    is, goes through the chat template.

    Args:
        record: On-policy or regenerated.
        target: Gives tokenizer and stop tokens.
        serving: `data.serving_sampling`; its thinking mode is the template's.
    """
    if has_exact_ids(record):
        fault = ids_fault(record, target)
        if fault is not None:
            return fault
    try:
        return render_row(
            target.tokenizer, record, stop_token_ids=target.stop_token_ids, serving=serving
        )
    except UnstableBoundaryError:
        return DropReason.unstable_boundary
    except NoSupervisedTokenError:
        return DropReason.no_supervised_token


def has_exact_ids(record: Conversation) -> bool:
    """Say whether a record carries the ids of both prompt and answer."""
    return record.prompt_token_ids is not None and record.output_token_ids is not None


def ids_fault(record: Conversation, target: WrittenTarget) -> DropReason | None:
    """Check a record's ids: of this tokenizer, as many as counted, and they spell the answer.

    Engines do not log which tokenizer they used, so ids of an on-policy record without a hash are
    the target's.

    Returns:
        `truncated_log`, `ids_mismatch`, or None if they hold.
    """
    prompt, output = exact_ids(record)
    is_ours = (
        record.on_policy
        if record.tokenizer is None
        else (record.tokenizer == target.tokenizer_hash)
    )
    if not is_ours:
        return DropReason.ids_mismatch
    if record.usage.get("completion_tokens", len(output)) != len(output):
        return DropReason.truncated_log
    if not all(0 <= token_id < len(target.tokenizer) for token_id in (*prompt, *output)):
        return DropReason.ids_mismatch
    return None if _spells_the_answer(record, target) else DropReason.ids_mismatch


def exact_ids(record: Conversation) -> tuple[list[int], list[int]]:
    """Give the ids of prompt and answer of a record that has been answered or rendered."""
    assert record.prompt_token_ids is not None
    assert record.output_token_ids is not None
    return record.prompt_token_ids, record.output_token_ids


def _spells_the_answer(record: Conversation, target: WrittenTarget) -> bool:
    """Say whether the decoded output, up to its final stop token, is the logged answer.

    Where the server took reasoning or tool calls out of the text, its parts must all be in there.
    Behind the text there may be the client's stop string, which servers cut off.
    """
    answer = record.answer
    assert answer is not None, "ids of an answer come with the answer"
    logged = (answer.content or "").rstrip("\ufffd")
    stops = record.sampling.get("stop") or []
    stops = [stop for stop in (stops if isinstance(stops, list) else [stops]) if type(stop) is str]
    for text in _decoded_output(record, target):
        if answer.reasoning or answer.tool_calls:
            if all(part.strip() in text for part in _parts(answer)):
                return True
        elif text == logged or any(text.startswith(logged + stop) for stop in stops):
            return True
    return False


def _decoded_output(record: Conversation, target: WrittenTarget) -> Iterator[str]:
    """Decode the output in each way that servers do: special tokens or not, after its prompt."""
    prompt, output = exact_ids(record)
    if output and output[-1] in target.stop_token_ids:
        output = output[:-1]
    context = prompt[-_CONTEXT_TOKENS:]
    for skips in (True, False):
        yield _decode(output, target, skips_special=skips)
        before = _decode(context, target, skips_special=skips)
        both = _decode([*context, *output], target, skips_special=skips)
        if both.startswith(before):
            yield both.removeprefix(before)


def _decode(ids: list[int], target: WrittenTarget, *, skips_special: bool) -> str:
    text = target.tokenizer.decode(
        ids, skip_special_tokens=skips_special, clean_up_tokenization_spaces=False
    )
    return str(text).rstrip("\ufffd")  # a character whose last bytes were cut off


def _parts(answer: Turn) -> list[str]:
    names = [call["name"] for call in answer.tool_calls or ()]
    return [answer.content or "", answer.reasoning or "", *names]


def feature_row(
    record: Conversation, features: Tensor, data: DataConfig, *, teacher: TeacherRow | None
) -> FeatureRow:
    """Join a record with its features `[N, L*E]` and, where it is kept, its teacher `[N, k]`."""
    prompt, output = exact_ids(record)
    return FeatureRow(
        id=record.id,
        tenant=record.tenant,
        session=record.session,
        input_ids=torch.tensor(prompt + output),
        loss_mask=torch.tensor([False] * len(prompt) + [True] * len(output)),
        features=features,
        max_length=len(prompt) + _budget(record, data),
        finish_reason=_finish_reason(record),
        weight=record.weight,
        teacher=teacher,
    )


def index_line(record: Conversation, data: DataConfig, *, shard: str, row: int) -> IndexLine:
    """Say where a record's row stands, and what is known of it without reading it."""
    prompt, output = exact_ids(record)
    return IndexLine(
        id=record.id,
        tenant=record.tenant,
        session=record.session,
        shard=shard,
        row=row,
        num_tokens=len(prompt) + len(output),
        prompt_length=len(prompt),
        max_length=len(prompt) + _budget(record, data),
        finish_reason=_finish_reason(record),
        weight=record.weight,
    )


def _finish_reason(record: Conversation) -> str:
    """Give why the answer ended; one that the log does not tell is never taken for a stop."""
    return record.finish_reason or "length"


def _budget(record: Conversation, data: DataConfig) -> int:
    """Give the generation budget of an answer: ours, the logged one, or what its length implies."""
    if record.origin == "regenerated":
        return data.max_new_tokens
    num_output = len(exact_ids(record)[1])
    logged = record.sampling.get("max_tokens")
    if logged is not None:
        return max(int(logged), num_output)
    return num_output if record.finish_reason == "length" else num_output + data.max_new_tokens
