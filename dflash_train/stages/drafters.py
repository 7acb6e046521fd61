"""Drafters that come from outside: any dialect, with what only their target can tell."""

import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dflash_train.config import TargetConfig, require
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.target import load_target
from dflash_train.features.target_loading import load_target_config
from dflash_train.features.target_weights import locate_target
from dflash_train.release.formats import (
    Format,
    Imported,
    carries_tables,
    detect,
    read_drafter,
)


def import_drafter(
    folder: Path, target: TargetConfig, *, dtype: torch.dtype | None = torch.float32
) -> Imported:
    """Read a drafter folder of any dialect, and say on stderr what its reader noticed.

    Args:
        folder: Local.
        target: What the drafter was trained for; asked only where the dialect does not tell.
        dtype: Number format to load in; None keeps the stored one.

    Raises:
        ValueError: There is no such folder, or it cannot be read as a drafter.
    """
    require(
        folder.is_dir(),
        f"checkpoint (={folder}) is not a folder. Give checkpoint=DIR with config.json in it, or "
        "train a drafter with `dflash-train run`.",
    )
    asks_target = detect(folder) is Format.speculators
    imported = read_drafter(
        folder,
        target=target_facts(target) if asks_target else None,
        head=target_head(target) if asks_target and carries_tables(folder) else None,
        dtype=dtype,
    )
    for note in imported.notes:
        tqdm.write(f"checkpoint: {note}", file=sys.stderr)
    return imported


def target_facts(target: TargetConfig) -> dict[str, Any]:
    """Give what dialects tell about a target, from its `config.json`: no weights are loaded."""
    location = locate_target(target)
    config = load_target_config(location)
    return {
        "name": location.path,
        "architectures": list(config.architectures or []),
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }


def target_head(target: TargetConfig) -> FrozenHead:
    """Load the target for its embedding table and LM head."""
    return load_target(target, [0]).head
