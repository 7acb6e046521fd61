"""On-policy correction: blocks that start where the drafter's own verify steps do.

    dflash-train train recipe=NAME init=DIR training.on_policy_every=600 loss.first_wrong=2

Random blocks start anywhere in an answer; at serving a block starts right behind a rejection, which
is no uniform sample of positions. Draft-OPD (arXiv 2605.29343) has the target continue a drafter's
rollouts and trains from the positions that verification exposes. Under greedy verification the
stored answer *is* that continuation, so replay finds those positions without a target pass.

Before step 0, N, 2N, ... the drafter as it then stands is replayed on the rows of the next N steps,
and until the next time their blocks start where its steps did. Which blocks a row gets is a
function of seed, epoch, row and that frozen drafter. What it found is written beside the train
states, one file per process and time, so that a run resumed in between goes on with the very same
blocks. Replaying a row costs more than training on it once, so N should span epochs;
`training.minutes` counts it. The mistakes themselves are the loss's business (`loss.first_wrong`).
"""

import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from dflash_train.config import TrainingConfig
from dflash_train.drafter.model import Drafter
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.row_source import RowSource
from dflash_train.records.manifest import write_bytes
from dflash_train.training.accelerator import Accelerator
from dflash_train.training.batching import Batches
from dflash_train.training.replay import replay_each
from dflash_train.training.state import TrainState

PREFIX = "own-starts-"
PROBED_ROWS = 64
"""Rows replayed to find out how long it takes: as many as go side by side on a CPU."""


class OnPolicyBlocks:
    """Where the drafter in training starts its steps, brought up to date every so many steps."""

    def __init__(
        self,
        rows: RowSource,
        batches: Batches,
        *,
        settings: TrainingConfig,
        folder: Path,
        accelerator: Accelerator,
    ) -> None:
        """Know nothing yet: until `update`, blocks start anywhere.

        Args:
            rows: The training split.
            batches: Tells which rows come next.
            settings: How often, and how many files stay.
            folder: Where the train states lie.
            accelerator: The processes, which share the rows.
        """
        assert settings.on_policy_every is not None
        self.every: int = settings.on_policy_every
        self.own_starts: dict[str, Tensor] = {}
        """By row, `[S]` int64: where its steps start; read by whoever draws blocks."""
        self._kept_steps = settings.keep_states * settings.save_every + self.every
        self._rows, self._batches = rows, batches
        self._folder, self._accelerator = folder, accelerator
        self._known_from: int | None = None

    def update(
        self, state: TrainState, *, drafter: Callable[[], Drafter], head: FrozenHead
    ) -> None:
        """Have the starts ready that the next optimiser step draws from; all processes call this.

        Args:
            state: Where the run stands.
            drafter: Gives the drafter as it stands, the same on every process.
            head: The target's embedding and LM head, on its device.
        """
        began = state.step - state.step % self.every
        if began == self._known_from:
            return
        if began == state.step:
            self._replay_ahead(state, drafter(), head)
        self._read(began)

    def seconds_of_replay(self, state: TrainState, drafter: Drafter, head: FrozenHead) -> float:
        """Estimate how long one replay takes, from some of its rows.

        Args:
            state: Where the run stands, before its first step.
            drafter: As it stands.
            head: The target's.
        """
        ahead = self._rows_ahead(state, self.every)
        probed = ahead[:: max(1, len(ahead) // PROBED_ROWS)][:PROBED_ROWS]
        started = time.perf_counter()
        for _ in replay_each(drafter, head, (self._rows[row] for row in probed)):
            pass
        return (time.perf_counter() - started) * len(ahead) / len(probed)

    def _rows_ahead(self, state: TrainState, num_steps: int) -> list[int]:
        """List the rows of the next steps, of all processes, in the order of the split."""
        stream = self._batches.stream(epoch=state.epoch, position=state.position)
        packs = islice(stream, num_steps * state.packs_per_step)
        places = {place for pack in packs for place in pack.rows}
        return sorted(self._batches.rows[place] for place in places)

    def _replay_ahead(self, state: TrainState, drafter: Drafter, head: FrozenHead) -> None:
        """Replay this process's share of the rows that come next, and write what it found."""
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        own = self._rows_ahead(state, self.every)[rank::ranks]
        if self._accelerator.is_main_process:
            self._tidy(state.step)
        self._accelerator.wait_for_everyone()
        bar = tqdm(own, desc="own starts", unit="row", file=sys.stderr, disable=rank > 0)
        replayed = replay_each(drafter, head, (self._rows[row] for row in bar))
        found = [torch.tensor(each.trace.starts, dtype=torch.int64) for each in replayed]
        write_own_starts(self._path(state.step, rank), dict(zip(own, found, strict=True)))
        self._accelerator.wait_for_everyone()

    def _read(self, began: int) -> None:
        """Read what all processes found at a step.

        Raises:
            ValueError: It is not there, or damaged.
        """
        paths = sorted(self._folder.glob(f"{self._name(began)}-*.safetensors"))
        if not paths:
            raise ValueError(
                f"{self._folder} holds no {self._name(began)}-*.safetensors, from which this run "
                "draws its blocks. Run `train` with --force to begin again."
            )
        self.own_starts.clear()
        for path in paths:
            for row, starts in read_own_starts(path).items():
                self.own_starts[self._rows.lines[row].id] = starts
        self._known_from = began

    def _tidy(self, step: int) -> None:
        """Remove what this step is about to write, and what no kept train state can need."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob(f"{PREFIX}*"):
            written_at = int(path.name.removeprefix(PREFIX).split("-")[0])
            if written_at >= step or written_at < step - self._kept_steps:
                path.unlink()

    def _name(self, step: int) -> str:
        return f"{PREFIX}{step:06d}"

    def _path(self, step: int, rank: int) -> Path:
        return self._folder / f"{self._name(step)}-{rank:03d}.safetensors"


def write_own_starts(path: Path, found: dict[int, Tensor]) -> None:
    """Write the starts on some rows atomically and durably, by position in their split."""
    starts = list(found.values())
    tensors: dict[str, Tensor] = {
        "rows": torch.tensor(list(found), dtype=torch.int64),
        "num_steps": torch.tensor([len(each) for each in starts], dtype=torch.int64),
        "starts": torch.cat(starts).int() if starts else torch.empty(0, dtype=torch.int32),
    }
    write_bytes(path, save(tensors))


def read_own_starts(path: Path) -> dict[int, Tensor]:
    """Read what `write_own_starts` wrote.

    Raises:
        ValueError: It is damaged.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged: {error}. Run `train` with --force to begin again."
        ) from error
    starts = tensors["starts"].long().split(tensors["num_steps"].tolist())
    return dict(zip(tensors["rows"].tolist(), starts, strict=True))
