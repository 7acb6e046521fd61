"""Which tiles of block attention meet: the schedule that its kernels walk and its reports count.

The queries of a kv head stand in packed rows, in the order block, slot, head of the group, so that
neighbouring blocks share each tile of keys. A query tile is a run of rows of one document with the
keys that it walks: from the first that any of its rows sees to the last, the stretch between that
all of them see without a mask. A key tile is a run of context keys with the rows that it walks.
Both are tables that torch computes where the anchors are, without waiting for a device, from the
anchors' least and largest in each run: any order is right, an ascending one walks least. Tables
begin with the longest walk, so that a GPU's last tiles are short ones.

Legend: A blocks, K slots of a block, T context rows of all documents laid end to end, R query
heads of a kv head, n tiles, s runs of rows.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

QUERY_FIELDS = ("row", "row_stop", "offset", "key", "full_key", "full_key_stop", "key_stop")
"""Columns of `query_tiles`: the rows; the document's first row in the context; the walk over key
positions in the document: masked up to `full_key`, unmasked, masked again from `full_key_stop`."""
KEY_FIELDS = (
    "key", "key_stop", "offset", "row", "full_row", "full_row_stop", "walk_stop", "row_stop",
)  # fmt: skip
"""Columns of `key_tiles`: key positions in the document; the document's first row in the context;
the walk over rows, masked and unmasked as above; the end of the document's rows."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How queries are packed into rows, and how far they see."""

    num_slots: int
    """K."""
    share: int
    """R, query heads of a kv head; a block has K * R rows."""
    window: int | None
    """W: slot i of the block at anchor a sees context position t only if a + i - t < W."""


@dataclass(kw_only=True, eq=False)
class BlockLayout:
    """Where the blocks of a packed row stand; one object for all layers, as it keeps its tiles.

    Blocks are grouped by document in the order of the documents. Positions restart at 0 in each
    document.
    """

    context_offsets: Sequence[int]
    """`[documents + 1]` bounds of each document in the context rows: from 0 to T."""
    block_offsets: Sequence[int]
    """`[documents + 1]` bounds of each document in the blocks: from 0 to A."""
    anchor_positions: Tensor
    """`[A]` int64, position of each block's anchor in its document; at 0 or before, the block sees
    itself only."""
    widths: Tensor | None = None
    """`[A]` int64, slots that exist in each block; None means all K."""
    _kept: dict[Hashable, Tensor] = field(default_factory=dict, init=False, repr=False)

    def tiles(self, build: Callable[..., Tensor], packing: Packing, **sizes: int) -> Tensor:
        """Give the table of `query_tiles` or `key_tiles`, built by the first call alone."""
        key = (build, packing, *sorted(sizes.items()))
        if key not in self._kept:
            self._kept[key] = build(self, packing, **sizes)
        return self._kept[key]

    def check(self, *, num_blocks: int, num_context: int, device: torch.device) -> None:
        """Refuse a layout that is not one of these tensors.

        Raises:
            ValueError: Offsets do not end where the tensors do, or do not fit each other, or the
                anchors are on another device.
        """
        found = (self.context_offsets[-1], self.block_offsets[-1], len(self.anchor_positions))
        if found != (num_context, num_blocks, num_blocks):
            raise ValueError(
                f"layout (={found[0]} context rows, {found[1]} blocks, {found[2]} anchors) must "
                f"have the {num_context} context rows and {num_blocks} blocks of the tensors. "
                "Build it from the same batch."
            )
        if len(self.context_offsets) != len(self.block_offsets):
            raise ValueError(
                f"layout.block_offsets (={len(self.block_offsets)} bounds) must have as many bounds"
                f" as layout.context_offsets (={len(self.context_offsets)}). Give a document "
                "without blocks two equal bounds."
            )
        if self.anchor_positions.device != device:
            raise ValueError(
                f"layout.anchor_positions (on {self.anchor_positions.device}) must be on {device}, "
                "where queries and keys are. Move the batch as a whole."
            )


def query_tiles(
    layout: BlockLayout, packing: Packing, *, rows: int, keys: int, edge_keys: int
) -> Tensor:
    """Cut the rows of each document into tiles and find the keys that each walks.

    Args:
        layout: Where the blocks stand.
        packing: What a row is.
        rows: Rows of a tile.
        keys: Keys of a step that needs no mask.
        edge_keys: Keys of a masked step.

    Returns:
        `[n, len(QUERY_FIELDS)]` int32.
    """
    runs = _runs(layout, packing, rows=rows)
    key_s = torch.minimum(runs.first_s, runs.stop_s)
    left_steps_s = num_steps(runs.last_first_s - key_s, edge_keys)
    full_key_s = key_s + left_steps_s * edge_keys
    full_steps_s = (runs.common_stop_s - full_key_s).clamp(min=0) // keys
    full_key_s = full_key_s.where(full_steps_s > 0, key_s)  # else one masked walk from the start
    full_stop_s = full_key_s + full_steps_s * keys
    table = (
        runs.row_s, runs.row_stop_s, runs.offset_s, key_s, full_key_s, full_stop_s, runs.stop_s,
    )  # fmt: skip
    return _longest_first(torch.stack(table, dim=1), runs.stop_s - key_s)


def key_tiles(layout: BlockLayout, packing: Packing, *, rows: int, keys: int) -> Tensor:
    """Cut the context of each document into tiles and find the rows that each walks.

    The walk is the hull of the steps that see the tile, which in ascending order all do.

    Args:
        layout: Where the blocks stand.
        packing: What a row is.
        rows: Rows of a step.
        keys: Keys of a tile.

    Returns:
        `[n, len(KEY_FIELDS)]` int32.
    """
    key_n, key_stop_n, offset_n, row_stop_n = _key_runs(layout, packing, keys=keys).unbind(1)
    runs = _runs(layout, packing, rows=rows)
    sees_ns = (
        (runs.offset_s == offset_n[:, None])
        & (runs.stop_s > key_n[:, None])
        & (runs.first_s < key_stop_n[:, None])
    )
    full_ns = (
        sees_ns & (runs.common_stop_s >= key_stop_n[:, None])
        & (runs.last_first_s <= key_n[:, None])
    )  # fmt: skip
    first_n, last_n = _first(sees_ns), _last(sees_ns)
    full_n = torch.minimum(_first(full_ns), last_n)
    is_behind_ns = torch.arange(full_ns.shape[1], device=full_ns.device) >= full_n[:, None]
    full_stop_n = torch.minimum(_first(~full_ns & is_behind_ns), last_n)
    # Runs of a document follow each other; a tile that nobody sees begins at no run.
    row_n = functional.pad(runs.row_s, (0, 1))[first_n]
    walk_n3 = row_n[:, None] + rows * (
        torch.stack([full_n, full_stop_n, last_n], dim=1) - first_n[:, None]
    )
    head = torch.stack([key_n, key_stop_n, offset_n, row_n], dim=1)
    table = torch.cat([head, walk_n3, row_stop_n[:, None]], dim=1)
    return _longest_first(table, last_n - first_n)


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """Runs of rows of one document, and what their rows see of its context; `[s]` int64 each."""

    row_s: Tensor
    row_stop_s: Tensor
    offset_s: Tensor
    """First row of the document in the context."""
    first_s: Tensor
    """First key that any row sees."""
    last_first_s: Tensor
    """The largest first key of a row."""
    common_stop_s: Tensor
    """End of the keys that all rows see."""
    stop_s: Tensor
    """End of the keys that any row sees."""


def _runs(layout: BlockLayout, packing: Packing, *, rows: int) -> _Runs:
    anchors, per_block = layout.anchor_positions, packing.num_slots * packing.share
    runs = []
    for document, blocks in enumerate(pairwise(layout.block_offsets)):
        begin, stop = (bound * per_block for bound in blocks)
        runs += [(row, min(row + rows, stop), document) for row in range(begin, stop, rows)]
    runs_s3 = torch.tensor(runs, dtype=torch.int64, device=anchors.device).view(len(runs), 3)
    row_s, row_stop_s, document_s = runs_s3.unbind(1)
    offsets = torch.tensor(layout.context_offsets, dtype=torch.int64, device=anchors.device)
    length_s1 = offsets.diff()[document_s][:, None]

    last_s1 = (row_stop_s[:, None] - 1) // packing.share
    tokens = torch.arange(rows // packing.share + 2, device=anchors.device)
    tokens_sm = (row_s[:, None] // packing.share + tokens).minimum(last_s1)  # the last one repeats
    anchors_sm = anchors[tokens_sm // packing.num_slots]
    ends_sm = anchors_sm.clamp(min=0).minimum(length_s1)
    first_sm = torch.zeros_like(anchors_sm)
    if packing.window is not None:
        first_sm = (anchors_sm + tokens_sm % packing.num_slots - packing.window + 1).clamp(min=0)
    return _Runs(
        row_s=row_s,
        row_stop_s=row_stop_s,
        offset_s=offsets[document_s],
        first_s=first_sm.amin(1),
        last_first_s=first_sm.amax(1),
        common_stop_s=ends_sm.amin(1),
        stop_s=ends_sm.amax(1),
    )


def _key_runs(layout: BlockLayout, packing: Packing, *, keys: int) -> Tensor:
    """Give `[n, 4]` int64: runs of keys, their document's first context row and last packed row."""
    runs, per_block = [], packing.num_slots * packing.share
    stops = layout.block_offsets[1:]
    for (offset, end), stop in zip(pairwise(layout.context_offsets), stops, strict=True):
        for key in range(0, end - offset, keys):
            runs.append((key, min(key + keys, end - offset), offset, stop * per_block))
    return torch.tensor(runs, dtype=torch.int64, device=layout.anchor_positions.device).view(
        len(runs), 4
    )


def num_steps(length: Tensor, size: int) -> Tensor:
    """Give the steps of a walk over `length` keys or rows."""
    return (length.clamp(min=0) + size - 1) // size


def _first(is_ns: Tensor) -> Tensor:
    """Give `[n]`, the first place that is True, s where none is."""
    places = torch.arange(is_ns.shape[1] + 1, device=is_ns.device)
    return places.where(functional.pad(is_ns, (0, 1), value=True), len(places)).amin(1)


def _last(is_ns: Tensor) -> Tensor:
    """Give `[n]`, one behind the last place that is True, s where none is."""
    num_places = is_ns.shape[1]
    last_n = num_places - _first(is_ns.flip(1))
    return last_n.where(last_n > 0, num_places)


def _longest_first(table: Tensor, length: Tensor) -> Tensor:
    order = length.argsort(descending=True, stable=True)
    return table[order].to(torch.int32).contiguous()
