"""From stored rows to micro-batches: the endless stream of packs, and their collation.

Rows are laid end to end without padding; a document keeps only the feature rows that its blocks
can see. The stream of packs is one for the whole run: epoch after epoch, each a seeded permutation
packed greedily. Ranks take turns on it, so no pack is dropped or repeated, every rank runs the same
number of micro-batches, and R ranks see what one process with R times the accumulation sees.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from dflash_train.config import require
from dflash_train.drafter.attention import Blocks
from dflash_train.features.row_source import RowSource
from dflash_train.features.store import FeatureRow
from dflash_train.features.teacher import TeacherRow, join
from dflash_train.training.blocks import (
    anchor_generator,
    block_labels,
    hashed_generator,
    label_mask,
    select_anchors,
)


@dataclass(kw_only=True)
class TrainingBatch:
    """One micro-batch: documents laid end to end and the blocks drawn from them."""

    target_features: Tensor
    """`[T, L*E]`."""
    blocks: Blocks
    anchor_ids: Tensor
    """`[A]` int64, token at each anchor."""
    labels: Tensor
    """`[A, K]` int64, token that each slot predicts; means nothing where the mask is False."""
    label_mask: Tensor
    """`[A, K]` bool, True where the slot counts in the loss."""
    num_tokens: int
    """Tokens of the rows, before features that no block sees were left out."""
    teacher: TeacherRow | None = None
    """The target's distribution of each slot's token, `[A, K, k]`; None where no loss asks."""

    @property
    def previous_ids(self) -> Tensor:
        """Give `[A, K]` int64, the true token before each slot's label."""
        return torch.cat([self.anchor_ids[:, None], self.labels[:, :-1]], dim=1)

    def weight_sum(self, position_weights: Tensor) -> Tensor:
        """Give this batch's share of the loss's denominator, sum(mask * weight), float64.

        It needs labels only, so it is known before any forward.
        """
        return (self.label_mask * position_weights.double()).sum()

    def to(self, device: torch.device, *, dtype: torch.dtype) -> "TrainingBatch":
        """Move all tensors and convert the features."""
        return replace(
            self,
            target_features=self.target_features.to(device, dtype),
            blocks=replace(self.blocks, anchor_positions=self.blocks.anchor_positions.to(device)),
            anchor_ids=self.anchor_ids.to(device),
            labels=self.labels.to(device),
            label_mask=self.label_mask.to(device),
            teacher=None if self.teacher is None else _teacher_to(self.teacher, device),
        )


@dataclass(kw_only=True)
class BlockSettings:
    """How training blocks are drawn from rows and labelled."""

    block_size: int
    """K."""
    num_anchors: int
    """Blocks per row, at most."""
    seed: int
    """Seed of the run."""
    first_slot: int = 1
    """First slot that predicts: 1, or 0 where labels are shifted."""
    draft_token_ids: Tensor | None = None
    """`[Vd]` int64, ascending: ids that can be drafted; a block's labels end at any other."""
    use_teacher: bool = False
    """Also take the target's distributions from the rows."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Rows of one micro-batch and their place in the stream."""

    epoch: int
    position: int
    """Number of the pack in its epoch."""
    rows: list[int]


def plan_epoch(
    num_tokens: list[int], *, pack_tokens: int, seed: int, epoch: int
) -> list[list[int]]:
    """Permute the rows of one epoch and pack them greedily in that order.

    Args:
        num_tokens: Length of each row, in tokens.
        pack_tokens: Tokens in one pack, at most; a longer row stands alone.
        seed: Seed of the run.
        epoch: Number of the epoch; each has its own permutation.

    Returns:
        Row numbers of each pack; every row is in exactly one.
    """
    order = torch.randperm(len(num_tokens), generator=hashed_generator("order", seed, epoch))
    packs: list[list[int]] = []
    room = 0
    for row in order.tolist():
        if not packs or num_tokens[row] > room:
            packs.append([])
            room = pack_tokens
        packs[-1].append(row)
        room -= num_tokens[row]
    return packs


def pack_stream(
    num_tokens: list[int], *, pack_tokens: int, seed: int, epoch: int = 0, position: int = 0
) -> Iterator[Pack]:
    """Yield the packs of the run without end, from a place in it on.

    Args:
        num_tokens: Length of each row, in tokens; not empty.
        pack_tokens: Tokens in one pack, at most.
        seed: Seed of the run.
        epoch: Epoch to start in.
        position: First pack of that epoch; may be one past its last.
    """
    while True:
        packs = plan_epoch(num_tokens, pack_tokens=pack_tokens, seed=seed, epoch=epoch)
        for number in range(position, len(packs)):
            yield Pack(epoch=epoch, position=number, rows=packs[number])
        epoch, position = epoch + 1, 0


def take_window(stream: Iterator[Pack], *, num_micro_batches: int, num_ranks: int) -> list[Pack]:
    """Take the packs of one optimiser step; rank r runs number r, r + R, r + 2R and so on."""
    return list(islice(stream, num_micro_batches * num_ranks))


def collate(rows: list[FeatureRow], settings: BlockSettings, *, epoch: int) -> TrainingBatch:
    """Draw blocks from rows and lay the rows end to end.

    Rows without an eligible anchor are left out.

    Args:
        rows: Documents of one pack.
        settings: How blocks are drawn.
        epoch: Epoch of the pack; anchors are drawn anew in each.

    Raises:
        ValueError: No row has an eligible anchor, or a wanted distribution is missing.
    """
    documents = [
        (row, anchors) for row in rows if len(anchors := _draw_anchors(row, settings, epoch=epoch))
    ]
    if not documents:
        raise ValueError(
            f"training rows {', '.join(row.id for row in rows)} have no two answer tokens in a "
            "row, so no block can start in them. Run `regenerate` and `collect` again."
        )
    # The last anchor sees the rows before it and nobody sees more.
    context_lengths = [int(anchors[-1]) for _, anchors in documents]
    anchors = [anchors for _, anchors in documents]
    slots = [_label_slots(row, at, settings) for row, at in documents]
    return TrainingBatch(
        target_features=torch.cat(
            [
                row.features[:length]
                for (row, _), length in zip(documents, context_lengths, strict=True)
            ]
        ),
        blocks=Blocks(
            context_offsets=_offsets(context_lengths),
            block_offsets=_offsets([len(positions) for positions in anchors]),
            anchor_positions=torch.cat(anchors),
        ),
        anchor_ids=torch.cat([row.input_ids[positions] for row, positions in documents]),
        labels=torch.cat([part.labels for part in slots]),
        label_mask=torch.cat([part.mask for part in slots]),
        num_tokens=sum(len(row.input_ids) for row in rows),
        teacher=join([part.teacher for part in slots if part.teacher is not None])
        if settings.use_teacher
        else None,
    )


@dataclass(kw_only=True)
class _Slots:
    """What the slots of one row's blocks should say."""

    labels: Tensor
    mask: Tensor
    teacher: TeacherRow | None


def _label_slots(row: FeatureRow, anchors: Tensor, settings: BlockSettings) -> _Slots:
    first, size = settings.first_slot, settings.block_size
    labels_AK = block_labels(row.input_ids, anchors, size, first_slot=first)
    mask_AK = label_mask(row.loss_mask, anchors, size, first_slot=first)
    if settings.draft_token_ids is not None:
        mask_AK &= torch.isin(labels_AK, settings.draft_token_ids)
        mask_AK[:, first:] = mask_AK[:, first:].cumprod(dim=1).bool()
    teacher = _teacher_of(row, anchors, mask_AK, first) if settings.use_teacher else None
    return _Slots(labels=labels_AK, mask=mask_AK, teacher=teacher)


def _teacher_of(row: FeatureRow, anchors: Tensor, mask_AK: Tensor, first_slot: int) -> TeacherRow:
    """Take the distribution of each slot's token: stored one row before the token's position."""
    rows_AK = anchors[:, None] + torch.arange(mask_AK.shape[1]) - first_slot
    rows_AK = rows_AK.clamp(0, len(row.input_ids) - 1)
    teacher = row.teacher
    is_there = teacher is not None and bool(
        (teacher.probabilities[rows_AK[mask_AK]] > 0).any(1).all()
    )
    if teacher is None or not is_there:
        raise ValueError(
            f"row {row.id} has labels without a distribution of the target, which the recipe's "
            "losses compare with. Set data.teacher_top_k and run `collect` again."
        )
    return TeacherRow(ids=teacher.ids[rows_AK], probabilities=teacher.probabilities[rows_AK])


def _draw_anchors(row: FeatureRow, settings: BlockSettings, *, epoch: int) -> Tensor:
    generator = anchor_generator(settings.seed, epoch=epoch, row_id=row.id)
    return select_anchors(row.loss_mask, settings.num_anchors, generator=generator)


def _offsets(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def _teacher_to(teacher: TeacherRow, device: torch.device) -> TeacherRow:
    return replace(
        teacher, ids=teacher.ids.to(device), probabilities=teacher.probabilities.to(device)
    )


class Batches(Protocol):
    """Where the trainer takes its micro-batches from; their content is a function of the pack."""

    def stream(self, *, epoch: int, position: int) -> Iterator[Pack]:
        """Yield the packs of all ranks without end, from a place in the stream on."""
        ...

    def load(self, pack: Pack) -> TrainingBatch:
        """Give the rows of a pack and the blocks drawn from them."""
        ...


class BatchSource:
    """The training rows of a run and the micro-batches made of them, each when it is asked for."""

    def __init__(self, store: RowSource, settings: BlockSettings, *, pack_tokens: int) -> None:
        """Choose the rows that can be trained on: those with two answer tokens or more.

        Args:
            store: The training split.
            settings: How blocks are drawn.
            pack_tokens: Tokens in one pack, at most.

        Raises:
            ValueError: There is none.
        """
        self.store, self.settings, self.pack_tokens = store, settings, pack_tokens
        self.rows = trainable_rows(store)

    def stream(self, *, epoch: int, position: int) -> Iterator[Pack]:
        """Yield packs without end, from a place in the stream on."""
        return pack_stream(
            [self.store.lines[row].num_tokens for row in self.rows],
            pack_tokens=self.pack_tokens,
            seed=self.settings.seed,
            epoch=epoch,
            position=position,
        )

    def load(self, pack: Pack) -> TrainingBatch:
        """Read a pack's rows and draw its blocks."""
        rows = self.store.read([self.rows[row] for row in pack.rows])
        return collate(rows, self.settings, epoch=pack.epoch)


def trainable_rows(store: RowSource) -> list[int]:
    """List the rows with two answer tokens or more.

    Raises:
        ValueError: There is none.
    """
    rows = [
        row for row, line in enumerate(store.lines) if line.num_tokens - line.prompt_length >= 2
    ]
    require(
        len(rows) > 0,
        f"{store.folder} has {len(store)} rows and none with two answer tokens, so there is "
        "nothing to train on. Give more traffic (data.logs) or raise data.max_new_tokens, and "
        "run `collect` again.",
    )
    return rows
