"""Exact greedy acceptance from stored answers and features, without a target pass.

Greedy verification depends on the target's output only, so a stored answer tells at every start
which drafts would have been kept. Many rows are replayed side by side: each pass drafts the next
block of every row, and at an acceptance length of 2 half of the starts are never visited. Only few
rows that are left evaluate starts ahead of their step too, since a pass over 2 blocks takes about
as long as one over 20. Drafts are chosen slot by slot, and only for blocks whose earlier drafts
were right: what stands behind a rejected draft does not matter. It also makes replay exact for
drafters whose choice depends on the token before (DFlash 2, DSpark): in a block still open that
token is the stored one.

One rule counts the drafts of every kind of drafter. A step at `start` drafts
`n = min(num_drafts, max_length - start - 1)` tokens, reads them from the last n slots of a block of
`first_slot + n` slots, and verifies `n + 1` tokens: the anchor and the drafts. Plain DFlash has
first_slot 1 and num_drafts K - 1, so a step has as many slots as verified tokens; DSpark's layout
is shifted, first_slot 0 and num_drafts K, so it has one slot fewer.

Legend: A blocks, K slots, D = num_drafts, E hidden size, V vocabulary; T context tokens, G kv
heads, D head dim of contexts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_train.drafter.attention import Blocks, ContextKV
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.store import FeatureRow
from dflash_train.training.blocks import block_labels
from dflash_train.training.metrics import AcceptanceCounts

ROWS_AT_ONCE = {"cpu": 64}
"""Rows replayed side by side, by device type."""
ROWS_AT_ONCE_ELSEWHERE = 4
"""Where starting an operation costs more than a block that no step visits."""
CONTEXT_AT_ONCE = 1 << 15
"""Tokens of rows replayed side by side; a longer row stands alone."""
FEW_ROWS = 16
"""Fewer open rows do not fill a pass with a block each: it reads all weights for any number."""
BLOCKS_AT_ONCE = 256
"""Blocks of a pass that few rows fill with starts ahead, some of which no step will visit."""
SLOTS_AT_ONCE = 1024
"""Slots whose logits `[slots, V]` exist at once."""


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


@dataclass(frozen=True, kw_only=True)
class ReplayedRow:
    """A request up to its first redaction, and its verify steps."""

    row: FeatureRow
    trace: ReplayTrace


def replay(drafter: Drafter, head: FrozenHead, row: FeatureRow) -> ReplayTrace:
    """Replay one stored request; an answer of one token gives no step."""
    return replay_rows(drafter, head, [row])[0]


def replay_many(drafter: Drafter, head: FrozenHead, rows: Iterable[FeatureRow]) -> AcceptanceCounts:
    """Replay requests and add up their verify steps."""
    counts = AcceptanceCounts.zeros(drafter.config.num_drafts)
    for replayed in replay_each(drafter, head, rows):
        counts.add_request(replayed.trace.acceptance_lengths)
    return counts


def replay_rows(drafter: Drafter, head: FrozenHead, rows: list[FeatureRow]) -> list[ReplayTrace]:
    """Replay stored requests and give their traces in the same order."""
    return [replayed.trace for replayed in replay_each(drafter, head, rows)]


@torch.no_grad()
def replay_each(
    drafter: Drafter, head: FrozenHead, rows: Iterable[FeatureRow]
) -> Iterator[ReplayedRow]:
    """Replay stored requests in order, many of them side by side, and hold no more than those.

    Args:
        drafter: The drafter, on any device and in any dtype; features follow it.
        head: The target's embedding table and LM head, on the same device.
        rows: Answered calls; one with redactions counts up to the first.
    """
    output_head = drafter.output_head(head)
    device = head.embedding_weight.device
    for together in _packs((row.until_first_gap() for row in rows), device):
        pack = _Pack(drafter, output_head, together)
        while pack.num_open:
            pack.step()
        yield from (ReplayedRow(row=walk.row, trace=walk.trace) for walk in pack.walks)


def _packs(rows: Iterable[FeatureRow], device: torch.device) -> Iterator[list[FeatureRow]]:
    """Cut rows into packs that are replayed side by side."""
    most_rows = ROWS_AT_ONCE.get(device.type, ROWS_AT_ONCE_ELSEWHERE)
    pack: list[FeatureRow] = []
    room = CONTEXT_AT_ONCE
    for row in rows:
        room -= len(row.input_ids)
        if pack and (len(pack) == most_rows or room < 0):
            yield pack
            pack, room = [], CONTEXT_AT_ONCE - len(row.input_ids)
        pack.append(row)
    if pack:
        yield pack


@dataclass(kw_only=True)
class _Walk:
    """One row on the way from its first answer token to its last."""

    row: FeatureRow
    trace: ReplayTrace
    start: int
    """Position of the next step's anchor."""

    @classmethod
    def begin(cls, row: FeatureRow) -> "_Walk":
        end = len(row.input_ids) - 1
        trace = ReplayTrace(starts=[], num_accepted=[], widths=[], end=end)
        return cls(row=row, trace=trace, start=row.prompt_length)

    @property
    def is_open(self) -> bool:
        return self.start < self.trace.end

    @property
    def num_context(self) -> int:
        """Tokens before the last start: what the blocks of this row may see."""
        return self.trace.end - 1 if self.is_open else 0

    def next_starts(self, number: int) -> range:
        """Give the next position and those after it, at which the steps to come may start."""
        stop = min(self.start + number, self.trace.end)
        return range(self.start, max(self.start, stop))

    def follow(self, starts: range, accepted: list[int], *, num_drafts: int) -> None:
        """Take the steps that start at positions whose counts are known."""
        while self.start < starts.stop:
            num_accepted = accepted[self.start - starts.start]
            self.trace.starts.append(self.start)
            self.trace.num_accepted.append(num_accepted)
            self.trace.widths.append(1 + min(num_drafts, self.row.max_length - self.start - 1))
            self.start += min(num_accepted + 1, self.trace.end - self.start)


class _Pack:
    """Rows replayed together, whose context is projected once."""

    def __init__(self, drafter: Drafter, head: FrozenHead, rows: list[FeatureRow]) -> None:
        self.drafter, self.head = drafter, head
        self.walks = [_Walk.begin(row) for row in rows]
        self.parameter = next(drafter.parameters())
        lengths = [walk.num_context for walk in self.walks]
        self.context_offsets = _offsets(lengths)
        by_row = [self._context(row, length) for row, length in zip(rows, lengths, strict=True)]
        self.contexts = [_end_to_end(list(layer)) for layer in zip(*by_row, strict=True)]

    @property
    def num_open(self) -> int:
        """Rows that have steps left."""
        return sum(walk.is_open for walk in self.walks)

    def _context(self, row: FeatureRow, length: int) -> list[ContextKV]:
        device, dtype = self.parameter.device, self.parameter.dtype
        features = row.features[:length].to(device, dtype)
        return self.drafter.project_context(features, torch.arange(length, device=device))

    def step(self) -> None:
        """Evaluate the next starts of every open row in one drafter pass, and follow them."""
        is_full = self.num_open >= FEW_ROWS
        number = 1 if is_full else max(1, BLOCKS_AT_ONCE // self.num_open)
        starts = [walk.next_starts(number) for walk in self.walks]
        counts = self._evaluate(starts).split([len(each) for each in starts])
        for walk, each, accepted in zip(self.walks, starts, counts, strict=True):
            walk.follow(each, accepted.tolist(), num_drafts=self.drafter.config.num_drafts)

    def _evaluate(self, starts: list[range]) -> Tensor:
        """Give `[A]` num_accepted of the starts of each row."""
        config, device = self.drafter.config, self.parameter.device
        rows = [walk.row for walk in self.walks]
        by_row = [torch.arange(each.start, each.stop) for each in starts]
        anchors = torch.cat(by_row)
        # Column i is the stored token i places after the anchor: draft i should be it.
        labels = (
            block_labels(row.input_ids, each, config.num_drafts + 1)
            for row, each in zip(rows, by_row, strict=True)
        )
        tokens = torch.cat(list(labels)).to(device)
        sizes = torch.tensor([len(each) for each in starts])
        # The bonus token needs room too.
        max_lengths = torch.tensor([row.max_length for row in rows]).repeat_interleave(sizes)
        offered = (max_lengths - anchors - 1).clamp(max=config.num_drafts)
        stored = torch.tensor([walk.trace.end for walk in self.walks]).repeat_interleave(sizes)
        blocks = Blocks(
            context_offsets=self.context_offsets,
            block_offsets=_offsets(sizes.tolist()),
            anchor_positions=anchors.to(device),
            widths=(offered + config.first_slot).to(device),
        )
        embeddings = block_embeddings(
            self.head, tokens[:, 0], num_slots=config.block_size, config=config
        ).to(self.parameter.dtype)
        hidden = self.drafter.denoise(embeddings, self.contexts, blocks)
        usable = torch.minimum(offered, stored - anchors).to(device)
        return _count_accepted(
            self.drafter, self.head, hidden[:, config.first_slot :], tokens=tokens, usable=usable
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


def _end_to_end(rows: list[ContextKV]) -> ContextKV:
    """Join the rows of one layer, laid out as attention reads them so that no pass copies them."""
    k_GTD = torch.cat([row.k.transpose(0, 1) for row in rows], dim=1)
    v_GTD = torch.cat([row.v.transpose(0, 1) for row in rows], dim=1)
    return ContextKV(k_GTD.transpose(0, 1), v_GTD.transpose(0, 1))


def _offsets(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]
