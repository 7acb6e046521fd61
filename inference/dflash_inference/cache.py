"""The target's keys and values of one request, in memory that is laid out once.

A request's capacity is known when it starts, so nothing grows or moves while it runs: new rows are
written behind the committed ones, and cropping only forgets how many there were. Sliding layers
keep all rows too; the mask hides those outside the window. Legend: G kv heads, D head dim, Q new
rows.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(kw_only=True)
class KeyValueCache:
    """Keys and values of the committed tokens but the anchor, layer by layer."""

    capacity: int
    """Most rows that are ever held at once."""
    length: int = 0
    """Rows that count: positions 0 .. length - 1."""
    _layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put new rows behind the committed ones; `commit` makes them count.

        Args:
            layer: Layers come in order, from 0; the first pass lays out their memory.
            k: `[1, G, Q, D]`.
            v: `[1, G, Q, Dv]`.

        Returns:
            Keys and values of committed and new rows, `[1, G, length + Q, D]` each, as views.
        """
        end = self.length + k.shape[2]
        assert end <= self.capacity, f"{end} rows do not fit in a cache of {self.capacity}"
        if layer == len(self._layers):
            self._layers.append((self._room_for(k), self._room_for(v)))
        keys, values = self._layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Give keys and values of the rows that count, `[1, G, length, D]` each, by layer."""
        end = self.length
        return [(keys[:, :, :end], values[:, :, :end]) for keys, values in self._layers]

    def commit(self, num_rows: int) -> None:
        """Let the first `num_rows` of the rows just written count; the others are forgotten."""
        self.length += num_rows

    @torch.inference_mode()
    def commit_path(self, rows: list[int]) -> None:
        """Let chosen rows of those just written count, in this order: a path through a tree.

        Args:
            rows: Ascending indices of the rows written last, from 0.
        """
        if rows == list(range(len(rows))):
            return self.commit(len(rows))
        source = torch.tensor(rows, dtype=torch.int64) + self.length
        for keys, values in self._layers:
            for held in (keys, values):
                held[:, :, self.length : self.length + len(rows)] = held[
                    :, :, source.to(held.device)
                ]
        self.length += len(rows)

    def _room_for(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(1, rows.shape[1], self.capacity, rows.shape[3])
