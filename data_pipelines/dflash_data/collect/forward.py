"""Planned rows through the target: what `collect` and its estimate spend their time on."""

import torch

from dflash_data.collect.plan import CollectionPlan
from dflash_train.config import DataConfig
from dflash_train.features.shard import EncodedRows, ShardRow, bytes_per_token, encode_rows
from dflash_train.features.target import Target


def compute_batch(
    plan: CollectionPlan, batch: list[int], *, target: Target, data: DataConfig
) -> EncodedRows:
    """Run the rows of one batch through the target and give them as a shard holds them."""
    rows = plan.read_rows(batch)
    answers = target.read_answers(
        [row.input_ids for row in rows],
        prompt_lengths=[row.prompt_length for row in rows],
        teacher_top_k=data.teacher_top_k,
    )
    read = [
        ShardRow(
            input_ids=torch.tensor(row.input_ids),
            loss_mask=torch.tensor(row.loss_mask),
            features=answer.features,
            teacher=answer.teacher,
        )
        for row, answer in zip(rows, answers, strict=True)
    ]
    return encode_rows(read, dtype=stored_dtype(data), num_taps=len(target.target_layer_ids))


def stored_dtype(data: DataConfig) -> torch.dtype:
    """Give the number format of stored features."""
    return getattr(torch, data.features_dtype.value)


def stored_token_bytes(target: Target, data: DataConfig) -> int:
    """Give the stored bytes of one token of this target."""
    return bytes_per_token(
        target.features_width,
        dtype=stored_dtype(data),
        num_taps=len(target.target_layer_ids),
        teacher_top_k=data.teacher_top_k,
    )
