"""Rows of a split whose features the target computes when they are read: `data.features=online`.

The split's folder holds token ids, loss masks and the index, as a feature store does; the features
that it lacks come from one target pass over each row that is asked for, rounded as the store would
round them. What is recomputed is equal to the bit as long as the same rows are asked for together
(`features/online_passes.py`).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dflash_train.config import DataConfig
from dflash_train.features.online_passes import Pass, SharedRow, plan_passes
from dflash_train.features.quantization import QuantizedFeatures, dequantize, quantize
from dflash_train.features.store import FeatureRow, FeatureStore, IndexLine
from dflash_train.features.target import ReadAnswer
from dflash_train.features.teacher import TeacherRow


class AnswerReader(Protocol):
    """What runs finished rows through the target; a `Target` does."""

    def read_answers(
        self, rows: list[list[int]], *, prompt_lengths: list[int], teacher_top_k: int
    ) -> list[ReadAnswer]:
        """Give features, and the distributions of the answers' tokens if they are kept."""
        ...


class SharedReader:
    """A reader that several threads use in turn, until it is closed.

    Taps are hooks on the target's layers, so a pass must never run beside another one. Closing
    waits for the pass under way; what was asked ahead and is no longer wanted then ends at once.
    """

    def __init__(self, reader: AnswerReader) -> None:
        """Wrap a reader that nobody else uses until this one is closed."""
        self._reader = reader
        self._turn = threading.Lock()
        self._is_open = True

    def read_answers(
        self, rows: list[list[int]], *, prompt_lengths: list[int], teacher_top_k: int
    ) -> list[ReadAnswer]:
        """Run rows when it is this thread's turn.

        Raises:
            RuntimeError: The reader is closed.
        """
        with self._turn:
            if not self._is_open:
                raise RuntimeError("training has ended, and the target reads no more rows for it.")
            return self._reader.read_answers(
                rows, prompt_lengths=prompt_lengths, teacher_top_k=teacher_top_k
            )

    def __enter__(self) -> "SharedReader":
        return self

    def __exit__(self, *raised: object) -> None:
        with self._turn:
            self._is_open = False


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows are read, the same for all splits of a run."""

    dtype: torch.dtype
    """Number format to which features are rounded, `data.features_dtype`."""
    num_taps: int
    """L."""
    teacher_top_k: int
    """Tokens kept of the target's distributions; 0 keeps none."""
    batch_size: int
    """Rows of a target pass, at most."""

    @classmethod
    def of(cls, data: DataConfig, *, num_taps: int) -> "Reading":
        """Take the settings of a recipe."""
        return cls(
            dtype=getattr(torch, data.features_dtype.value),
            num_taps=num_taps,
            teacher_top_k=data.teacher_top_k,
            batch_size=data.batch_size,
        )


class OnlineRows:
    """The rows of one split; a `RowSource`."""

    def __init__(
        self,
        tokens: FeatureStore,
        reader: AnswerReader,
        *,
        reading: Reading,
        device: torch.device | None = None,
        kept_bytes: int = 0,
    ) -> None:
        """Read nothing yet.

        Args:
            tokens: The split, opened with `needs_features=False`.
            reader: The target.
            reading: How it reads.
            device: Where features are put; None is the main memory.
            kept_bytes: Bytes of features that are kept for the next time, those read first.
        """
        self._tokens = tokens
        self._reader = reader
        self._reading = reading
        self._device = device or torch.device("cpu")
        self._kept: dict[Pass, dict[int, FeatureRow]] = {}
        self._room = kept_bytes

    @property
    def folder(self) -> Path:
        """Folder of the split."""
        return self._tokens.folder

    @property
    def lines(self) -> list[IndexLine]:
        """What is known of every row without reading it."""
        return self._tokens.lines

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._tokens)

    def __getitem__(self, position: int) -> FeatureRow:
        """Read one row; many are read faster together."""
        return self.read([position])[0]

    def read_tokens(self, position: int) -> tuple[Tensor, Tensor]:
        """Read a row's `input_ids` and `loss_mask` alone, without a target pass."""
        return self._tokens.read_tokens(position)

    def read(self, positions: Sequence[int]) -> list[FeatureRow]:
        """Run rows through the target, or give those that are kept."""
        rows: dict[int, FeatureRow] = {}
        for together in plan_passes(self.lines, positions, batch_size=self._reading.batch_size):
            rows |= self._kept.get(together) or self._run(together)
        return [rows[position] for position in positions]

    def _run(self, together: Pass) -> dict[int, FeatureRow]:
        """Give the calls of one pass by position, and keep them while there is room.

        A pass is kept or read again as a whole: in another group its features would round
        differently, and a resumed run would not repeat the one before.
        """
        answers = self._reader.read_answers(
            [self.read_tokens(row[0])[0].tolist() for row in together],
            prompt_lengths=[
                min(self.lines[call].prompt_length for call in row) for row in together
            ],
            teacher_top_k=self._reading.teacher_top_k,
        )
        rows: dict[int, FeatureRow] = {}
        for row, answer in zip(together, answers, strict=True):
            rows |= self._calls_of(row, answer)
        num_bytes = sum(row.features.nbytes for row in rows.values())
        if num_bytes <= self._room:
            self._room -= num_bytes
            self._kept[together] = rows
        return rows

    def _calls_of(self, row: SharedRow, answer: ReadAnswer) -> dict[int, FeatureRow]:
        reading = self._reading
        features = as_stored(answer.features, dtype=reading.dtype, num_taps=reading.num_taps)
        features = features.to(self._device)
        return {call: self._call(call, features, answer.teacher) for call in row}

    def _call(self, position: int, features: Tensor, teacher: TeacherRow | None) -> FeatureRow:
        """Cut a call out of the row that serves it, as if it had been read alone."""
        line = self.lines[position]
        input_ids, loss_mask = self.read_tokens(position)
        if line.num_tokens < len(features):  # the longer call did feed this last token
            features = functional.pad(features[: line.num_tokens - 1], (0, 0, 0, 1))
        return FeatureRow(
            id=line.id,
            tenant=line.tenant,
            session=line.session,
            input_ids=input_ids,
            loss_mask=loss_mask,
            features=features,
            max_length=line.max_length,
            finish_reason=line.finish_reason,
            weight=line.weight,
            teacher=None if teacher is None else _own_part(teacher, line),
        )


def as_stored(features: Tensor, *, dtype: torch.dtype, num_taps: int) -> Tensor:
    """Give features `[N, L*E]` as a store of a number format gives them back.

    Args:
        features: What the target gave.
        dtype: Format of the store; float8_e4m3fn comes back as bfloat16, in main memory.
        num_taps: L.
    """
    if dtype is not torch.float8_e4m3fn:
        return features.to(dtype)
    stored = quantize(features, num_taps)
    in_memory = QuantizedFeatures(values=stored.values.cpu(), scales=stored.scales.cpu())
    return dequantize(in_memory, torch.bfloat16)


def _own_part(teacher: TeacherRow, line: IndexLine) -> TeacherRow:
    """Give the distributions of a call's own answer, `[N, k]`: rows P - 1 .. N - 2, else zeros."""
    first, last = line.prompt_length - 1, line.num_tokens - 1
    frame = (0, 0, first, 1)
    return TeacherRow(
        ids=functional.pad(teacher.ids[first:last].cpu(), frame),
        probabilities=functional.pad(teacher.probabilities[first:last].cpu(), frame),
    )
