"""Planned rows through the target: what `collect` and its estimate spend their time on.

`FeatureReader` is the seam between the stage and what runs the target. Here is the reader of this
process; `vllm_reader.py` has the other one. Both give the same rows in the same order, and so does
`TokenReader`, which leaves features out for `data.features=online`.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import torch

from dflash_data.collect.plan import CollectionPlan, PlannedRow
from dflash_train.config import DataConfig, FeaturesFrom
from dflash_train.features.shard import (
    ID_AND_MASK_BYTES,
    EncodedRows,
    ShardRow,
    bytes_per_token,
    encode_rows,
    encode_tokens,
)
from dflash_train.features.target import ReadAnswer, Target
from dflash_train.features.target_text import WrittenTarget


@dataclass(frozen=True, kw_only=True)
class PlannedBatch:
    """Some rows of a plan that stand together in their shard."""

    plan: CollectionPlan
    places: list[int]

    def rows(self) -> list[PlannedRow]:
        """Read the rows from the plan, shortest first."""
        return self.plan.read_rows(self.places)


class FeatureReader(Protocol):
    """What runs planned rows through the target."""

    @property
    def target(self) -> WrittenTarget:
        """Tokenizer and stop tokens, which planning needs."""
        ...

    @property
    def token_bytes(self) -> int:
        """Stored bytes of one token."""
        ...

    def scratch_bytes(self, num_tokens: int) -> int:
        """Give the disk that reading so many tokens takes beside the shards, in bytes."""
        ...

    def read(self, batches: list[PlannedBatch]) -> Generator[EncodedRows]:
        """Yield the rows of each batch as a shard holds them; close it if it is not read out."""
        ...


class TargetReader:
    """The target in this process: one pass per batch."""

    def __init__(self, target: Target, data: DataConfig) -> None:
        """Wrap a loaded target."""
        self.target = target
        self._data = data

    @property
    def token_bytes(self) -> int:
        """Stored bytes of one token."""
        return stored_token_bytes(self.target, self._data)

    def scratch_bytes(self, num_tokens: int) -> int:
        """Give 0: features go from memory to their shard."""
        return 0

    def read(self, batches: list[PlannedBatch]) -> Generator[EncodedRows]:
        """Run each batch through the target when it is asked for."""
        for batch in batches:
            rows = batch.rows()
            answers = self.target.read_answers(
                [row.input_ids for row in rows],
                prompt_lengths=[row.prompt_length for row in rows],
                teacher_top_k=self._data.teacher_top_k,
            )
            num_taps = len(self.target.target_layer_ids)
            yield encode_answers(rows, answers, data=self._data, num_taps=num_taps)


class TokenReader:
    """No target at all: rows keep their ids and masks, and training has the target read them."""

    def __init__(self, target: WrittenTarget) -> None:
        """Take the tokenizer that planning needs."""
        self.target = target

    @property
    def token_bytes(self) -> int:
        """Stored bytes of one token."""
        return ID_AND_MASK_BYTES

    def scratch_bytes(self, num_tokens: int) -> int:
        """Give 0: nothing stands beside the shards."""
        return 0

    def read(self, batches: list[PlannedBatch]) -> Generator[EncodedRows]:
        """Yield the rows of each batch as they were planned."""
        for batch in batches:
            rows = batch.rows()
            yield encode_tokens(
                [torch.tensor(row.input_ids) for row in rows],
                [torch.tensor(row.loss_mask) for row in rows],
            )


def encode_answers(
    rows: list[PlannedRow], answers: list[ReadAnswer], *, data: DataConfig, num_taps: int
) -> EncodedRows:
    """Join planned rows with what the target gave for them, as a shard holds them."""
    read = [
        ShardRow(
            input_ids=torch.tensor(row.input_ids),
            loss_mask=torch.tensor(row.loss_mask),
            features=answer.features,
            teacher=answer.teacher,
        )
        for row, answer in zip(rows, answers, strict=True)
    ]
    return encode_rows(read, dtype=stored_dtype(data), num_taps=num_taps)


def stored_dtype(data: DataConfig) -> torch.dtype:
    """Give the number format of stored features."""
    return getattr(torch, data.features_dtype.value)


def stored_token_bytes(target: Target, data: DataConfig) -> int:
    """Give the bytes of one token of this target that stages leave on the disk."""
    if data.features is FeaturesFrom.online:
        return ID_AND_MASK_BYTES
    return bytes_per_token(
        target.features_width,
        dtype=stored_dtype(data),
        num_taps=len(target.target_layer_ids),
        teacher_top_k=data.teacher_top_k,
    )
