"""Train states: everything that resuming needs, saved so that no kill leaves a half one behind.

`state/step-000100/` is written under a name that readers ignore and renamed when it is complete.
`train_state.json` in it says where the run stood and holds the checksum of every other file and
its own; a state that fails its checksum is passed over for the one before.

Weights lie as the launch holds them: whole, or one part per process under FSDP2 and DeepSpeed.
Whole weights and FSDP2's parts can be read by any number of processes; DeepSpeed's optimiser parts
fit the number that wrote them.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from dflash_train.config import require
from dflash_train.records.manifest import canonical_json, content_hash, file_hash, write_bytes
from dflash_train.training.accelerator import can_reshard, state_layout
from dflash_train.training.averaging import AveragedDrafter
from dflash_train.training.drafter_loss import bare_drafter
from dflash_train.training.metrics import TrainingCounts

STATE_NAME = "train_state.json"
AVERAGE_NAME = "average.safetensors"
_PREFIX = "step-"
_PARTIAL = ".partial-"
_WRAPPERS = ("module.", "drafter.")
"""What DDP and `DrafterLoss` put before the names of weights, outermost first."""


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
    num_processes: int = 1
    """Ranks that wrote the state."""
    packs_per_step: int = 1
    """Packs of one optimiser step, those of all ranks and micro-batches."""
    layout: str = "whole"
    """How the weights lie: `accelerator.state_layout`."""
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
        folder: Holds all states of the run; one file system for all machines.
        keep: States that stay.
        averaged: The moving average, the same on every process.
    """
    final = folder / f"{_PREFIX}{state.step:06d}"
    partial = folder / f"{_PARTIAL}{final.name}"
    if accelerator.is_main_process:
        _remove_partials(folder)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with _bare_names(accelerator):
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
    """Restore model, optimiser and schedule that `accelerator` has prepared, and the average.

    Raises:
        ValueError: This launch cannot read what another one wrote.
    """
    state = read_books(folder)
    _check_launch(accelerator, state, folder)
    with _bare_names(accelerator):
        accelerator.load_state(str(folder))
    if averaged is not None:
        averaged.load_state_dict(load_file(folder / AVERAGE_NAME))
    return state


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


def _check_launch(accelerator: Accelerator, state: TrainState, folder: Path) -> None:
    layout = state_layout(accelerator)
    require(
        state.layout == layout,
        f"{folder} was written by another kind of launch (={state.layout}), and this one is "
        f"{layout}. Use the launch file of that run, or start a new run with "
        "init=CHECKPOINT_FOLDER.",
    )
    require(
        state.num_processes == accelerator.num_processes or can_reshard(accelerator),
        f"{folder} was written by {state.num_processes} processes, and DeepSpeed's optimiser parts "
        f"fit that number alone, not {accelerator.num_processes}. Start as many, or a new run with "
        "init=CHECKPOINT_FOLDER; FSDP2 and DDP go on with any number.",
    )


@contextmanager
def _bare_names(accelerator: Accelerator) -> Iterator[None]:
    """Let whole weights be saved and loaded under the names that the bare drafter gives them.

    accelerate keeps DDP's prefix, and one process could not read what two have written.
    """

    def strip(_models: list[nn.Module], weights: list[dict[str, Tensor]], _folder: str) -> None:
        weights[:] = [{_bare(name): each for name, each in part.items()} for part in weights]

    def unwrap(models: list[nn.Module], _folder: str) -> None:
        models[:] = [bare_drafter(accelerator, model) for model in models]

    handles = [
        accelerator.register_save_state_pre_hook(strip),
        accelerator.register_load_state_pre_hook(unwrap),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bare(name: str) -> str:
    for prefix in _WRAPPERS:
        name = name.removeprefix(prefix)
    return name


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
