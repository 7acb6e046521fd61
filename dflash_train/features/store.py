"""The feature store: rows of token ids with the target's features, in checksummed shards.

One folder holds one split. A shard is a safetensors file with `input_ids [N]`, `loss_mask [N]`,
`features [N, L*E]` and `offsets [rows + 1]`, and `teacher_ids [N, k]`, `teacher_probabilities
[N, k]` where `data.teacher_top_k` asks for them (`features/teacher.py`); `index.arrow` has one line
a row and is what `datasets` opens; `manifest.json` comes last. Shards are memory-mapped: a row
costs one read of its own bytes. Cost: N*L*E*2 bytes in bf16, 5.8 kB per token for SmolLM2-135M with
5 taps; the teacher adds 8*k bytes per token, 64 at k = 8.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dflash_train.features.teacher import TeacherRow, join
from dflash_train.records.manifest import Manifest, atomic_path

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

INDEX_NAME = "index.arrow"
_ARROW_TYPES: dict[Any, str] = {str: "string", str | None: "string", int: "int64", bool: "bool"}


@dataclass(kw_only=True)
class IndexLine:
    """What is known of a stored row without reading it; one line of `index.arrow`."""

    id: str
    tenant: str | None
    session: str | None
    shard: str
    """File name of the shard."""
    row: int
    """Place of the row in its shard."""
    num_tokens: int
    prompt_length: int
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


def write_shard(path: Path, rows: list[FeatureRow], *, dtype: torch.dtype) -> list[IndexLine]:
    """Write one shard atomically and give the index lines of its rows.

    The rows carry a teacher of one k, or none does.
    """
    lengths = torch.tensor([0, *(len(row.input_ids) for row in rows)])
    tensors = {
        "input_ids": torch.cat([row.input_ids for row in rows]),
        "loss_mask": torch.cat([row.loss_mask for row in rows]),
        "features": torch.cat([row.features.to(dtype).cpu() for row in rows]),
        "offsets": lengths.cumsum(0),
        **_teacher_tensors(rows),
    }
    with atomic_path(path) as partial:
        save_file(tensors, partial)
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


def _teacher_tensors(rows: list[FeatureRow]) -> dict[str, Tensor]:
    teachers = [row.teacher for row in rows if row.teacher is not None]
    if not teachers:
        return {}
    assert len(teachers) == len(rows), "some rows of a shard carry a teacher and some do not"
    teacher = join(teachers)
    return {
        "teacher_ids": teacher.ids.cpu(),
        "teacher_probabilities": teacher.probabilities.cpu(),
    }


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
        self._shards: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> "FeatureStore":
        """Open a split.

        Args:
            folder: `features/<split>` of a run.
            verify: Recompute every checksum first, which reads each byte once.

        Raises:
            ValueError: The folder is not complete, or a file does not match its checksum; the
                message names it.
        """
        manifest = Manifest.read(folder)
        if manifest is None:
            raise ValueError(f"{folder} holds no complete features. Run the stage `collect` first.")
        if verify:
            manifest.verify_outputs(folder)
        return cls(folder, Dataset.from_file(str(folder / INDEX_NAME)))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._lines)

    def __getitem__(self, position: int) -> FeatureRow:
        """Read one row; features keep the stored dtype."""
        line = self._lines[position]
        shard, tokens = self._locate(line)
        return FeatureRow(
            id=line.id,
            tenant=line.tenant,
            session=line.session,
            input_ids=shard.get_slice("input_ids")[tokens],
            loss_mask=shard.get_slice("loss_mask")[tokens],
            features=shard.get_slice("features")[tokens],
            max_length=line.max_length,
            finish_reason=line.finish_reason,
            weight=line.weight,
            teacher=_read_teacher(shard, tokens),
        )

    def read_tokens(self, position: int) -> tuple[Tensor, Tensor]:
        """Read a row's `input_ids` and `loss_mask` alone, 9 bytes a token."""
        shard, tokens = self._locate(self._lines[position])
        return shard.get_slice("input_ids")[tokens], shard.get_slice("loss_mask")[tokens]

    @property
    def lines(self) -> list[IndexLine]:
        """What is known of every row without reading it, in the order of the store."""
        return self._lines

    def _locate(self, line: IndexLine) -> tuple[Any, slice]:
        """Give a row's open shard and its tokens' places in there."""
        shard = self._open_shard(line.shard)
        first, end = shard.get_slice("offsets")[line.row : line.row + 2].tolist()
        return shard, slice(first, end)

    def _open_shard(self, name: str) -> Any:
        if name not in self._shards:
            path = self.folder / name
            try:
                self._shards[name] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{path} cannot be read: {error}. Delete it and run `collect` again."
                ) from error
        return self._shards[name]


def _read_teacher(shard: Any, tokens: slice) -> TeacherRow | None:
    if "teacher_ids" not in shard.keys():
        return None
    return TeacherRow(
        ids=shard.get_slice("teacher_ids")[tokens],
        probabilities=shard.get_slice("teacher_probabilities")[tokens],
    )
