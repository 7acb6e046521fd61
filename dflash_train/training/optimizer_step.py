"""One optimiser step: gradients of its micro-batches over all ranks, clipped and applied once.

The gradient is that of one loss over all ranks and micro-batches, divided by their common
denominator, so how a step is split changes nothing but rounding.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dflash_train.config import RecipeConfig, require
from dflash_train.drafter.model import Drafter
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.training.accelerator import (
    Accelerator,
    micro_batch,
    prepare_training,
    sum_over_ranks,
)
from dflash_train.training.averaging import AveragedDrafter
from dflash_train.training.batching import TrainingBatch
from dflash_train.training.drafter_loss import DrafterLoss, whole_drafter
from dflash_train.training.losses import LossSettings, fixed_weights
from dflash_train.training.metrics import TrainingCounts
from dflash_train.training.optim import build_optimizer, build_schedule, current_lr
from dflash_train.training.step_timers import (
    BACKWARD,
    COMMUNICATION,
    FORWARD,
    OPTIMIZER,
    StepTimers,
)
from dflash_train.training.vocabulary import HeadRows


@dataclass(kw_only=True)
class StepResult:
    """What one optimiser step gives, over all ranks."""

    counts: TrainingCounts
    grad_norm: float
    """Global norm of the gradient before clipping."""
    lr: float
    """Learning rate that the step used."""


class OptimizerStep:
    """A drafter with its optimiser, schedule and moving average, wrapped for a launch."""

    def __init__(
        self,
        drafter: Drafter,
        *,
        config: RecipeConfig,
        accelerator: Accelerator,
        head: FrozenHead,
        head_rows: HeadRows,
        max_steps: int,
        timers: StepTimers,
    ) -> None:
        """Build and wrap all of them.

        Args:
            drafter: On its device; its weights are trained.
            config: The recipe.
            accelerator: Where and on how many processes to run.
            head: The target's, on the same device.
            head_rows: Rows of it that each step's softmax runs over.
            max_steps: Length of the schedule, in steps.
            timers: Told where the time goes.
        """
        self.config, self.accelerator = config, accelerator
        self.head_rows, self.timers = head_rows, timers
        self.shape = drafter.config
        optimizer = build_optimizer(drafter, config.optim)
        self.model, self.optimizer, self.schedule = prepare_training(
            accelerator,
            DrafterLoss(drafter, head, launch=config.launch),
            optimizer,
            build_schedule(optimizer, config.optim, max_steps=max_steps),
            max_grad_norm=config.optim.max_grad_norm,
        )
        decay = config.training.ema_decay
        self.averaged = None if decay is None else AveragedDrafter(self.drafter, decay)
        self.loss_settings = LossSettings(
            loss=config.loss,
            slot_weights=fixed_weights(config.loss, drafter.config).to(accelerator.device),
            chunk=config.training.head_chunk,
        )

    @property
    def drafter(self) -> Drafter:
        """The whole drafter that is trained, as it stands.

        Where the launch shards it, that is a gathered copy, and every rank must ask together.
        """
        return whole_drafter(self.accelerator, self.model)

    @property
    def deployable(self) -> Drafter:
        """The drafter to validate and keep: averaged if the recipe asks.

        Every rank must ask together.
        """
        return self.drafter if self.averaged is None else self.averaged.drafter

    def run(self, batches: list[TrainingBatch], *, step: int) -> StepResult:
        """Train on the micro-batches of one step.

        Args:
            batches: Those of this rank.
            step: Finished steps.

        Raises:
            ValueError: No rank has a label that the drafter can draft.
        """
        scale = self.accelerator.num_processes / self._denominator(batches)  # wrappers average
        counts = self._run_micro_batches(batches, scale, step)
        with self.timers.phase(OPTIMIZER):
            grad_norm, lr = self._update()
        return StepResult(
            counts=TrainingCounts.from_tensor(self.sum_over_ranks(counts)),
            grad_norm=grad_norm,
            lr=lr,
        )

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Add up what every rank has; all ranks call this."""
        with self.timers.phase(COMMUNICATION):
            return sum_over_ranks(self.accelerator, values)

    def no_counts(self) -> TrainingCounts:
        """Give counts of nothing, for this drafter's slots."""
        return TrainingCounts.zeros(self.shape.num_drafts)

    def _denominator(self, batches: list[TrainingBatch]) -> float:
        """Count Z over all ranks and micro-batches of the step, before its first forward."""
        weights_K = self.loss_settings.slot_weights.cpu()
        own = torch.stack([batch.weight_sum(weights_K) for batch in batches]).sum()
        total = self.sum_over_ranks(own).item()
        require(
            total > 0,
            "no block of this step has a label that the drafter can draft. Raise "
            f"drafter.draft_vocab_size (={self.shape.draft_vocab_size}) or "
            f"training.pack_tokens (={self.config.training.pack_tokens}).",
        )
        return total

    def _run_micro_batches(self, batches: list[TrainingBatch], scale: float, step: int) -> Tensor:
        """Add up this rank's gradients, and its counts as `TrainingCounts.to_tensor`."""
        rows = self.head_rows.of_step(step)
        settings = replace(self.loss_settings, log_weights=rows.log_weights)
        counts = self.no_counts().to_tensor()
        for number, batch in enumerate(batches, start=1):
            with micro_batch(
                self.accelerator,
                self.model,
                is_last=number == len(batches),
                launch=self.config.launch,
            ):
                with self.timers.phase(FORWARD):
                    loss_sum, own_counts = self.model(batch, rows.head, settings)
                with self.timers.phase(BACKWARD):
                    self.accelerator.backward(loss_sum * scale)
            counts += own_counts
        return counts

    def _update(self) -> tuple[float, float]:
        """Clip and step; give the norm of the gradient before clipping and the learning rate."""
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
        return float(grad_norm), lr
