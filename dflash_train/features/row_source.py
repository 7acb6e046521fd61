"""What training and evaluation ask of a split, wherever its features come from.

A `FeatureStore` reads them from the disk (`data.features=stored`); `OnlineRows` has the target
compute them (`online`). Order, lengths, ids and loss masks are the same, so packs and anchors are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dflash_train.features.store import FeatureRow, IndexLine


class RowSource(Protocol):
    """The rows of one split."""

    @property
    def folder(self) -> Path:
        """`features/<split>` of a run, for messages."""
        ...

    @property
    def lines(self) -> list[IndexLine]:
        """What is known of every row without reading it, in the order of the split."""
        ...

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, position: int) -> FeatureRow:
        """Give one row with its features, which must not be written to."""
        ...

    def read(self, positions: Sequence[int]) -> list[FeatureRow]:
        """Give several rows, in the order of their positions; the cheapest way where many go."""
        ...

    def read_tokens(self, position: int) -> tuple[Tensor, Tensor]:
        """Give a row's `input_ids` `[N]` int64 and `loss_mask` `[N]` bool alone."""
        ...
