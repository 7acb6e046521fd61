"""Train states: everything that resuming needs, saved so that no kill leaves a half one behind.

`state/step-000100/` is written under a name that readers ignore and renamed when it is complete.
`train_state.json` in it says where the run stood and holds the checksum of every other file and
its own; a state that fails its checksum is passed over for the one before.
"""

import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dflash_train.records.manifest import canonical_json, content_hash, file_hash, write_bytes
from dflash_train.training.averaging import AveragedDrafter
from dflash_train.training.metrics import TrainingCounts

STATE_NAME = "train_state.json"
AVERAGE_NAME = "average.safetensors"
_PREFIX = "step-"
_PARTIAL = ".partial-"


@dataclass(kw_only=True)
class TrainState:
    """Where a run stands, beside the tensors that accelerate saves."""

    key: str
    """Hash of recipe and inputs; a state of another key is of no use."""
    step: int = 0
    """Finished optimiser steps."""
    epoch: int = 0
    position: int = 0
    """Next pack of the stream: its number in `epoch`."""
    best_acceptance: float = 0.0
    """Highest pooled acceptance length of a validation; 0 before the first."""
    best_step: int = 0
    pending: TrainingCounts
    """Counts since the last line of metrics.jsonl."""


def save_state(
    accelerator: Accelerator,
    state: TrainState,
    *,
    folder: Path,
    keep: int,
    averaged: AveragedDrafter | None = None,
) -> None:
    """Write `folder/step-NNNNNN` from all processes and remove older states beyond `keep`.

    Args:
        accelerator: Has prepared model, optimiser and schedule.
        state: Where the run stands.
        folder: Holds all states of the run.
        keep: States that stay.
        averaged: The moving average, the same on every process.
    """
    final = folder / f"{_PREFIX}{state.step:06d}"
    partial = folder / f"{_PARTIAL}{final.name}"
    if accelerator.is_main_process:
        _remove_partials(folder)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if averaged is not None:
            save_file(averaged.state_dict(), partial / AVERAGE_NAME)
        _write_books(partial, state)
        if final.exists():  # a damaged one, which resuming passed over
            shutil.rmtree(final)
        partial.rename(final)
        for old in _state_folders(folder)[keep:]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def latest_state(folder: Path, *, key: str) -> Path | None:
    """Give the newest whole state of this run, or None; says which ones it passes over."""
    for candidate in _state_folders(folder):
        try:
            state = read_books(candidate)
        except ValueError as error:
            tqdm.write(f"train: {error} Going back to the state before.", file=sys.stderr)
            continue
        if state.key == key:
            return candidate
        tqdm.write(
            f"train: {candidate} belongs to another recipe or other features.", file=sys.stderr
        )
    return None


def load_state(
    accelerator: Accelerator, folder: Path, *, averaged: AveragedDrafter | None = None
) -> TrainState:
    """Restore model, optimiser and schedule that `accelerator` has prepared, and the average."""
    accelerator.load_state(str(folder))
    if averaged is not None:
        averaged.load_state_dict(load_file(folder / AVERAGE_NAME))
    return read_books(folder)


def read_books(folder: Path) -> TrainState:
    """Read `train_state.json` and compare every checksum.

    Raises:
        ValueError: The state is damaged; the message names the file.
    """
    path = folder / STATE_NAME
    try:
        content = orjson.loads(path.read_bytes())
        stored_hash = content.pop("content_hash")
        if content_hash(content) != stored_hash:
            raise ValueError("its content hash does not match")
        files = content.pop("files")
        content["pending"] = TrainingCounts(**content["pending"])
        state = TrainState(**content)
    except (
        OSError,
        orjson.JSONDecodeError,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
    ) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    for name, sha256 in files.items():
        if not (folder / name).is_file() or file_hash(folder / name) != sha256:
            raise ValueError(f"{folder / name} is missing or damaged.")
    return state


def clear_states(folder: Path) -> None:
    """Remove all states, whole or partial."""
    _remove_partials(folder)
    for old in _state_folders(folder):
        shutil.rmtree(old)


def _write_books(folder: Path, state: TrainState) -> None:
    content = asdict(state)
    content["files"] = {
        str(path.relative_to(folder)): file_hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content["content_hash"] = content_hash(content)
    write_bytes(folder / STATE_NAME, canonical_json(content) + b"\n")


def _state_folders(folder: Path) -> list[Path]:
    """List complete states, newest first."""
    return sorted(folder.glob(f"{_PREFIX}*"), key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def _remove_partials(folder: Path) -> None:
    for leftover in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover)
