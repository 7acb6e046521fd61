"""The feature store: calls as rows of token ids with the target's features, in checksummed shards.

One folder holds one split. Shards (`features/shard.py`) hold the rows; `index.arrow` has one line a
call and is what `datasets` opens; `manifest.json` comes last. Several calls of one conversation may
view one stored row, each its first tokens. `bytes_per_token` gives the cost: 5.8 kB for
SmolLM2-135M with 5 taps in bf16, half of it in float8_e4m3fn.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from torch import Tensor

from dflash_train.config import require
from dflash_train.features.shard import (
    OpenShard,
    ShardRow,
    encode_rows,
    encode_tokens,
    write_encoded,
)
from dflash_train.features.teacher import TeacherRow
from dflash_train.records.manifest import Manifest, atomic_path

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

INDEX_NAME = "index.arrow"
WITHOUT_FEATURES = {"features": "online"}
"""Stands in the details of a manifest whose split holds token ids and loss masks alone."""
TOKENS_PREFIX = "tokens-"
"""Begins the names of shards that `regenerate` leaves without features."""
_ARROW_TYPES: dict[Any, str] = {str: "string", str | None: "string", int: "int64", bool: "bool"}


@dataclass(kw_only=True)
class IndexLine:
    """What is known of a call without reading it; one line of `index.arrow`."""

    id: str
    tenant: str | None
    session: str | None
    shard: str
    """File name of the shard."""
    row: int
    """Place of the stored row in its shard."""
    num_tokens: int
    """Tokens of the call: the stored row's, or its first ones where it serves a longer call too."""
    prompt_length: int
    """P: what follows is this call's answer; earlier answers in the row are other calls'."""
    max_length: int
    finish_reason: str
    weight: int


@dataclass(kw_only=True)
class FeatureRow:
    """One answered call as training and replay see it. N tokens, L taps, E hidden size."""

    id: str
    tenant: str | None
    session: str | None
    input_ids: Tensor
    """`[N]` int64."""
    loss_mask: Tensor
    """`[N]` bool, True where the target wrote the token."""
    features: Tensor
    """`[N, L*E]`; the last row is zeros, since the last token is never fed."""
    max_length: int
    """Prompt tokens + generation budget under which the answer was written."""
    finish_reason: str
    weight: int = 1
    """How many logged calls this row stands for."""
    teacher: TeacherRow | None = None
    """The target's distribution of the token after each, top k; None where none was kept."""

    @property
    def prompt_length(self) -> int:
        """P, tokens before the answer."""
        return int(self.loss_mask.int().argmax())

    def until_first_gap(self) -> "FeatureRow":
        """Give the row cut where the target's own text first stops, itself if it never does.

        Behind a placeholder stands text that the target never wrote in that context: acceptance is
        measured up to there. The teacher is left out.
        """
        first = self.prompt_length
        gaps = (~self.loss_mask[first:]).nonzero()
        if len(gaps) == 0:
            return self
        end = first + int(gaps[0])
        features = self.features[:end].clone()
        features[-1] = 0
        return replace(
            self,
            input_ids=self.input_ids[:end],
            loss_mask=self.loss_mask[:end],
            features=features,
            finish_reason="length",
            teacher=None,
        )


def write_shard(
    path: Path, rows: list[FeatureRow], *, dtype: torch.dtype, num_taps: int | None = None
) -> list[IndexLine]:
    """Write one shard atomically and give the index lines of its rows.

    Args:
        path: The file.
        rows: At least one; they carry a teacher of one k, or none does.
        dtype: Number format of the stored features.
        num_taps: L; only float8_e4m3fn needs it.
    """
    stored = [
        ShardRow(
            input_ids=row.input_ids,
            loss_mask=row.loss_mask,
            features=row.features,
            teacher=row.teacher,
        )
        for row in rows
    ]
    write_encoded(path, [encode_rows(stored, dtype=dtype, num_taps=num_taps)])
    return [
        IndexLine(
            id=row.id,
            tenant=row.tenant,
            session=row.session,
            shard=path.name,
            row=position,
            num_tokens=len(row.input_ids),
            prompt_length=row.prompt_length,
            max_length=row.max_length,
            finish_reason=row.finish_reason,
            weight=row.weight,
        )
        for position, row in enumerate(rows)
    ]


def write_token_shard(path: Path, rows: list[FeatureRow]) -> None:
    """Write one shard atomically without features and teacher, for `data.features=online`."""
    tokens = encode_tokens([row.input_ids for row in rows], [row.loss_mask for row in rows])
    write_encoded(path, [tokens])


def write_index(folder: Path, lines: list[IndexLine]) -> None:
    """Write `index.arrow` of a split; the order of the lines is the order of the store."""
    write_arrow(folder / INDEX_NAME, lines, IndexLine)


def write_arrow(path: Path, lines: "Sequence[DataclassInstance]", kind: type) -> None:
    """Write flat dataclass instances as an Arrow file that `datasets` opens, atomically.

    Args:
        path: The file.
        lines: Its rows.
        kind: Their dataclass; it gives the columns even where there is no row.
    """
    columns = {field.name: _ARROW_TYPES[field.type] for field in fields(kind)}
    schema = Features({name: Value(arrow_type) for name, arrow_type in columns.items()})
    with atomic_path(path) as partial:
        with ArrowWriter(path=str(partial), features=schema) as writer:
            for line in lines:
                writer.write(asdict(line))
            writer.finalize()


def read_index(folder: Path) -> list[IndexLine]:
    """Read the index of a split, in the order of the store."""
    index = Dataset.from_file(str(folder / INDEX_NAME))
    return [IndexLine(**line) for line in index.to_list()]


class FeatureStore:
    """Random access to the rows of one split."""

    def __init__(self, folder: Path, index: Dataset) -> None:
        """Wrap an opened index; use `FeatureStore.open`."""
        self.folder = folder
        self.index = index
        self._lines = [IndexLine(**line) for line in index.to_list()]
        self._shards: dict[str, OpenShard] = {}

    @classmethod
    def open(
        cls, folder: Path, *, verify: bool = True, needs_features: bool = True
    ) -> "FeatureStore":
        """Open a split.

        Args:
            folder: `features/<split>` of a run.
            verify: Recompute every checksum first, which reads each byte once.
            needs_features: Refuse a split of `data.features=online`, of which only `lines` and
                `read_tokens` can be read.

        Raises:
            ValueError: The folder is not complete or holds no features, or a file does not match
                its checksum; the message names it.
        """
        manifest = Manifest.read(folder)
        if manifest is None:
            raise ValueError(f"{folder} holds no complete features. Run the stage `collect` first.")
        require(
            not needs_features or not WITHOUT_FEATURES.items() <= manifest.details.items(),
            f"{folder} holds token ids without features, since data.features (=online) keeps none. "
            "Run `collect` with data.features=stored.",
        )
        if verify:
            manifest.verify_outputs(folder)
        return cls(folder, Dataset.from_file(str(folder / INDEX_NAME)))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._lines)

    def __getitem__(self, position: int) -> FeatureRow:
        """Read one call as if it stood alone; features in the stored dtype, 8 bits as bfloat16.

        The tensors may be views of the mapped file: they must not be written to.
        """
        line = self._lines[position]
        row = self._open_shard(line.shard).read(
            line.row, prompt_length=line.prompt_length, num_tokens=line.num_tokens
        )
        return FeatureRow(
            id=line.id,
            tenant=line.tenant,
            session=line.session,
            input_ids=row.input_ids,
            loss_mask=row.loss_mask,
            features=row.features,
            max_length=line.max_length,
            finish_reason=line.finish_reason,
            weight=line.weight,
            teacher=row.teacher,
        )

    def read(self, positions: Sequence[int]) -> list[FeatureRow]:
        """Read several calls, in the order of their positions."""
        return [self[position] for position in positions]

    def read_tokens(self, position: int) -> tuple[Tensor, Tensor]:
        """Read a row's `input_ids` and `loss_mask` alone, 9 bytes a token."""
        line = self._lines[position]
        return self._open_shard(line.shard).read_tokens(
            line.row, prompt_length=line.prompt_length, num_tokens=line.num_tokens
        )

    @property
    def lines(self) -> list[IndexLine]:
        """What is known of every row without reading it, in the order of the store."""
        return self._lines

    def _open_shard(self, name: str) -> OpenShard:
        if name not in self._shards:
            self._shards[name] = OpenShard(self.folder / name)
        return self._shards[name]
