"""From an answered record with exact token ids to a row of the feature store and its index line."""

import torch
from torch import Tensor

from dflash_train.config import DataConfig
from dflash_train.features.store import FeatureRow, IndexLine
from dflash_train.features.teacher import TeacherRow
from dflash_train.records.conversation import Conversation


def exact_ids(record: Conversation) -> tuple[list[int], list[int]]:
    """Give the ids of prompt and answer of a record that has been answered or rendered."""
    assert record.prompt_token_ids is not None
    assert record.output_token_ids is not None
    return record.prompt_token_ids, record.output_token_ids


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
        finish_reason=record.finish_reason or "stop",
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
        finish_reason=record.finish_reason or "stop",
        weight=record.weight,
    )


def _budget(record: Conversation, data: DataConfig) -> int:
    """Give the generation budget of an answer: ours, the logged one, or what its length implies."""
    if record.origin == "regenerated":
        return data.max_new_tokens
    num_output = len(exact_ids(record)[1])
    logged = record.sampling.get("max_tokens")
    if logged is not None:
        return max(int(logged), num_output)
    return num_output if record.finish_reason == "length" else num_output + data.max_new_tokens
