"""One shard of the feature store: rows end to end in a safetensors file.

`input_ids [N]`, `loss_mask [N]`, `features [N, L*E]`, `offsets [rows + 1]`; with float8_e4m3fn
`scales [N, L]` (`features/quantization.py`); with `data.teacher_top_k` `teacher_ids [N, k]` and
`teacher_probabilities [N, k]` (`features/teacher.py`). The file is memory-mapped: a row costs one
read of its own bytes.

The calls of one conversation repeat their history, so a call whose tokens begin a longer call need
not be stored: it is read as the first tokens of that row. What belongs to the longer row alone, the
features of the last token and everything supervised elsewhere, is taken out in reading.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from dflash_train.features.quantization import (
    SCALE_BYTES,
    QuantizedFeatures,
    dequantize,
    quantize,
)
from dflash_train.features.teacher import KEPT_TOKEN_BYTES, TeacherRow, join
from dflash_train.records.manifest import atomic_path

ID_AND_MASK_BYTES = 9
"""Stored bytes of one token beside its features: an int64 id and a bool."""


@dataclass(kw_only=True)
class ShardRow:
    """What a shard holds of one row. N tokens, L taps, E hidden size."""

    input_ids: Tensor
    """`[N]` int64."""
    loss_mask: Tensor
    """`[N]` bool, True where the target wrote the token."""
    features: Tensor
    """`[N, L*E]`; the last row is zeros, since the last token is never fed."""
    teacher: TeacherRow | None
    """`[N, k]`; None where none was kept."""


@dataclass(kw_only=True)
class EncodedRows:
    """Rows in the form in which a shard holds them, on the CPU."""

    lengths: list[int]
    """Tokens of each row."""
    tensors: Mapping[str, Tensor]
    """All tensors but `offsets`, each `[N, ...]` with the rows end to end."""


def encode_rows(rows: list[ShardRow], *, dtype: torch.dtype, num_taps: int | None) -> EncodedRows:
    """Convert rows to the form in which a shard holds them.

    Features are converted where they are, so that a GPU sends the smaller format.

    Args:
        rows: At least one; they carry a teacher of one k, or none does.
        dtype: Number format of the stored features.
        num_taps: L; only float8_e4m3fn needs it.
    """
    tensors = {
        "input_ids": torch.cat([row.input_ids for row in rows]),
        "loss_mask": torch.cat([row.loss_mask for row in rows]),
        **_feature_tensors(torch.cat([row.features for row in rows]), dtype, num_taps),
        **_teacher_tensors(rows),
    }
    return EncodedRows(
        lengths=[len(row.input_ids) for row in rows],
        tensors={name: tensor.cpu() for name, tensor in tensors.items()},
    )


def encode_tokens(input_ids: list[Tensor], loss_masks: list[Tensor]) -> EncodedRows:
    """Give rows as a shard without features holds them: 9 bytes a token.

    Args:
        input_ids: `[N]` int64 of each row.
        loss_masks: `[N]` bool of each row.
    """
    return EncodedRows(
        lengths=[len(ids) for ids in input_ids],
        tensors={"input_ids": torch.cat(input_ids), "loss_mask": torch.cat(loss_masks)},
    )


def write_encoded(path: Path, parts: list[EncodedRows]) -> None:
    """Write one shard atomically, the rows of all parts in order.

    It takes up to twice the shard's bytes of memory beside the parts themselves.
    """
    lengths = torch.tensor([0, *(length for part in parts for length in part.lengths)])
    names = parts[0].tensors.keys()
    tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in names}
    with atomic_path(path) as partial:
        save_file({**tensors, "offsets": lengths.cumsum(0)}, partial)


def bytes_per_token(
    features_width: int, *, dtype: torch.dtype, num_taps: int, teacher_top_k: int
) -> int:
    """Give the stored bytes of one token: id, loss mask, features with their scales, teacher.

    5769 for SmolLM2-135M with 5 taps in bfloat16, 2909 in float8_e4m3fn.

    Args:
        features_width: L*E.
        dtype: Number format of the stored features.
        num_taps: L.
        teacher_top_k: k; 0 keeps no teacher.
    """
    scales = num_taps * SCALE_BYTES if dtype is torch.float8_e4m3fn else 0
    features = features_width * dtype.itemsize + scales
    return ID_AND_MASK_BYTES + features + teacher_top_k * KEPT_TOKEN_BYTES


class OpenShard:
    """Random access to the rows of one memory-mapped shard."""

    def __init__(self, path: Path) -> None:
        """Open a shard.

        Raises:
            ValueError: The file cannot be read; the message names it.
        """
        try:
            file: Any = safe_open(path, framework="pt")
            # Views of the mapped file: nothing is read yet, and its own slices leak with each read.
            self._tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}
            self._offsets: list[int] = self._tensors["offsets"].tolist()
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} cannot be read: {error}. Delete it and run `collect` again."
            ) from error

    def read(self, row: int, *, prompt_length: int, num_tokens: int) -> ShardRow:
        """Read a call that begins a stored row, as if it stood alone.

        Args:
            row: Place of the stored row.
            prompt_length: P of the call; only what comes after it is supervised.
            num_tokens: N of the call, at most that of the stored row.

        Returns:
            Features in the stored dtype, in bfloat16 where that is float8_e4m3fn.
        """
        tokens = self._tokens(row, num_tokens)
        features = self._read_features(tokens)
        if tokens.stop < self._offsets[row + 1]:  # the longer call did feed this last token
            features = functional.pad(features[:-1], (0, 0, 0, 1))
        input_ids, loss_mask = self.read_tokens(
            row, prompt_length=prompt_length, num_tokens=num_tokens
        )
        return ShardRow(
            input_ids=input_ids,
            loss_mask=loss_mask,
            features=features,
            teacher=self._read_teacher(tokens, prompt_length),
        )

    def read_tokens(
        self, row: int, *, prompt_length: int, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Read `input_ids` and `loss_mask` alone; see `read` for the arguments."""
        tokens = self._tokens(row, num_tokens)
        written = self._slice("loss_mask", tokens)
        return self._slice("input_ids", tokens), _only_from(written, prompt_length)

    def _tokens(self, row: int, num_tokens: int) -> slice:
        first = self._offsets[row]
        return slice(first, first + num_tokens)

    def _slice(self, name: str, tokens: slice) -> Tensor:
        """Give a view of the mapped file: it must not be written to."""
        return self._tensors[name][tokens]

    def _read_features(self, tokens: slice) -> Tensor:
        features = self._slice("features", tokens)
        if "scales" not in self._tensors:
            return features
        quantized = QuantizedFeatures(values=features, scales=self._slice("scales", tokens))
        return dequantize(quantized, torch.bfloat16)

    def _read_teacher(self, tokens: slice, prompt_length: int) -> TeacherRow | None:
        """Give the distributions of the call's own answer: rows P - 1 .. N - 2."""
        if "teacher_ids" not in self._tensors:
            return None
        ids, probabilities = (
            functional.pad(
                _only_from(self._slice(name, tokens)[:-1], prompt_length - 1), (0, 0, 0, 1)
            )
            for name in ("teacher_ids", "teacher_probabilities")
        )
        return TeacherRow(ids=ids, probabilities=probabilities)


def _only_from(values: Tensor, first: int) -> Tensor:
    """Give a copy `[N, ...]` whose rows before `first` are zeros."""
    kept = torch.zeros_like(values)
    kept[first:] = values[first:]
    return kept


def _feature_tensors(
    features: Tensor, dtype: torch.dtype, num_taps: int | None
) -> dict[str, Tensor]:
    if dtype is not torch.float8_e4m3fn:
        return {"features": features.to(dtype)}
    assert num_taps is not None, "float8_e4m3fn has a scale for each tap: num_taps must be given"
    quantized = quantize(features, num_taps)
    return {"features": quantized.values, "scales": quantized.scales}


def _teacher_tensors(rows: list[ShardRow]) -> dict[str, Tensor]:
    teachers = [row.teacher for row in rows if row.teacher is not None]
    if not teachers:
        return {}
    assert len(teachers) == len(rows), "some rows of a shard carry a teacher and some do not"
    teacher = join(teachers)
    return {"teacher_ids": teacher.ids, "teacher_probabilities": teacher.probabilities}
