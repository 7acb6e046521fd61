"""Training blocks: where they start, which slots have a label, what they may see.

A training block imitates one decode step: its anchor is a token of the answer, the last committed
one, and its K - 1 masked slots predict what the target wrote next. Legend: N tokens of a row,
A blocks, K slots of a block, T context rows.
"""

import hashlib

import torch
from torch import Generator, Tensor

from dflash_train.drafter.attention import Blocks


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


def label_mask(loss_mask: Tensor, anchors: Tensor, block_size: int) -> Tensor:
    """Mark the slots that are trained: up to the first unsupervised token, never slot 0.

    A slot behind a gap can never be accepted, so training it is noise.

    Args:
        loss_mask: `[N]` bool of one document.
        anchors: `[A]` int64, positions in it.
        block_size: K.

    Returns:
        `[A, K]` bool; each row is False, then True up to some slot, then False.
    """
    positions_AK = anchors[:, None] + torch.arange(block_size)
    supervised_AK = _take(loss_mask, positions_AK) & (positions_AK < len(loss_mask))
    supervised_AK[:, 0] = True
    prefix_AK = supervised_AK.cumprod(dim=1).bool()
    prefix_AK[:, 0] = False
    return prefix_AK


def block_labels(input_ids: Tensor, anchors: Tensor, block_size: int) -> Tensor:
    """Give the token at each slot's own position, `[A, K]` int64; past the end any id."""
    return _take(input_ids, anchors[:, None] + torch.arange(block_size))


def visibility_mask(blocks: Blocks, num_slots: int) -> Tensor:
    """Write the visibility rule out as one dense mask; the definition that tests compare with.

    A slot of the block at anchor a sees context row t of its own document iff t < a, the existing
    slots of its own block, and nothing else.

    Returns:
        `[A*K, T + A*K]` bool, True where the query (row) may attend to the key (column).
    """
    num_blocks = len(blocks.anchor_positions)
    context_document_T = _document_of(blocks.context_offsets)
    block_document_A = _document_of(blocks.block_offsets)
    sees_AT = (block_document_A[:, None] == context_document_T) & (
        blocks.context_positions() < blocks.anchor_positions[:, None]
    )
    widths_A = torch.full((num_blocks,), num_slots) if blocks.widths is None else blocks.widths
    exists_AK = torch.arange(num_slots) < widths_A[:, None]
    own_AAK = torch.eye(num_blocks, dtype=torch.bool)[:, :, None] & exists_AK
    sees_A = torch.cat([sees_AT, own_AAK.flatten(1)], dim=1)
    return sees_A.repeat_interleave(num_slots, dim=0)


def _take(values: Tensor, positions: Tensor) -> Tensor:
    return values[positions.clamp(max=len(values) - 1)]


def _document_of(offsets: list[int]) -> Tensor:
    lengths = torch.tensor(offsets).diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths)
