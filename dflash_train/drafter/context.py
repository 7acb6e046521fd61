"""The context's keys and values: from the projections of all layers into the decoder's cache.

The context never changes from layer to layer, so the keys and values of all layers exist before the
first layer runs. They are normed and rotated for all of them at once, which is one launch on a GPU;
`context_kv` here is the definition, and `dflash_train.ops` has the choice. Legend: N layers, T
context rows, n new ones, G kv heads, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_train.drafter.block_attention import ContextKV
from dflash_train.drafter.fused import rms_norm

_ROOM = 64
"""Rows that a new buffer has free, at least; a quarter of its rows if that is more."""


@dataclass(kw_only=True)
class RawContext:
    """What all layers have projected from the context, before the norm of keys and RoPE."""

    keys: list[Tensor]
    """N times `[T, G, D]`."""
    values: list[Tensor]
    """N times `[T, G, D]`; they are finished."""
    weights: list[Tensor]
    """N times `[D]`, of the layers' key norms."""
    eps: float
    cos: Tensor
    """`[T, D]` of the rows' positions."""
    sin: Tensor
    """`[T, D]`."""

    @property
    def num_rows(self) -> int:
        """T."""
        return len(self.cos)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE in the neox layout.

    Args:
        x: `[..., heads, D]`.
        cos: `[..., D]` of the rows' positions.
        sin: `[..., D]`.
    """
    low, high = x.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return x * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)


def context_kv(raw: RawContext) -> list[ContextKV]:
    """Give each layer's normed and rotated keys, and its values, with their graph."""
    return [
        ContextKV(rotate(rms_norm(k, weight, eps=raw.eps), raw.cos, raw.sin), v)
        for k, v, weight in zip(raw.keys, raw.values, raw.weights, strict=True)
    ]


@torch.no_grad()
def write_context_kv(raw: RawContext, k_NnGD: Tensor, v_NnGD: Tensor) -> None:
    """Write the same into a cache, without a graph.

    Args:
        raw: The new rows.
        k_NnGD: Where the keys go, rows of a larger buffer.
        v_NnGD: Where the values go, likewise.
    """
    for layer, new in enumerate(context_kv(raw)):
        k_NnGD[layer], v_NnGD[layer] = new.k, new.v


class ContextCache:
    """The context keys and values of one request, all drafter layers; block rows never enter.

    The decoder owns it and only appends; nothing is ever removed, because only features of
    committed tokens are fed. Sliding layers keep all rows too, and see those of their window. The
    first rows, most often a whole prompt's, stay where they are; from the second call on rows lie
    in one buffer of all layers with room behind them, so that a few new rows cost a few rows, and
    a kernel can write them there.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.layers: list[ContextKV] = []
        """Views of the rows held; who sets them back to fewer rows takes back later ones."""
        self._buffer: Tensor | None = None  # [2, N, rows with room, G, D]: keys, then values

    @property
    def length(self) -> int:
        """Context rows held, which is also the position of the next anchor."""
        return self.layers[0].k.shape[0] if self.layers else 0

    def append(self, rows: list[ContextKV]) -> None:
        """Add new context rows, one entry per layer."""
        if not self.layers:
            self.layers = rows
            return
        k_NnGD, v_NnGD = self.extend(rows[0].k.shape[0])
        for layer, new in enumerate(rows):
            k_NnGD[layer], v_NnGD[layer] = new.k, new.v

    def extend(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Make room for new rows behind those held, which must be some.

        Returns:
            `[N, n, G, D]` views for the new keys and values, which the caller must fill.
        """
        start, end = self.length, self.length + num_rows
        buffer = self._buffer
        if buffer is None or not self._lies_in(buffer) or buffer.shape[2] < end:
            buffer = self._buffer = self._moved(end + max(_ROOM, end // 4))
        self.layers = [ContextKV(k[:end], v[:end]) for k, v in zip(*buffer, strict=True)]
        return buffer[0, :, start:end], buffer[1, :, start:end]

    def _lies_in(self, buffer: Tensor) -> bool:
        """Tell whether the rows held are the buffer's first: `layers` may be set from outside."""
        return all(
            held.data_ptr() == place.data_ptr()
            for layer, k, v in zip(self.layers, *buffer, strict=True)
            for held, place in ((layer.k, k), (layer.v, v))
        )

    def _moved(self, capacity: int) -> Tensor:
        """Copy the rows held to the start of a new buffer."""
        k = self.layers[0].k
        buffer = k.new_empty(2, len(self.layers), capacity, *k.shape[1:])
        for layer, held in enumerate(self.layers):
            buffer[0, layer, : self.length] = held.k
            buffer[1, layer, : self.length] = held.v
        return buffer
