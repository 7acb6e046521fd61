"""The training loop: features in, checkpoint out, resumable after every train state.

Everything random (order of rows, anchors, initial weights) is a function of the seed and the
place in the stream, never of a rank or of earlier calls, so a resumed run ends with the same bytes
as an undisturbed one. Run by `dflash-train train recipe=NAME` or `accelerate launch train.py`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dflash_train.config import FeaturesFrom, RecipeConfig, require
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.metadata import CheckpointMetadata
from dflash_train.drafter.model import Drafter
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.row_source import RowSource
from dflash_train.records.manifest import Manifest
from dflash_train.training.accelerator import (
    state_layout,
)
from dflash_train.training.batching import (
    BlockSettings,
    Pack,
    take_window,
    trainable_rows,
)
from dflash_train.training.interruption import StopRequest
from dflash_train.training.keeping import BEST, RunFolder
from dflash_train.training.metrics import AcceptanceCounts
from dflash_train.training.online import open_batches
from dflash_train.training.optimizer_step import OptimizerStep, StepResult
from dflash_train.training.plan import peak_flops_of_run, run_flops_per_block
from dflash_train.training.profiling import ProfileWindow
from dflash_train.training.progress import Progress, Yardstick
from dflash_train.training.state import TrainState
from dflash_train.training.step_timers import (
    DATA,
    TARGET,
    StepTimers,
)
from dflash_train.training.tracking import Trackers, open_trackers
from dflash_train.training.validation import replay_validation_rows, validation_values
from dflash_train.training.vocabulary import HeadRows, choose_vocabulary


class Trainer:
    """Trains one drafter on the features of one target."""

    def __init__(
        self,
        config: RecipeConfig,
        *,
        accelerator: Accelerator,
        drafter: Drafter,
        head: FrozenHead,
        train: RowSource,
        validation: RowSource,
        run_dir: Path,
        key: str = "",
        stop_token_ids: Sequence[int] = (),
        description: CheckpointMetadata | None = None,
    ) -> None:
        """Prepare model, optimiser and schedule.

        Args:
            config: The recipe.
            accelerator: Where and on how many processes to run.
            drafter: Freshly initialised, the same on every rank.
            head: The target's embedding and LM head.
            train: Rows to train on.
            validation: Rows to replay.
            run_dir: Folder of the run; states, checkpoints and metrics go below it.
            key: Hash of recipe and inputs; states of another key are not resumed.
            stop_token_ids: Ids that end an answer; a reduced draft vocabulary holds them all.
            description: Target and provenance of the checkpoints; what was done is added to it.

        Raises:
            ValueError: `training.minutes` are not yet steps, as `train` makes them; there is
                nothing to train on or to validate with, or shapes do not fit.
        """
        self.config, self.accelerator = config, accelerator
        self.drafter_config = drafter.config
        rows = trainable_rows(train)
        _check_validation(validation)
        _check_width(train, drafter.config)
        _check_width(validation, drafter.config)
        self.train_lines, self.validation_store = train.lines, validation
        self.max_steps = _num_steps(config)
        is_label = choose_vocabulary(
            drafter,
            train,
            rows,
            num_drawn=config.training.head_sample,
            keeps_ids=config.init is not None,
            stop_token_ids=stop_token_ids,
        )
        self.head = _head_on(head, accelerator.device)
        self.head_rows = HeadRows(
            head=drafter.to(accelerator.device).output_head(self.head),
            is_label=is_label,
            num_drawn=config.training.head_sample,
            seed=config.seed,
        )
        self.timers = StepTimers(accelerator.device)
        self.optimizer_step = OptimizerStep(
            drafter.train(),
            config=config,
            accelerator=accelerator,
            head=self.head,
            head_rows=self.head_rows,
            max_steps=self.max_steps,
            timers=self.timers,
        )
        self.source = open_batches(
            train,
            self._block_settings(),
            config=config,
            num_ranks=accelerator.num_processes,
            device=accelerator.device,
        )
        self.loading = TARGET if config.data.features is FeaturesFrom.online else DATA
        self.run_folder = RunFolder(
            folder=run_dir,
            accelerator=accelerator,
            description=description or CheckpointMetadata(),
            training_rows=len(rows),
            keep_states=config.training.keep_states,
        )
        self.state = TrainState(
            key=key,
            pending=self.optimizer_step.no_counts(),
            num_processes=accelerator.num_processes,
            packs_per_step=config.training.accumulation_steps * accelerator.num_processes,
            layout=state_layout(accelerator),
        )

    @property
    def drafter(self) -> Drafter:
        """The whole drafter that is trained, as it stands; every rank must ask together."""
        return self.optimizer_step.drafter

    @property
    def deployable(self) -> Drafter:
        """The drafter that validation replays and checkpoints hold; every rank must ask
        together."""
        return self.optimizer_step.deployable

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of `best` and `last`."""
        return self.run_folder.checkpoint_dir

    def fit(self) -> TrainState:
        """Train to the last step, from the newest train state if there is one.

        With `training.patience` the last step is also that of the last validation that it allows.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM came; the train state is saved.
        """
        self.state = self.run_folder.resume(self.state, averaged=self.optimizer_step.averaged)
        settings, last_step = self.config.training, self.max_steps
        with (
            StopRequest() as stop,
            self._open_trackers() as trackers,
            self._progress() as progress,
            self._profile() as profile,
        ):
            stream = self.source.stream(epoch=self.state.epoch, position=self.state.position)
            if self.state.step == 0 and settings.patience is not None:
                self._validate_and_keep_best(trackers, progress)
            while not self._has_ended():
                profile.step(self.state.step + 1)
                self._advance(stream, trackers, progress)
                if self.state.step == last_step or self.state.step % settings.validate_every == 0:
                    self._validate_and_keep_best(trackers, progress)
                is_last = self._has_ended()
                must_stop = self._is_any(stop.is_made)
                if is_last or must_stop or self.state.step % settings.save_every == 0:
                    self.run_folder.save_state(self.state, averaged=self.optimizer_step.averaged)
                if must_stop and not is_last:
                    raise KeyboardInterrupt(f"train state saved at step {self.state.step}")
        return self.state

    def _has_ended(self) -> bool:
        """Tell whether the last step is done, or `training.patience` is at its end.

        It follows from the train state alone, so a run that has stopped stays so.
        """
        settings, state = self.config.training, self.state
        every, patience = settings.validate_every, settings.patience
        since_best = state.step // every - state.best_step // every
        is_out = patience is not None and since_best >= patience
        return is_out or state.step >= self.max_steps

    def next_window(self, stream: Iterator[Pack]) -> list[Pack]:
        """Take the packs of the next optimiser step, those of all ranks."""
        num_ranks = self.accelerator.num_processes
        return take_window(
            stream,
            num_micro_batches=self.state.packs_per_step // num_ranks,
            num_ranks=num_ranks,
        )

    def train_step(self, window: list[Pack]) -> StepResult:
        """Run one optimiser step.

        Args:
            window: The packs of all ranks, from `take_window`.
        """
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        with self.timers.phase(self.loading):
            batches = [self.source.load(pack) for pack in window[rank::ranks]]
        return self.optimizer_step.run(batches, step=self.state.step)

    def validate(self) -> AcceptanceCounts:
        """Replay the validation rows, shared among ranks."""
        return self._validate(self.deployable)

    def finish(self, manifest: Manifest) -> Manifest:
        """Write `checkpoint/last`, complete the manifest and write it last."""
        self.run_folder.finish(manifest, self.deployable, state=self.state)
        return manifest

    def _advance(self, stream: Iterator[Pack], trackers: Trackers, progress: Progress) -> None:
        """Run one step, move the state forward and log when it is time."""
        settings, state = self.config.training, self.state
        started = time.perf_counter()
        with self.timers.step():
            window = self.next_window(stream)
            result = self.train_step(window)
        progress.advance(result.counts, time.perf_counter() - started)
        state.step += 1
        state.epoch, state.position = window[-1].epoch, window[-1].position + 1
        state.pending += result.counts
        if state.step % settings.log_every == 0:
            speed = progress.rates() | {"seconds": self.timers.seconds()}
            trackers.log(state.step, self._step_values(result) | speed)
            state.pending = self.optimizer_step.no_counts()
            progress.new_window()
            self.timers.new_window()

    def _block_settings(self) -> BlockSettings:
        config, shape = self.config, self.drafter_config
        ids = self.head_rows.head.draft_token_ids
        has_teacher = config.data.teacher_top_k > 0
        return BlockSettings(
            block_size=shape.block_size,
            num_anchors=config.training.num_anchors,
            seed=config.seed,
            first_slot=shape.first_slot,
            draft_token_ids=None if ids is None else ids.cpu(),
            use_teacher=config.loss.needs_teacher or (shape.has_confidence_head and has_teacher),
        )

    def _validate(self, drafter: Drafter) -> AcceptanceCounts:
        return replay_validation_rows(
            drafter,
            self.head,
            self.validation_store,
            max_rows=self.config.training.validation_rows,
            accelerator=self.accelerator,
        )

    def _validate_and_keep_best(self, trackers: Trackers, progress: Progress) -> None:
        drafter = self.deployable
        counts = self._validate(drafter)
        progress.acceptance = counts.pooled
        trackers.log(self.state.step, validation_values(counts))
        if counts.pooled > self.state.best_acceptance:
            self.state.best_acceptance, self.state.best_step = counts.pooled, self.state.step
            self.run_folder.save_checkpoint(drafter, BEST, state=self.state)

    def _open_trackers(self) -> Trackers:
        if not self.accelerator.is_main_process:
            return Trackers([])
        run_dir, step = self.run_folder.folder, self.state.step
        return Trackers(open_trackers(self.config, run_dir=run_dir, resumed_step=step))

    def _progress(self) -> Progress:
        return Progress(
            total=self.max_steps,
            done=self.state.step,
            is_shown=self.accelerator.is_main_process,
            yardstick=Yardstick(
                flops_per_block=run_flops_per_block(
                    self.config,
                    self.drafter_config,
                    self.train_lines,
                    head_rows=self.head_rows.number,
                ),
                peak_flops=peak_flops_of_run(
                    self.accelerator.device,
                    config=self.config,
                    ranks=self.accelerator.num_processes,
                ),
                device=self.accelerator.device,
            ),
        )

    def _profile(self) -> ProfileWindow:
        return ProfileWindow(
            self.config.training.profile_steps,
            run_dir=self.run_folder.folder,
            rank=self.accelerator.process_index,
        )

    def _step_values(self, result: StepResult) -> dict[str, Any]:
        pending = self.state.pending
        return {
            "loss": pending.loss,
            "cross_entropy": pending.cross_entropy,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "slot_accuracy": pending.slot_accuracy,
            "joint_accuracy": pending.joint_accuracy,
        }

    def _is_any(self, flag: bool) -> bool:
        """Agree on a flag: a signal may reach one rank a step before another."""
        return bool(self.optimizer_step.sum_over_ranks(torch.tensor(float(flag))) > 0)


def _num_steps(config: RecipeConfig) -> int:
    max_steps = config.training.max_steps
    if max_steps is None:
        raise ValueError(
            "training.max_steps (=null) must be set before training starts. Set it, or set "
            "training.minutes and run the stage `train`."
        )
    return max_steps


def _check_validation(store: RowSource) -> None:
    require(
        len(store) > 0,
        f"{store.folder} has no rows, so no best checkpoint can be chosen. Raise "
        "data.validation_share and run `ingest` again.",
    )


def _check_width(store: RowSource, config: DrafterConfig) -> None:
    found, expected = store[0].features.shape[1], config.num_taps * config.hidden_size
    require(
        found == expected,
        f"{store.folder} has features {found} wide, but drafter.target_layer_ids "
        f"(={config.target_layer_ids}) and the target's width need {expected}. "
        "Run `collect` again.",
    )


def _head_on(head: FrozenHead, device: torch.device) -> FrozenHead:
    return replace(
        head,
        embedding_weight=head.embedding_weight.to(device),
        lm_head_weight=head.lm_head_weight.to(device),
    )
