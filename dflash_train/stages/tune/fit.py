"""Whether the drafters of a tuning fit its target and each other, asked before anything runs.

The start's weights must mean the same here, or training begins from noise. The incumbent must read
the same features, or it is judged by what it was not trained on and loses to anybody.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_train.config import RecipeConfig, require
from dflash_train.drafter.checkpoint import drafter_hash
from dflash_train.drafter.config import DrafterConfig
from dflash_train.stages.drafters import import_drafter
from dflash_train.stages.workshop import Workshop
from dflash_train.training.initial_weights import Contradiction, contradictions

_SHARED = ("hidden_size", "vocab_size", "num_target_layers", "target_layer_ids")
"""Fields that two drafters replayed on the same features cannot fill differently."""


@dataclass(frozen=True, kw_only=True)
class KnownDrafter:
    """A drafter on disk that was read."""

    named: str
    """What messages call it."""
    folder: Path
    hash: str
    shape: DrafterConfig

    @classmethod
    def read(cls, folder: Path, config: RecipeConfig, *, named: str) -> "KnownDrafter":
        """Read a drafter of any dialect; its tensors and its golden forward are checked.

        Args:
            folder: Local.
            config: Names the target.
            named: What messages call it: the field, and its value.

        Raises:
            ValueError: It cannot be read as a drafter.
        """
        try:
            shape = import_drafter(folder, config.target).drafter.config
        except ValueError as error:
            raise ValueError(f"{named} is no drafter that can be tuned: {error}") from error
        return cls(named=named, folder=folder, hash=drafter_hash(folder), shape=shape)


def settings_of(start: KnownDrafter, config: RecipeConfig) -> dict[str, Any]:
    """Give the settings of a recipe's drafter that the start has otherwise, with its values.

    Raises:
        ValueError: The start contradicts the target.
    """
    listed = contradictions(start.shape, Workshop(config).drafter_config)
    others = [each for each in listed if not each.is_setting]
    require(
        not others,
        f"{start.named} contradicts the recipe: {_differences(others)}. Give a drafter of this "
        f"target, or set target.name_or_path (={config.target.name_or_path}) to its own.",
    )
    return {each.name: each.found for each in listed}


def check_rival(incumbent: KnownDrafter, start: KnownDrafter) -> None:
    """Refuse an incumbent that cannot be replayed on the features of the start.

    Raises:
        ValueError: It is of another target, or reads other layers of it.
    """
    listed = contradictions(incumbent.shape, start.shape)
    others = [each for each in listed if each.name in _SHARED]
    require(
        not others,
        f"{incumbent.named} serves and cannot be compared with what {start.named} becomes: "
        f"{_differences(others)}. Start from a drafter that agrees with it in that, or give "
        "another tune.registry.",
    )


def _differences(listed: list[Contradiction]) -> str:
    return "; ".join(f"{each.name} is {each.found} there and {each.wanted} here" for each in listed)
