"""The training loop: features in, checkpoint out, resumable after every train state.

Everything random (order of rows, anchors, initial weights) is a function of the seed and the
place in the stream, never of a rank or of earlier calls, so a resumed run ends with the same bytes
as an undisturbed one. Run by `dflash-train train recipe=NAME` or `accelerate launch train.py`.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from dflash_train.config import RecipeConfig, require, to_plain
from dflash_train.drafter.checkpoint import save_checkpoint
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.metadata import METADATA_NAME, CheckpointMetadata
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.store import FeatureStore
from dflash_train.records.manifest import FileEntry, Manifest
from dflash_train.training.accelerator import cpu_products
from dflash_train.training.averaging import AveragedDrafter
from dflash_train.training.batching import (
    BatchSource,
    BlockSettings,
    Pack,
    TrainingBatch,
    take_window,
    trainable_rows,
)
from dflash_train.training.interruption import StopRequest
from dflash_train.training.losses import LossSettings, LossTerms, block_loss, fixed_weights
from dflash_train.training.metrics import AcceptanceCounts, TrainingCounts
from dflash_train.training.optim import build_optimizer, build_schedule, current_lr
from dflash_train.training.progress import Progress
from dflash_train.training.replay import replay_many
from dflash_train.training.state import (
    TrainState,
    clear_states,
    latest_state,
    load_state,
    save_state,
)
from dflash_train.training.tracking import (
    METRICS_NAME,
    JsonlTracker,
    Tracker,
    Trackers,
    WandbTracker,
)
from dflash_train.training.vocabulary import (
    SampledHead,
    count_labels,
    most_frequent_ids,
    sample_head,
)

STATE_FOLDER = "state"


@dataclass(kw_only=True)
class StepResult:
    """What one optimiser step gives, over all ranks."""

    counts: TrainingCounts
    grad_norm: float
    """Global norm of the gradient before clipping."""
    lr: float
    """Learning rate that the step used."""


class Trainer:
    """Trains one drafter on the features of one target."""

    def __init__(
        self,
        config: RecipeConfig,
        *,
        accelerator: Accelerator,
        drafter: Drafter,
        head: FrozenHead,
        train: FeatureStore,
        validation: FeatureStore,
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
        self.config = config
        self.accelerator = accelerator
        self.run_dir = run_dir
        self.description = description or CheckpointMetadata()
        self.drafter_config = drafter.config
        trainable = trainable_rows(train)
        require(
            len(validation) > 0,
            f"{validation.folder} has no rows, so no best checkpoint can be chosen. Raise "
            "data.validation_share and run `ingest` again.",
        )
        _check_width(train, drafter.config)
        _check_width(validation, drafter.config)
        self.validation_store = validation
        self.head = _head_on(head, accelerator.device)
        self.dtype = next(drafter.parameters()).dtype
        self.max_steps = _num_steps(config)
        self.is_label = self._choose_vocabulary(drafter, train, trainable, stop_token_ids)
        optimizer = build_optimizer(drafter, config.optim)
        schedule = build_schedule(optimizer, config.optim, max_steps=self.max_steps)
        self.model, self.optimizer, self.schedule = accelerator.prepare(
            drafter.train(), optimizer, schedule
        )
        decay = config.training.ema_decay
        self.averaged = None if decay is None else AveragedDrafter(self.drafter, decay)
        self.output_head = self.drafter.output_head(self.head)
        self.source = BatchSource(
            train, self._block_settings(), pack_tokens=config.training.pack_tokens
        )
        self.loss_settings = LossSettings(
            loss=config.loss,
            slot_weights=fixed_weights(config.loss, drafter.config).to(accelerator.device),
            chunk=config.training.head_chunk,
        )
        self.state = TrainState(key=key, pending=self._no_counts())

    @property
    def drafter(self) -> Drafter:
        """The bare drafter that is trained, as it stands."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def deployable(self) -> Drafter:
        """The drafter that validation replays and checkpoints hold: averaged if the recipe asks."""
        return self.drafter if self.averaged is None else self.averaged.drafter

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of `best` and `last`."""
        return self.run_dir / "checkpoint"

    @property
    def state_dir(self) -> Path:
        """Folder of the train states."""
        return self.run_dir / STATE_FOLDER

    def fit(self) -> TrainState:
        """Train to the last step, from the newest train state if there is one.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM came; the train state is saved.
        """
        self._resume()
        settings, last_step = self.config.training, self.max_steps
        with StopRequest() as stop, self._open_trackers() as trackers, self._progress() as progress:
            stream = self.source.stream(epoch=self.state.epoch, position=self.state.position)
            while self.state.step < last_step:
                self._advance(stream, trackers, progress)
                is_last = self.state.step == last_step
                if is_last or self.state.step % settings.validate_every == 0:
                    self._validate_and_keep_best(trackers, progress)
                must_stop = self._is_any(stop.is_made)
                if is_last or must_stop or self.state.step % settings.save_every == 0:
                    self._save()
                if must_stop and not is_last:
                    raise KeyboardInterrupt(f"train state saved at step {self.state.step}")
        return self.state

    def next_window(self, stream: Iterator[Pack]) -> list[Pack]:
        """Take the packs of the next optimiser step, those of all ranks."""
        return take_window(
            stream,
            num_micro_batches=self.config.training.accumulation_steps,
            num_ranks=self.accelerator.num_processes,
        )

    def train_step(self, window: list[Pack]) -> StepResult:
        """Run one optimiser step.

        Args:
            window: The packs of all ranks, from `take_window`.
        """
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        batches = [self.source.load(pack) for pack in window[rank::ranks]]
        scale = ranks / self._denominator(batches)  # wrappers average over ranks
        rows = self._rows_of_step()
        own_counts = self._no_counts()
        for number, batch in enumerate(batches, start=1):
            is_last = number == len(batches)
            no_sync = nullcontext() if is_last else self.accelerator.no_sync(self.model)
            with no_sync, cpu_products(self.config.launch):
                terms = self._loss(batch, rows)
                self.accelerator.backward(terms.loss_sum * scale)
            own_counts += terms.counts
        grad_norm = self.accelerator.clip_grad_norm_(
            self.model.parameters(), self.config.optim.max_grad_norm
        )
        assert grad_norm is not None
        lr = current_lr(self.optimizer)
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update(self.drafter)
        self.schedule.step()
        self.optimizer.zero_grad()
        counts = TrainingCounts.from_tensor(self._sum_over_ranks(own_counts.to_tensor()))
        return StepResult(counts=counts, grad_norm=float(grad_norm), lr=lr)

    def validate(self) -> AcceptanceCounts:
        """Replay up to `validation_rows` rows, spread evenly over the split, shared among ranks."""
        store, ranks = self.validation_store, self.accelerator.num_processes
        num_rows = min(len(store), self.config.training.validation_rows)
        chosen = [number * len(store) // num_rows for number in range(num_rows)]
        own_rows = [store[index] for index in chosen[self.accelerator.process_index :: ranks]]
        own_counts = replay_many(self.deployable, self.head, own_rows)
        counts = AcceptanceCounts.from_tensor(self._sum_over_ranks(own_counts.to_tensor()))
        require(
            counts.num_steps > 0,
            f"{store.folder} has no answer of two tokens or more, so no step can be replayed. "
            "Raise data.validation_share or data.max_new_tokens.",
        )
        return counts

    def finish(self, manifest: Manifest) -> Manifest:
        """Write `checkpoint/last`, complete the manifest and write it last."""
        if self.accelerator.is_main_process:
            self._save_checkpoint("last")
            folder = self.checkpoint_dir
            # Metadata names code and versions: another commit with the same weights is no change.
            files = sorted(
                path
                for path in [*folder.glob("best/*"), *folder.glob("last/*")]
                if path.name != METADATA_NAME
            )
            manifest.outputs = [FileEntry.of(path, folder) for path in files]
            manifest.details |= {
                "steps": self.state.step,
                "best_step": self.state.best_step,
                "best_acceptance_length": self.state.best_acceptance,
                "parameters": sum(p.numel() for p in self.drafter.parameters()),
                "training_rows": len(self.source.rows),
                "processes": self.accelerator.num_processes,
                "threads_per_process": torch.get_num_threads(),
            }
            manifest.write(folder)
        self.accelerator.wait_for_everyone()
        return manifest

    def _advance(self, stream: Iterator[Pack], trackers: Trackers, progress: Progress) -> None:
        """Run one step, move the state forward and log when it is time."""
        settings, state = self.config.training, self.state
        started = time.perf_counter()
        window = self.next_window(stream)
        result = self.train_step(window)
        progress.advance(result.counts, time.perf_counter() - started)
        state.step += 1
        state.epoch, state.position = window[-1].epoch, window[-1].position + 1
        state.pending += result.counts
        if state.step % settings.log_every == 0:
            trackers.log(state.step, self._step_values(result) | progress.rates())
            state.pending = self._no_counts()
            progress.new_window()

    def _denominator(self, batches: list[TrainingBatch]) -> float:
        """Count Z over all ranks and micro-batches of the step, before its first forward."""
        weights_K = self.loss_settings.slot_weights.cpu()
        own = torch.stack([batch.weight_sum(weights_K) for batch in batches]).sum()
        total = self._sum_over_ranks(own).item()
        require(
            total > 0,
            "no block of this step has a label that the drafter can draft. Raise "
            f"drafter.draft_vocab_size (={self.drafter_config.draft_vocab_size}) or "
            f"training.pack_tokens (={self.config.training.pack_tokens}).",
        )
        return total

    def _rows_of_step(self) -> SampledHead:
        """Give the rows of the head that this step's softmax runs over."""
        if self.is_label is None:
            return SampledHead(head=self.output_head, log_weights=None)
        return sample_head(
            self.head,
            self.is_label,
            num_drawn=self.config.training.head_sample,
            seed=self.config.seed,
            step=self.state.step,
        )

    def _loss(self, batch: TrainingBatch, rows: SampledHead) -> LossTerms:
        batch = batch.to(self.accelerator.device, dtype=self.dtype)
        embeddings = block_embeddings(
            self.head,
            batch.anchor_ids,
            num_slots=self.drafter_config.block_size,
            config=self.drafter_config,
        )
        hidden = self.model(embeddings.to(self.dtype), batch.target_features, batch.blocks)
        return block_loss(
            hidden,
            batch,
            rows.head,
            drafter=self.drafter,
            settings=replace(self.loss_settings, log_weights=rows.log_weights),
        )

    def _choose_vocabulary(
        self,
        drafter: Drafter,
        store: FeatureStore,
        rows: list[int],
        stop_token_ids: Sequence[int],
    ) -> Tensor | None:
        """Set a reduced drafter's ids; give `[V]` bool, ids that are labels, if heads are sampled.

        Both come from the labels of the training rows.
        """
        size, num_drawn = drafter.config.draft_vocab_size, self.config.training.head_sample
        if size is None and num_drawn == 0:
            return None
        counts = count_labels(store, rows, vocab_size=drafter.config.vocab_size)
        if (
            size is not None and self.config.init is None
        ):  # its tables keep their ids
            drafter.set_draft_vocabulary(
                most_frequent_ids(counts, size, always=list(stop_token_ids))
            )
        return counts > 0 if num_drawn else None

    def _block_settings(self) -> BlockSettings:
        config, shape, ids = self.config, self.drafter_config, self.output_head.draft_token_ids
        has_teacher = config.data.teacher_top_k > 0
        return BlockSettings(
            block_size=shape.block_size,
            num_anchors=config.training.num_anchors,
            seed=config.seed,
            first_slot=shape.first_slot,
            draft_token_ids=None if ids is None else ids.cpu(),
            use_teacher=config.loss.needs_teacher or (shape.has_confidence_head and has_teacher),
        )

    def _no_counts(self) -> TrainingCounts:
        return TrainingCounts.zeros(self.drafter_config.num_drafts)

    def _validate_and_keep_best(self, trackers: Trackers, progress: Progress) -> None:
        counts = self.validate()
        progress.acceptance = counts.pooled
        trackers.log(
            self.state.step,
            {
                "validation": {
                    "acceptance_length": {
                        "pooled": counts.pooled,
                        "per_request": counts.per_request,
                    },
                    "num_requests": counts.num_requests,
                }
            },
        )
        if counts.pooled > self.state.best_acceptance:
            self.state.best_acceptance, self.state.best_step = counts.pooled, self.state.step
            if self.accelerator.is_main_process:
                self._save_checkpoint("best")

    def _save_checkpoint(self, name: str) -> None:
        """Write `checkpoint/<name>`; no clock goes into it, so equal runs write equal bytes."""
        done = {
            "steps": self.state.step,
            "training_rows": len(self.source.rows),
            "processes": self.accelerator.num_processes,
            "parameters": sum(p.numel() for p in self.drafter.parameters()),
            "acceptance_length": self.state.best_acceptance if name == "best" else None,
        }
        provenance = self.description.provenance | done
        save_checkpoint(
            self.deployable,
            self.checkpoint_dir / name,
            metadata=replace(self.description, provenance=provenance),
        )

    def _resume(self) -> None:
        newest = latest_state(self.state_dir, key=self.state.key)
        self.accelerator.wait_for_everyone()
        if newest is not None:
            self.state = load_state(self.accelerator, newest, averaged=self.averaged)
            self._say(f"train: resuming at step {self.state.step}")
        elif self.accelerator.is_main_process:
            clear_states(self.state_dir)

    def _save(self) -> None:
        keep = self.config.training.keep_states
        save_state(
            self.accelerator,
            self.state,
            folder=self.state_dir,
            keep=keep,
            averaged=self.averaged,
        )

    def _open_trackers(self) -> Trackers:
        trackers: list[Tracker] = []
        if self.accelerator.is_main_process:
            path = self.run_dir / METRICS_NAME
            trackers.append(JsonlTracker(path, resumed_step=self.state.step))
            if self.config.tracking.wandb:
                trackers.append(
                    WandbTracker(
                        self.config.tracking,
                        run_dir=self.run_dir,
                        name=self.config.name,
                        settings=to_plain(self.config),
                    )
                )
        return Trackers(trackers)

    def _progress(self) -> Progress:
        return Progress(
            total=self.max_steps,
            done=self.state.step,
            is_shown=self.accelerator.is_main_process,
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

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values
        total = self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
        assert isinstance(total, Tensor)
        return total.cpu()

    def _is_any(self, flag: bool) -> bool:
        """Agree on a flag: a signal may reach one rank a step before another."""
        return bool(self._sum_over_ranks(torch.tensor(float(flag))) > 0)

    def _say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(message, file=sys.stderr)


def _num_steps(config: RecipeConfig) -> int:
    max_steps = config.training.max_steps
    if max_steps is None:
        raise ValueError(
            "training.max_steps (=null) must be set before training starts. Set it, or set "
            "training.minutes and run the stage `train`."
        )
    return max_steps


def _check_width(store: FeatureStore, config: DrafterConfig) -> None:
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
