"""Splits as `collect` leaves them with `data.features=online`: token ids without features."""

from dataclasses import replace
from pathlib import Path

import torch

from dflash_train.features.store import (
    WITHOUT_FEATURES,
    FeatureRow,
    FeatureStore,
    write_index,
    write_shard,
    write_token_shard,
)
from dflash_train.records.manifest import FileEntry, Manifest


def write_tokens(folder: Path, rows: list[FeatureRow]) -> FeatureStore:
    """Write rows as `collect` does where features are online."""
    write_token_shard(folder / "tokens.safetensors", rows)
    lines = write_shard(folder / "scratch.safetensors", rows, dtype=torch.float32)
    (folder / "scratch.safetensors").unlink()
    write_index(folder, [replace(line, shard="tokens.safetensors") for line in lines])
    manifest = Manifest(stage="collect", recipe_hash="sha256:0", details=dict(WITHOUT_FEATURES))
    manifest.outputs = [FileEntry.of(path, folder) for path in sorted(folder.iterdir())]
    manifest.write(folder)
    return FeatureStore.open(folder, needs_features=False)
