"""Which ids the head is trained on, where that is not the whole vocabulary.

Two different things. A drafter of a reduced vocabulary can draft the most frequent label tokens
only; they are chosen once, before training, from the training rows. A full drafter may still be
trained over a part of the vocabulary (`training.head_sample`): the label tokens of all training
rows, plus some of the others, drawn anew each step and weighted up to stand for all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_train.drafter.model import Drafter
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.row_source import RowSource
from dflash_train.training.blocks import hashed_generator


def count_labels(store: RowSource, rows: list[int], *, vocab_size: int) -> Tensor:
    """Count how often each id can be a label: `[V]` int64 over the given rows' answers."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for index in rows:
        input_ids, loss_mask = store.read_tokens(index)
        counts += torch.bincount(input_ids[loss_mask], minlength=vocab_size)
    return counts


def choose_vocabulary(
    drafter: Drafter,
    store: RowSource,
    rows: list[int],
    *,
    num_drawn: int,
    keeps_ids: bool,
    stop_token_ids: Sequence[int],
) -> Tensor | None:
    """Set a reduced drafter's ids, and list the labels where heads are sampled.

    Both come from the labels of the training rows.

    Args:
        drafter: About to be trained.
        store: The training split.
        rows: Those that are trained on.
        num_drawn: `training.head_sample`.
        keeps_ids: The drafter has been trained before, so its tables keep their ids.
        stop_token_ids: Ids that a reduced vocabulary holds in any case.

    Returns:
        `[V]` bool, ids that are labels; None where every step takes the whole head.
    """
    size = drafter.config.draft_vocab_size
    if size is None and num_drawn == 0:
        return None
    counts = count_labels(store, rows, vocab_size=drafter.config.vocab_size)
    if size is not None and not keeps_ids:
        drafter.set_draft_vocabulary(most_frequent_ids(counts, size, always=list(stop_token_ids)))
    return counts > 0 if num_drawn else None


def most_frequent_ids(counts: Tensor, size: int, *, always: list[int]) -> Tensor:
    """Choose a draft vocabulary, `[size]` int64, ascending.

    Args:
        counts: `[V]` from `count_labels`; equal counts are taken in the order of their ids.
        size: Vd.
        always: Ids that are in it whatever their count: the target's stop ids, no more than Vd.
    """
    ranked = counts.clone()
    ranked[always] = counts.sum() + 1
    return ranked.argsort(descending=True, stable=True)[:size].sort().values


@dataclass(kw_only=True)
class SampledHead:
    """The rows of the head that the softmax of one optimiser step runs over."""

    head: FrozenHead
    log_weights: Tensor | None
    """`[rows of the head]` float32: 0 for a label's id, log(others / drawn) for a drawn one; None
    where nothing was drawn."""


@dataclass(frozen=True, kw_only=True)
class HeadRows:
    """Which rows of the head each optimiser step's softmax runs over."""

    head: FrozenHead
    """What the drafter drafts with: the whole head, or that of its reduced vocabulary."""
    is_label: Tensor | None
    """`[V]` bool from `choose_vocabulary`; None where every step takes all rows of `head`."""
    num_drawn: int
    seed: int

    @property
    def number(self) -> int:
        """How many rows a step has."""
        if self.is_label is None:
            return len(self.head.lm_head_weight)
        return min(len(self.is_label), int(self.is_label.sum()) + self.num_drawn)

    def of_step(self, step: int) -> SampledHead:
        """Give the rows after so many finished steps."""
        if self.is_label is None:
            return SampledHead(head=self.head, log_weights=None)
        return sample_head(
            self.head, self.is_label, num_drawn=self.num_drawn, seed=self.seed, step=step
        )


def sample_head(
    head: FrozenHead, is_label: Tensor, *, num_drawn: int, seed: int, step: int
) -> SampledHead:
    """Draw the head's rows for one step, a function of seed and step alone.

    With each drawn id's logit raised by log(others / drawn), the sum of exponentials is in the
    mean that of the whole vocabulary.

    Args:
        head: The whole head.
        is_label: `[V]` bool, ids that are always in it.
        num_drawn: Ids drawn from the others, without replacement; all of them if they are fewer.
        seed: Seed of the run.
        step: Finished optimiser steps.
    """
    others = (~is_label).nonzero().squeeze(1)
    order = torch.randperm(len(others), generator=hashed_generator("head", seed, step))
    is_drawn = torch.zeros_like(is_label)
    is_drawn[others[order[:num_drawn]]] = True
    ids = (is_label | is_drawn).nonzero().squeeze(1)
    log_weight = math.log(len(others) / int(is_drawn.sum())) if len(others) else 0.0
    restricted = head.restricted(ids)
    log_weights = is_drawn[ids].float() * log_weight
    return SampledHead(
        head=restricted, log_weights=log_weights.to(restricted.lm_head_weight.device)
    )
