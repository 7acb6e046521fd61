"""Fine-tuning: the weights of a finished drafter as the start of a new run.

    dflash-train train recipe=NAME init=DIR

Only the weights are taken: optimiser, schedule and steps are the new run's own. A drafter that was
trained for another mask token, other taps or another rotation has the same shapes and nearly the
worth of noise, so every field of its config that decides what the weights mean is compared with
the recipe, and a difference is refused by name.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from dflash_train.config import DrafterSettings, require
from dflash_train.drafter.config import FULL, DrafterConfig

_OWN_FIELDS = ("max_position_embeddings", "rms_norm_eps")
"""Fields that no recipe sets: the drafter keeps its own."""
_SETTINGS = {each.name for each in fields(DrafterSettings)}


@dataclass(frozen=True, kw_only=True)
class Contradiction:
    """A field that a drafter and a recipe fill differently."""

    name: str
    """Name of the field in `DrafterConfig`."""
    found: Any
    """The drafter's value."""
    wanted: Any
    """What the recipe and its target give."""

    @property
    def is_setting(self) -> bool:
        """Tell whether a recipe can set the field; else the target decides it."""
        return self.name in _SETTINGS


def contradictions(found: DrafterConfig, wanted: DrafterConfig) -> list[Contradiction]:
    """List what must agree before weights of the one config mean anything in the other.

    Args:
        found: The config of a drafter on disk.
        wanted: The config that a recipe asks for.
    """
    listed = []
    for each in fields(DrafterConfig):
        values = _comparable(found, each.name), _comparable(wanted, each.name)
        if each.name not in _OWN_FIELDS and not _is_same(*values):
            listed.append(Contradiction(name=each.name, found=values[0], wanted=values[1]))
    return listed


def check_start(found: DrafterConfig, wanted: DrafterConfig, *, init: str) -> None:
    """Refuse a drafter whose weights would mean something else in this run.

    Args:
        found: Its config.
        wanted: The config that the recipe asks for.
        init: How the recipe names the drafter, for the message.

    Raises:
        ValueError: Some fields differ; the message names them all.
    """
    listed = contradictions(found, wanted)
    values = "; ".join(
        f"{'drafter.' if each.is_setting else ''}{each.name} is {each.found} there and "
        f"{each.wanted} here"
        for each in listed
    )
    settings = [f"drafter.{each.name}" for each in listed if each.is_setting]
    remedy = (
        f"Set {', '.join(settings)} to its values, or start from another drafter."
        if len(settings) == len(listed)
        else "Give a drafter of this target: what a recipe cannot set, the target decides."
    )
    require(not listed, f"init (={init}) contradicts the recipe: {values}. {remedy}")


def _comparable(config: DrafterConfig, name: str) -> Any:
    """Give a field in the one form that equal drafters share."""
    value = getattr(config, name)
    if name == "layer_types":
        return value or [FULL] * config.num_hidden_layers
    if name == "rope_parameters":
        given = {key: each for key, each in value.items() if each is not None and key != "type"}
        return {"rope_type": value.get("type", "default")} | given
    return value


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)
