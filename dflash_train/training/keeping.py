"""What a run keeps: its train states, its checkpoints `best` and `last`, and their manifest.

States are for going on, checkpoints for serving. Resuming needs no key: a run whose newest whole
state fits the recipe goes on from there, on another number of processes too.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from dflash_train.drafter.checkpoint import save_checkpoint
from dflash_train.drafter.metadata import METADATA_NAME, CheckpointMetadata
from dflash_train.drafter.model import Drafter
from dflash_train.records.manifest import FileEntry, Manifest
from dflash_train.training.accelerator import Accelerator
from dflash_train.training.averaging import AveragedDrafter
from dflash_train.training.state import (
    TrainState,
    clear_states,
    latest_state,
    load_state,
    save_state,
)

STATE_FOLDER = "state"
BEST, LAST = "best", "last"


@dataclass(kw_only=True)
class RunFolder:
    """The folder of a run, as training fills it; all methods are called by every process."""

    folder: Path
    accelerator: Accelerator
    description: CheckpointMetadata
    """Target and provenance of the checkpoints; what was done is added to it."""
    training_rows: int
    keep_states: int
    """Train states kept."""

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of `best` and `last`."""
        return self.folder / "checkpoint"

    @property
    def state_dir(self) -> Path:
        """Folder of the train states."""
        return self.folder / STATE_FOLDER

    def resume(self, fresh: TrainState, *, averaged: AveragedDrafter | None) -> TrainState:
        """Restore the newest whole state of this run, or give `fresh` and remove all others.

        Args:
            fresh: A state before the first step, with this launch's key and packs per step.
            averaged: Restored along.

        Raises:
            ValueError: There is a state, and this launch cannot read it.
        """
        newest = latest_state(self.state_dir, key=fresh.key)
        self.accelerator.wait_for_everyone()
        if newest is None:
            if self.accelerator.is_main_process:
                clear_states(self.state_dir)
            return fresh
        found = load_state(self.accelerator, newest, averaged=averaged)
        self._say(f"resuming at step {found.step}")
        return self._fit_processes(found)

    def save_state(self, state: TrainState, *, averaged: AveragedDrafter | None) -> None:
        """Write a train state and remove those beyond `keep_states`."""
        save_state(
            self.accelerator,
            state,
            folder=self.state_dir,
            keep=self.keep_states,
            averaged=averaged,
        )

    def save_checkpoint(self, drafter: Drafter, name: str, *, state: TrainState) -> None:
        """Write `checkpoint/<name>`; no clock goes into it, so equal runs write equal bytes."""
        if not self.accelerator.is_main_process:
            return
        done = {
            "steps": state.step,
            "training_rows": self.training_rows,
            "processes": self.accelerator.num_processes,
            "parameters": _num_parameters(drafter),
            "acceptance_length": state.best_acceptance if name == BEST else None,
        }
        metadata = replace(self.description, provenance=self.description.provenance | done)
        save_checkpoint(drafter, self.checkpoint_dir / name, metadata=metadata)

    def finish(self, manifest: Manifest, drafter: Drafter, *, state: TrainState) -> None:
        """Write `checkpoint/last`, complete the manifest and write it last."""
        self.save_checkpoint(drafter, LAST, state=state)
        if self.accelerator.is_main_process:
            folder = self.checkpoint_dir
            # Metadata names code and versions: another commit with the same weights is no change.
            files = sorted(
                path
                for path in [*folder.glob(f"{BEST}/*"), *folder.glob(f"{LAST}/*")]
                if path.name != METADATA_NAME
            )
            manifest.outputs = [FileEntry.of(path, folder) for path in files]
            manifest.details |= {
                "steps": state.step,
                "best_step": state.best_step,
                "best_acceptance_length": state.best_acceptance,
                "parameters": _num_parameters(drafter),
                "training_rows": self.training_rows,
                "processes": self.accelerator.num_processes,
                "threads_per_process": torch.get_num_threads(),
            }
            manifest.write(folder)
        self.accelerator.wait_for_everyone()

    def _fit_processes(self, found: TrainState) -> TrainState:
        """Share the packs of a step among the processes of today, and say what changes."""
        before, now = found.num_processes, self.accelerator.num_processes
        if before == now:
            return found
        each = shared_packs(found.packs_per_step, now)
        change = f"the state is of {before} process(es), and there are {now} now: "
        if each * now == found.packs_per_step:
            change += (
                f"a step still takes {each * now} packs, {each} per process, so the run goes on "
                "as it would have, rounding apart"
            )
        else:
            change += (
                f"a step takes {each * now} packs from here on instead of {found.packs_per_step}, "
                f"{each} per process, which is another run; {before} would continue the old one"
            )
        self._say(change)
        return replace(found, num_processes=now, packs_per_step=each * now)

    def _say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(f"train: {message}", file=sys.stderr)


def shared_packs(packs_per_step: int, num_processes: int) -> int:
    """Give the packs that each process runs per step, as near to the wanted sum as can be."""
    return max(1, round(packs_per_step / num_processes))


def _num_parameters(drafter: Drafter) -> int:
    return sum(parameter.numel() for parameter in drafter.parameters())
