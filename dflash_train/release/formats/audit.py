"""Compare a drafter that was read back with the one that was written: every name, shape and bit.

SGLang passes over tensors it does not know and Transformers over those that are missing, so a file
must be right before it leaves.
"""

from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from dflash_train.drafter.checkpoint import read_tensors
from dflash_train.drafter.config import SLIDING, DrafterConfig
from dflash_train.drafter.model import Drafter


def audit(found: Drafter, wanted: Drafter, folder: Path, *, stored: dict[str, Tensor]) -> None:
    """Check what was written.

    Args:
        found: Read from the folder.
        wanted: What was to be written.
        folder: Where it was written.
        stored: What the file must hold, by name.

    Raises:
        RuntimeError: A name, shape, number format, bit or field differs; the message names it.
    """
    wrong = [
        *_field_differences(plain_form(found.config), plain_form(wanted.config)),
        *tensor_differences(read_tensors(folder), stored),
        *tensor_differences(found.state_dict(), wanted.state_dict()),
    ]
    if wrong:
        raise RuntimeError(
            f"{folder} was written and reads back differently: {', '.join(wrong[:5])}"
            f"{' ...' if len(wrong) > 5 else ''}. This is an error in the conversion, please "
            "report it."
        )


def plain_form(config: DrafterConfig) -> DrafterConfig:
    """Give the shortest description of the same drafter: what is said twice is said once."""
    types = config.layer_types if SLIDING in (config.layer_types or []) else None
    short = replace(config, layer_types=types, is_causal=None)
    same = short.layer_visibility() == config.layer_visibility()
    return short if same else replace(short, is_causal=config.is_causal)


def tensor_differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Name the tensors that are missing, unknown, or not the same bit by bit."""
    return [
        name
        for name in sorted(found.keys() | wanted.keys())
        if name not in found or name not in wanted or not _same(found[name], wanted[name])
    ]


def _same(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = [each.detach().cpu().contiguous().view(torch.uint8) for each in (one, other)]
    return torch.equal(bits[0], bits[1])  # by bits: a NaN equals itself, and -0 is not 0


def _field_differences(found: DrafterConfig, wanted: DrafterConfig) -> list[str]:
    names = [each.name for each in fields(DrafterConfig)]
    return [name for name in names if getattr(found, name) != getattr(wanted, name)]
