"""Which dialect a drafter folder speaks, told from its file names and the keys of `config.json`."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import orjson

from dflash_train.config import require
from dflash_train.drafter.checkpoint import CONFIG_NAME, WEIGHTS_NAME, weight_files
from dflash_train.drafter.metadata import CheckpointMetadata
from dflash_train.drafter.model import Drafter

SPECFORGE_STATE_NAME = "training_state.pt"
MASK_EMBEDDING_NAME = "mask_embedding.pt"
_PICKLES = (".pt", ".bin", ".pth", ".pkl", ".ckpt")


class Format(Enum):
    """A dialect of drafter folders."""

    zlab = "zlab"
    """z-lab's layout as we write it: what `dflash` 0.1.0, vLLM, SGLang and llama.cpp read."""
    speculators = "speculators"
    """The layout of the package `speculators`; vLLM reads it too."""
    specforge_export = "specforge_export"
    """`specforge export`, and z-lab's first releases: z-lab's layout with keys left out."""
    specforge_state = "specforge_state"
    """A training state of SpecForge: a pickle, which is refused."""


@dataclass(kw_only=True)
class Imported:
    """A drafter that came from a folder, and what its reader noticed."""

    drafter: Drafter
    metadata: CheckpointMetadata | None
    """Ours, or what the dialect says about the target; None where there is neither."""
    format: Format
    notes: list[str] = field(default_factory=list)
    """What was filled in, dropped, or is read differently elsewhere; sentences."""


def detect(folder: Path) -> Format:
    """Tell a folder's dialect; nothing is unpickled.

    Raises:
        ValueError: There is no `config.json`, or it is no DFlash drafter's.
    """
    if _holds_training_state(folder):
        return Format.specforge_state
    content = read_content(folder)
    if "speculators_model_type" in content:
        return Format.speculators
    nested = content.get("dflash_config")
    require(
        isinstance(nested, dict),
        f"checkpoint (={folder}): {CONFIG_NAME} has neither dflash_config nor "
        f"speculators_model_type, so it is no DFlash drafter (architectures "
        f"{content.get('architectures')}). Give a folder in the z-lab or speculators layout.",
    )
    assert nested is not None
    is_complete = "block_size" in nested and "projector_type" not in nested
    return Format.zlab if is_complete else Format.specforge_export


def read_content(folder: Path) -> dict[str, Any]:
    """Read `config.json` as it stands.

    Raises:
        ValueError: It is missing or no JSON object.
    """
    path = folder / CONFIG_NAME
    require(
        path.is_file(),
        f"checkpoint (={folder}) holds no {CONFIG_NAME}. Give a drafter folder, such as the "
        "checkpoint/best that training wrote.",
    )
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ValueError(
            f"checkpoint (={folder}): {CONFIG_NAME} is no JSON: {error}. Fetch it again."
        ) from error
    require(
        isinstance(content, dict),
        f"checkpoint (={folder}): {CONFIG_NAME} must hold a JSON object. Fetch it again.",
    )
    return content


def refuse_pickles(folder: Path) -> None:
    """Refuse what would have to be unpickled: a pickle can run any code when it is read.

    Raises:
        ValueError: The folder is a training state of SpecForge, its weights are a pickle, or it
            brings an embedding of its own for masked slots; the message names the way out.
    """
    require(
        not _holds_training_state(folder),
        f"checkpoint (={folder}) is a training state of SpecForge, a pickle, and those are not "
        "read. Run `python -m specforge.export.to_hf --checkpoint DIR --draft-config FILE "
        "--output-dir OUT` where SpecForge is installed, and give OUT.",
    )
    require(
        not (folder / MASK_EMBEDDING_NAME).exists(),
        f"checkpoint (={folder}) brings {MASK_EMBEDDING_NAME}, a row of its own for masked slots, "
        "which this drafter has no place for: it takes the target's row. Remove the file if it "
        "equals that row; a drafter trained with another one cannot be read.",
    )
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    require(
        bool(weight_files(folder)) or not pickles,
        f"checkpoint (={folder}) has {', '.join(pickles)} but no {WEIGHTS_NAME}, and pickles are "
        "not read. Load it where you trust it and save it with `safe_serialization`.",
    )


def _holds_training_state(folder: Path) -> bool:
    return folder.name == SPECFORGE_STATE_NAME or (folder / SPECFORGE_STATE_NAME).exists()
