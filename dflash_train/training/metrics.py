"""What training counts. Counts, never means: they add up over micro-batches, ranks and steps.

Slot accuracy (teacher-forced, at random anchors) is neither joint nor conditional acceptance, and
its blocks are not decode steps; the acceptance length comes from replay alone.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(kw_only=True)
class TrainingCounts:
    """Sums over the blocks of some optimiser steps.

    Slots are those that predict, D a block: 1 to K - 1, or 0 to K - 1 where labels are shifted.
    Where training runs over a part of the vocabulary (`training.head_sample`), a slot is correct
    among that part.
    """

    loss_sum: float
    """sum(mask * weight * loss)."""
    weight_sum: float
    """The denominator of the loss: sum(mask * weight), or sum(mask) under D-PACE."""
    ce_sum: float
    """sum(mask * cross entropy) in nats, whatever the loss."""
    num_tokens: int
    num_blocks: int
    slot_labels: list[int]
    """`[D]`, slots with a label."""
    slot_correct: list[int]
    """`[D]`, slots whose draft is the label, given the true token before it and whatever the slots
    before it gave."""
    slot_joint: list[int]
    """`[D]`, slots that are correct together with all slots before them."""

    @classmethod
    def zeros(cls, num_drafts: int) -> "TrainingCounts":
        """Give the counts of no block of D slots."""
        return cls.from_tensor(torch.zeros(5 + 3 * num_drafts, dtype=torch.float64))

    @classmethod
    def from_tensor(cls, values: Tensor) -> "TrainingCounts":
        """Read counts back from `to_tensor`."""
        loss_sum, weight_sum, ce_sum, num_tokens, num_blocks, *slots = values.tolist()
        num_drafts = len(slots) // 3
        labels, correct, joint = (
            [int(count) for count in slots[first : first + num_drafts]]
            for first in range(0, len(slots), num_drafts)
        )
        return cls(
            loss_sum=loss_sum,
            weight_sum=weight_sum,
            ce_sum=ce_sum,
            num_tokens=int(num_tokens),
            num_blocks=int(num_blocks),
            slot_labels=labels,
            slot_correct=correct,
            slot_joint=joint,
        )

    def to_tensor(self) -> Tensor:
        """Give all counts as one float64 vector, exact up to 2**53, for one all-reduce."""
        sums = [self.loss_sum, self.weight_sum, self.ce_sum, self.num_tokens, self.num_blocks]
        slots = [*self.slot_labels, *self.slot_correct, *self.slot_joint]
        return torch.tensor([*sums, *slots], dtype=torch.float64)

    def __add__(self, other: "TrainingCounts") -> "TrainingCounts":
        """Add two counts."""
        return TrainingCounts.from_tensor(self.to_tensor() + other.to_tensor())

    @property
    def loss(self) -> float:
        """The loss that the optimiser saw, averaged over steps by their denominators."""
        return self.loss_sum / self.weight_sum

    @property
    def cross_entropy(self) -> float:
        """Mean cross entropy of all labelled slots in nats, comparable between losses."""
        return self.ce_sum / sum(self.slot_labels)

    @property
    def slot_accuracy(self) -> list[float | None]:
        """`[D]`, share of correct slots; None where no slot had a label."""
        return _shares(self.slot_correct, self.slot_labels)

    @property
    def joint_accuracy(self) -> list[float | None]:
        """`[D]`, share of slots correct together with all before them."""
        return _shares(self.slot_joint, self.slot_labels)


@dataclass(kw_only=True)
class AcceptanceCounts:
    """Sums over the verify steps of replayed requests."""

    num_requests: int = 0
    """Requests with at least one verify step."""
    num_steps: int = 0
    committed: int = 0
    """Sum of acceptance lengths, num_accepted + 1 of each step."""
    per_request_sum: float = 0.0
    """Sum over requests of their own mean acceptance length."""
    accepted_at: list[int] = field(default_factory=list)
    """`[D]`, verify steps that accepted the draft of each position, and so all before it."""

    @classmethod
    def zeros(cls, num_drafts: int) -> "AcceptanceCounts":
        """Give the counts of no request, for blocks of D drafts."""
        return cls(accepted_at=[0] * num_drafts)

    def add_request(self, acceptance_lengths: list[int]) -> None:
        """Count one request; one without a verify step counts for nothing."""
        if acceptance_lengths:
            self.num_requests += 1
            self.num_steps += len(acceptance_lengths)
            self.committed += sum(acceptance_lengths)
            self.per_request_sum += sum(acceptance_lengths) / len(acceptance_lengths)
            for position in range(len(self.accepted_at)):
                self.accepted_at[position] += sum(x > position + 1 for x in acceptance_lengths)

    def to_tensor(self) -> Tensor:
        """Give the counts as one float64 vector, for one all-reduce."""
        counts = [self.num_requests, self.num_steps, self.committed, self.per_request_sum]
        counts += self.accepted_at
        return torch.tensor(counts, dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: Tensor) -> "AcceptanceCounts":
        """Read counts back from `to_tensor`."""
        num_requests, num_steps, committed, per_request_sum, *accepted_at = values.tolist()
        return cls(
            num_requests=int(num_requests),
            num_steps=int(num_steps),
            committed=int(committed),
            per_request_sum=per_request_sum,
            accepted_at=[int(count) for count in accepted_at],
        )

    @property
    def pooled(self) -> float:
        """Tokens committed per verify step, over all steps; needs at least one step."""
        return self.committed / self.num_steps

    @property
    def by_position(self) -> list[float]:
        """Give `[D]`, the share of verify steps that accepted each position; needs a step."""
        return [count / self.num_steps for count in self.accepted_at]

    @property
    def per_request(self) -> float:
        """Mean over requests of their own mean acceptance length; needs at least one step."""
        return self.per_request_sum / self.num_requests


def _shares(hits: list[int], totals: list[int]) -> list[float | None]:
    return [hit / total if total else None for hit, total in zip(hits, totals, strict=True)]
