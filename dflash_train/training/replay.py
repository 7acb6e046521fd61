"""Exact greedy acceptance from stored answers and features, without a target pass.

Greedy verification depends on the target's output only, so a stored answer tells at every start
which drafts would have been kept. All starts are evaluated in parallel as training blocks, then the
chain is walked from the first. Drafts are chosen slot by slot, and only for blocks whose earlier
drafts were right: what stands behind a rejected draft does not matter, and at an acceptance length
of 1.5 this is a fifth of the logits. It also makes replay exact for drafters whose choice depends
on the token before (DFlash 2, DSpark): in a block still open that token is the stored one.

One rule counts the drafts of every kind of drafter. A step at `start` drafts
`n = min(num_drafts, max_length - start - 1)` tokens, reads them from the last n slots of a block of
`first_slot + n` slots, and verifies `n + 1` tokens: the anchor and the drafts. Plain DFlash has
first_slot 1 and num_drafts K - 1, so a step has as many slots as verified tokens; DSpark's layout
is shifted, first_slot 0 and num_drafts K, so it has one slot fewer.

Legend: A blocks, K slots, D = num_drafts, E hidden size, V vocabulary.
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
    """Tokens each step verifies, the anchor and its drafts: num_drafts + 1, fewer near the budget.

    It is the ceiling of the step's acceptance length.
    """
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
        rows: Answered calls; one with redactions counts up to the first.
    """
    rows = [row.until_first_gap() for row in rows]
    output_head = drafter.output_head(head)
    accepted: list[list[int]] = [[] for _ in rows]
    for pack in _pack_pieces(rows):
        counts = _evaluate(drafter, output_head, pack)
        for piece, part in zip(pack, counts.split([p.stop - p.first for p in pack]), strict=True):
            accepted[piece.index].extend(part.tolist())
    return [
        _walk_chain(row, counts, num_drafts=drafter.config.num_drafts)
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
    config, device = drafter.config, parameter.device
    anchors = torch.cat([piece.anchors for piece in pack])
    # Column i is the stored token i places after the anchor: draft i should be it.
    tokens = torch.cat(
        [block_labels(p.row.input_ids, p.anchors, config.num_drafts + 1) for p in pack]
    )
    tokens = tokens.to(device)
    offered = torch.cat([_num_offered(p.row, p.anchors, config.num_drafts) for p in pack])
    stored = torch.cat([len(p.row.input_ids) - 1 - p.anchors for p in pack])
    features = torch.cat([p.row.features[: p.stop - 1] for p in pack])
    blocks = Blocks(
        context_offsets=_offsets([p.stop - 1 for p in pack]),
        block_offsets=_offsets([p.stop - p.first for p in pack]),
        anchor_positions=anchors.to(device),
        widths=(offered + config.first_slot).to(device),
    )
    embeddings = block_embeddings(
        head, tokens[:, 0], num_slots=config.block_size, config=config
    ).to(parameter.dtype)
    hidden = drafter(embeddings, features.to(device, parameter.dtype), blocks)
    usable = torch.minimum(offered, stored).to(device)
    return _count_accepted(
        drafter, head, hidden[:, config.first_slot :], tokens=tokens, usable=usable
    )


def _count_accepted(
    drafter: Drafter, head: FrozenHead, hidden_ADE: Tensor, *, tokens: Tensor, usable: Tensor
) -> Tensor:
    """Count each block's leading drafts that are the stored token, `[A]` int64.

    Args:
        drafter: Chooses the drafts.
        head: The LM head over the drafter's vocabulary.
        hidden_ADE: `[A, D, E]`, the slots that draft.
        tokens: `[A, D + 1]` int64, the anchor and the tokens stored behind it.
        usable: `[A]` int64, drafts that the step offers and that have a stored token.
    """
    accepted = torch.zeros_like(usable)
    for place in range(hidden_ADE.shape[1]):
        open_blocks = ((accepted == place) & (usable > place)).nonzero().squeeze(1)
        for part in open_blocks.split(SLOTS_AT_ONCE):
            drafted = drafter.choose(hidden_ADE[part, place], tokens[part, place], head)
            accepted[part] += drafted == tokens[part, place + 1]
    return accepted.cpu()


def _walk_chain(row: FeatureRow, accepted: list[int], *, num_drafts: int) -> ReplayTrace:
    """Follow the starts from the first answer token to the end."""
    first, end = row.prompt_length, len(row.input_ids) - 1
    trace = ReplayTrace(starts=[], num_accepted=[], widths=[], end=end)
    start = first
    while start < end:
        num_accepted = accepted[start - first]
        trace.starts.append(start)
        trace.num_accepted.append(num_accepted)
        trace.widths.append(1 + min(num_drafts, row.max_length - start - 1))
        start += min(num_accepted + 1, end - start)
    return trace


def _num_offered(row: FeatureRow, anchors: Tensor, num_drafts: int) -> Tensor:
    """Give `[A]` int64, tokens that a step at each anchor drafts: the bonus token needs room."""
    return (row.max_length - anchors - 1).clamp(max=num_drafts)


def _offsets(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]
