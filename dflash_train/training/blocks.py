"""Training blocks: where they start, which slots have a label, what they may see.

A training block imitates one decode step: its anchor is a token of the answer, the last committed
one, and its K - 1 masked slots predict what the target wrote next. Legend: N tokens of a row,
A blocks, K slots of a block, T context rows.
"""

import hashlib

import torch
from torch import Generator, Tensor

from dflash_train.drafter.attention import Blocks
from dflash_train.drafter.config import Visibility

_NO_WINDOW = 1 << 62


def anchor_generator(seed: int, *, epoch: int, row_id: str) -> Generator:
    """Give the random stream of one row in one epoch, whichever process draws from it."""
    return hashed_generator("anchors", seed, epoch, row_id)


def hashed_generator(*key: str | int) -> Generator:
    """Give a CPU generator whose seed is a hash of the key."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def select_anchors(loss_mask: Tensor, num_anchors: int, *, generator: Generator) -> Tensor:
    """Sample the positions at which training blocks start.

    An anchor is eligible if it and the token after it count in the loss: the first anchor at
    serving is the first answer token, and a block without a label teaches nothing. The draw is
    uniform and without replacement.

    Args:
        loss_mask: `[N]` bool, True where the target wrote the token; one document.
        num_anchors: Blocks wanted.
        generator: Random stream, see `anchor_generator`.

    Returns:
        `[A]` int64, ascending; fewer than `num_anchors`, or none, where not enough are eligible.
    """
    eligible = (loss_mask[:-1] & loss_mask[1:]).nonzero().squeeze(1)
    drawn = torch.randperm(len(eligible), generator=generator)[:num_anchors]
    return eligible[drawn].sort().values


def label_mask(
    loss_mask: Tensor, anchors: Tensor, block_size: int, *, first_slot: int = 1
) -> Tensor:
    """Mark the slots that are trained: up to the first one whose label is not supervised.

    A slot behind a gap can never be accepted, so training it is noise.

    Args:
        loss_mask: `[N]` bool of one document.
        anchors: `[A]` int64, positions in it.
        block_size: K.
        first_slot: `DrafterConfig.first_slot`; slots before it have no label.

    Returns:
        `[A, K]` bool; each row is False before `first_slot`, then True up to some slot, then
        False.
    """
    positions_AK = _label_positions(anchors, block_size, first_slot)
    supervised_AK = _take(loss_mask, positions_AK) & (positions_AK < len(loss_mask))
    supervised_AK[:, :first_slot] = True
    prefix_AK = supervised_AK.cumprod(dim=1).bool()
    prefix_AK[:, :first_slot] = False
    return prefix_AK


def block_labels(
    input_ids: Tensor, anchors: Tensor, block_size: int, *, first_slot: int = 1
) -> Tensor:
    """Give the token that each slot predicts, `[A, K]` int64; past the end any id.

    It stands at the slot's own position, a + k, or one further where `first_slot` is 0.
    """
    return _take(input_ids, _label_positions(anchors, block_size, first_slot))


def visibility_mask(
    blocks: Blocks, num_slots: int, *, visibility: Visibility | None = None
) -> Tensor:
    """Write the visibility rule out as one dense mask; the definition that tests compare with.

    Slot i of the block at anchor a sees context row t of its own document iff t < a (and
    a + i - t < W in a window), existing slot j of its own block (unless j > i in a causal layer;
    |i - j| < W in a window), and nothing else. A slot past its block's width sees itself too, so
    that no row is empty.

    Returns:
        `[A*K, T + A*K]` bool, True where the query (row) may attend to the key (column).
    """
    visibility = visibility or Visibility()
    window = _NO_WINDOW if visibility.window is None else visibility.window
    num_blocks, slots_K = len(blocks.anchor_positions), torch.arange(num_slots)
    same_block_AA = torch.eye(num_blocks, dtype=torch.bool)
    same_document_AT = _document_of(blocks.block_offsets)[:, None] == _document_of(
        blocks.context_offsets
    )
    positions_T = blocks.context_positions()
    sees_AT = same_document_AT & (positions_T < blocks.anchor_positions[:, None])
    near_AKT = blocks.slot_positions(num_slots)[:, :, None] - positions_T < window
    sees_AKT = sees_AT[:, None] & near_AKT

    widths_A = torch.full((num_blocks,), num_slots) if blocks.widths is None else blocks.widths
    exists_AK = slots_K < widths_A[:, None]
    ahead_KK = slots_K - slots_K[:, None]  # how far the key stands after the query
    own_KK = (ahead_KK.abs() < window) & (not visibility.is_causal or ahead_KK <= 0)
    own_AKK = own_KK & (exists_AK[:, None] | (ahead_KK == 0))
    own_AKAK = same_block_AA[:, None, :, None] & own_AKK[:, :, None]
    return torch.cat([sees_AKT.flatten(0, 1), own_AKAK.flatten(2).flatten(0, 1)], dim=1)


def _label_positions(anchors: Tensor, block_size: int, first_slot: int) -> Tensor:
    return anchors[:, None] + torch.arange(block_size) + (1 - first_slot)


def _take(values: Tensor, positions: Tensor) -> Tensor:
    return values[positions.clamp(max=len(values) - 1)]


def _document_of(offsets: list[int]) -> Tensor:
    lengths = torch.tensor(offsets).diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths)
