"""Exact greedy acceptance from stored answers and features, without a target pass.

Greedy verification depends on the target's output only, so a stored answer tells at every start
which drafts would have been kept. All starts are evaluated in parallel as training blocks, then the
chain is walked from the first. The head is applied slot by slot, and only to blocks whose earlier
slots were right: what stands behind a rejected draft does not matter, and at an acceptance length
of 1.5 this is a fifth of the logits. Legend: A blocks, K slots, E hidden size, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_train.drafter.attention import Blocks
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.store import FeatureRow
from dflash_train.features.target import FrozenHead
from dflash_train.training.blocks import block_labels
from dflash_train.training.metrics import AcceptanceCounts

BLOCKS_AT_ONCE = 256
SLOTS_AT_ONCE = 1024


@dataclass(kw_only=True)
class ReplayTrace:
    """The verify steps of one request, in order."""

    starts: list[int]
    """Position of each step's anchor."""
    num_accepted: list[int]
    """Drafted tokens kept by each step; drafts past the stored answer's end count as rejected."""
    widths: list[int]
    """Slots of each step's block: K, fewer near the budget."""
    end: int
    """Position of the answer's last token."""

    @property
    def acceptance_lengths(self) -> list[int]:
        """Tokens committed per step, num_accepted + 1."""
        return [accepted + 1 for accepted in self.num_accepted]


@dataclass(kw_only=True)
class _Piece:
    """Starts `first .. stop - 1` of one row, evaluated together."""

    index: int
    row: FeatureRow
    first: int
    stop: int

    @property
    def anchors(self) -> Tensor:
        return torch.arange(self.first, self.stop)


def replay(drafter: Drafter, head: FrozenHead, row: FeatureRow) -> ReplayTrace:
    """Replay one stored request; an answer of one token gives no step."""
    return replay_rows(drafter, head, [row])[0]


def replay_many(drafter: Drafter, head: FrozenHead, rows: Iterable[FeatureRow]) -> AcceptanceCounts:
    """Replay requests and add up their verify steps."""
    counts = AcceptanceCounts()
    for trace in replay_rows(drafter, head, list(rows)):
        counts.add_request(trace.acceptance_lengths)
    return counts


@torch.no_grad()
def replay_rows(drafter: Drafter, head: FrozenHead, rows: list[FeatureRow]) -> list[ReplayTrace]:
    """Replay stored requests, many starts in one drafter pass.

    Args:
        drafter: The drafter, on any device and in any dtype; features follow it.
        head: The target's embedding table and LM head, on the same device.
        rows: Answered calls whose tokens the target wrote.
    """
    accepted: list[list[int]] = [[] for _ in rows]
    for pack in _pack_pieces(rows):
        counts = _evaluate(drafter, head, pack)
        for piece, part in zip(pack, counts.split([p.stop - p.first for p in pack]), strict=True):
            accepted[piece.index].extend(part.tolist())
    block_size = drafter.config.block_size
    return [
        _walk_chain(row, counts, block_size=block_size)
        for row, counts in zip(rows, accepted, strict=True)
    ]


def _pack_pieces(rows: list[FeatureRow]) -> Iterator[list[_Piece]]:
    """Cut the rows' starts into packs of at most `BLOCKS_AT_ONCE` blocks."""
    pack: list[_Piece] = []
    room = BLOCKS_AT_ONCE
    for index, row in enumerate(rows):
        first, end = row.prompt_length, len(row.input_ids) - 1
        while first < end:
            stop = min(end, first + room)
            pack.append(_Piece(index=index, row=row, first=first, stop=stop))
            room -= stop - first
            first = stop
            if room == 0:
                yield pack
                pack, room = [], BLOCKS_AT_ONCE
    if pack:
        yield pack


def _evaluate(drafter: Drafter, head: FrozenHead, pack: list[_Piece]) -> Tensor:
    """Give `[A]` num_accepted of every start in a pack."""
    parameter = next(drafter.parameters())
    block_size, device = drafter.config.block_size, parameter.device
    anchors = torch.cat([piece.anchors for piece in pack])
    labels = torch.cat([block_labels(p.row.input_ids, p.anchors, block_size) for p in pack])
    offered = torch.cat([_widths(p.row, p.anchors, block_size) for p in pack])
    known = torch.cat([len(p.row.input_ids) - p.anchors for p in pack])
    features = torch.cat([p.row.features[: p.stop - 1] for p in pack])
    blocks = Blocks(
        context_offsets=_offsets([p.stop - 1 for p in pack]),
        block_offsets=_offsets([p.stop - p.first for p in pack]),
        anchor_positions=anchors.to(device),
        widths=offered.to(device),
    )
    embeddings = block_embeddings(
        head, labels[:, 0].to(device), num_slots=block_size, config=drafter.config
    )
    hidden = drafter(embeddings.to(parameter.dtype), features.to(device, parameter.dtype), blocks)
    usable = torch.minimum(offered, known)
    return _count_accepted(
        drafter, head, hidden, labels=labels.to(device), usable=usable.to(device)
    )


def _count_accepted(
    drafter: Drafter, head: FrozenHead, hidden_AKE: Tensor, *, labels: Tensor, usable: Tensor
) -> Tensor:
    """Count each block's leading slots 1, 2, ... whose argmax is the label, `[A]` int64.

    Args:
        drafter: Shapes the logits.
        head: The target's LM head.
        hidden_AKE: `[A, K, E]`.
        labels: `[A, K]` int64.
        usable: `[A]` int64, slots that exist and have a stored token.
    """
    accepted = torch.zeros_like(usable)
    for slot in range(1, hidden_AKE.shape[1]):
        open_blocks = ((accepted == slot - 1) & (usable > slot)).nonzero().squeeze(1)
        for part in open_blocks.split(SLOTS_AT_ONCE):
            hidden = hidden_AKE[part, slot].to(head.lm_head_weight.dtype)
            drafted = drafter.logits(hidden, head).argmax(dim=-1)
            accepted[part] += drafted == labels[part, slot]
    return accepted.cpu()


def _walk_chain(row: FeatureRow, accepted: list[int], *, block_size: int) -> ReplayTrace:
    """Follow the starts from the first answer token to the end."""
    first, end = row.prompt_length, len(row.input_ids) - 1
    trace = ReplayTrace(starts=[], num_accepted=[], widths=[], end=end)
    start = first
    while start < end:
        num_accepted = accepted[start - first]
        trace.starts.append(start)
        trace.num_accepted.append(num_accepted)
        trace.widths.append(min(block_size, row.max_length - start))
        start += min(num_accepted + 1, end - start)
    return trace


def _widths(row: FeatureRow, anchors: Tensor, block_size: int) -> Tensor:
    return (row.max_length - anchors).clamp(max=block_size)


def _offsets(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]
