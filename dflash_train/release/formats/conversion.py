"""Read a drafter of any dialect, and write one with an audit of what was written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dflash_train.config import require
from dflash_train.drafter.checkpoint import (
    build_drafter,
    read_tensors,
    with_golden,
    write_folder,
)
from dflash_train.drafter.golden import check_golden
from dflash_train.drafter.metadata import METADATA_NAME, CheckpointMetadata, read_metadata
from dflash_train.drafter.model import Drafter
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.release.formats import speculators, zlab
from dflash_train.release.formats.audit import audit
from dflash_train.release.formats.detection import (
    Format,
    Imported,
    detect,
    read_content,
    refuse_pickles,
)
from dflash_train.release.formats.target_tables import BORROWED, add_tables, drop_tables

_WRITERS = {Format.zlab: zlab, Format.speculators: speculators}


@dataclass(kw_only=True)
class Written:
    """An export that was read back and found equal."""

    folder: Path
    format: Format
    num_tensors: int
    remarks: list[str]
    """What some readers of the format do differently; sentences."""


def read_drafter(
    folder: Path,
    *,
    target: dict[str, Any] | None = None,
    head: FrozenHead | None = None,
    dtype: torch.dtype | None = None,
) -> Imported:
    """Read a drafter folder of any dialect; where it has a golden forward, compute it again.

    Args:
        folder: Local.
        target: The target's `num_hidden_layers`, which speculators' own files do not tell.
        head: The target's tables, for files that carry copies of them.
        dtype: Number format to load in; None keeps each tensor's.

    Raises:
        ValueError: The folder is of no known dialect, holds a pickle, cannot be represented, or
            gives other numbers than when it was saved.
    """
    kind = detect(folder)
    refuse_pickles(folder)
    content, tensors = read_content(folder), read_tensors(folder)
    metadata = read_metadata(folder)
    if kind is Format.speculators:
        config, notes = speculators.to_config(content, folder, target=target)
        tensors, changes = drop_tables(tensors, head, folder)
        metadata = metadata or speculators.target_of(content)
    else:
        config, notes = zlab.to_config(content, folder)
        tensors, changes = zlab.from_tensors(tensors)
    drafter = build_drafter(config, tensors, folder)
    _check_golden(drafter, metadata, folder)
    return Imported(
        drafter=drafter if dtype is None else drafter.to(dtype),
        metadata=metadata,
        format=kind,
        notes=[*notes, *changes],
    )


def carries_tables(folder: Path) -> bool:
    """Tell whether the weights hold copies of the target's tables, which must be compared."""
    return any(name in BORROWED for name in read_tensors(folder))


def _check_golden(drafter: Drafter, metadata: CheckpointMetadata | None, folder: Path) -> None:
    golden = None if metadata is None else metadata.golden
    if golden is None:
        return
    error = check_golden(drafter, golden)
    require(
        error <= golden.tolerance,
        f"checkpoint (={folder}) does not compute what it computed when it was saved: the golden "
        f"forward of {METADATA_NAME} is {error:.1g} off, {golden.tolerance:g} is allowed. "
        "config.json or the weights were changed; fetch it again, or run `dflash-train doctor`.",
    )


def write_drafter(
    drafter: Drafter,
    folder: Path,
    *,
    format: Format,
    metadata: CheckpointMetadata | None = None,
    target: dict[str, Any] | None = None,
    head: FrozenHead | None = None,
) -> Written:
    """Write a drafter in a dialect, read it back and compare every field and every bit.

    Args:
        drafter: Its tensors keep their number format.
        folder: Replaced where it exists.
        format: `zlab` or `speculators`.
        metadata: Of the source.
        target: `name` and `architectures` that speculators stores; None takes the metadata's.
        head: The target's tables; speculators wants rows of them for a reduced vocabulary.

    Raises:
        ValueError: The format cannot hold this drafter; all reasons are named.
        RuntimeError: What was read back differs from what was written.
    """
    require(
        format in _WRITERS,
        f"format (={format.value}) must be one of {', '.join(each.value for each in _WRITERS)}. "
        "The others are read only.",
    )
    dialect = _WRITERS[format]
    reasons = dialect.obstacles(drafter.config)
    require(
        not reasons,
        f"format={format.value} cannot hold this drafter. {' '.join(reasons)}",
    )
    dtype = str(drafter.fc.weight.dtype).removeprefix("torch.")
    tensors = {name: tensor.detach().cpu() for name, tensor in drafter.state_dict().items()}
    if target is None and metadata is not None:
        target = metadata.target
    if format is Format.speculators:
        content = speculators.to_content(drafter.config, dtype, target=target)
        tensors = add_tables(tensors, head)
    else:
        content = zlab.to_content(drafter.config, dtype)
    write_folder(folder, content=content, tensors=tensors, metadata=with_golden(drafter, metadata))
    audit(read_drafter(folder, head=head).drafter, drafter, folder, stored=tensors)
    return Written(
        folder=folder,
        format=format,
        num_tensors=len(tensors),
        remarks=dialect.remarks(drafter.config),
    )
