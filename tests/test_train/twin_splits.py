"""One split twice: with features in a store, and as token ids whose features the target reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dflash_train.features.online_rows import AnswerReader, OnlineRows, Reading
from dflash_train.features.store import FeatureStore

READING = Reading(dtype=torch.float32, num_taps=2, teacher_top_k=0, batch_size=8)
"""How the tiny target reads rows: its features unrounded, without a teacher."""


@dataclass(frozen=True, kw_only=True)
class TwinSplit:
    """The same rows with and without features; tests only read them."""

    stored: FeatureStore
    tokens: FeatureStore

    def online(self, reader: AnswerReader, **settings: Any) -> OnlineRows:
        """Give the rows as a target reads them; settings are those of `OnlineRows`."""
        return OnlineRows(self.tokens, reader, reading=READING, **settings)


def shard_tensors(folder: Path) -> set[str]:
    """Name the tensors of all shards below a folder."""
    names: set[str] = set()
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            names |= set(shard.keys())
    return names
