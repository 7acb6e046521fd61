"""Rows of earlier runs: some are trained on again, the newest ones show what others would lose.

    dflash-train train recipe=NAME init=DIR 'tune.replay_from=[runs/spring,runs/summer]'

Their features are the target's, so they mean the same here only if target, revision, tokenizer,
chat template and taps are equal; another one is refused. What this run trains on, validates with
or tests on is taken out by the ids of the calls, so that logs that overlap leak nothing.
"""

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dflash_train.config import FeaturesFrom, RecipeConfig, require
from dflash_train.features.mixed_rows import ChosenRows, Mixture, Seen, mix_rows, unseen_places
from dflash_train.features.row_source import RowSource
from dflash_train.features.store import WITHOUT_FEATURES, FeatureStore
from dflash_train.features.target_text import load_target_text
from dflash_train.records.manifest import Manifest
from dflash_train.stages.workshop import Workshop

_FEATURES = "features"
_TRAIN, _VALIDATION, _TEST = "train", "validation", "test"


def check_earlier_runs(workshop: Workshop) -> None:
    """Refuse earlier runs that do not fit, before hours of other stages lead to them.

    Raises:
        ValueError: A run has no features, or those of another target.
    """
    config = workshop.config
    if config.tune.replay_from:
        own = load_target_text(config.target, workshop.drafter_config.target_layer_ids).describe()
        for place in range(_num(config)):
            _check_features(config, _folder(config, place), own)


def earlier_inputs(workshop: Workshop) -> dict[str, str]:
    """Hash what training reads of earlier runs; nothing without `tune.replay_from`.

    Raises:
        ValueError: A run has no features, or those of another target.
    """
    config = workshop.config
    if not config.tune.replay_from or config.tune.replay_share == 0:
        return {}
    found = {f"replayed {place}": _hash(config, place, _TRAIN) for place in range(_num(config))}
    return found | {"replay share": str(config.tune.replay_share)}


def earlier_window_inputs(workshop: Workshop) -> dict[str, str]:
    """Hash the newest windows of earlier runs.

    Raises:
        ValueError: A run has no features, or those of another target.
    """
    config = workshop.config
    return {f"earlier {place}": _hash(config, place, _TEST) for place in range(_num(config))}


def earlier_validation_inputs(workshop: Workshop) -> dict[str, str]:
    """Hash the validation windows of earlier runs.

    Raises:
        ValueError: A run has no features, or those of another target.
    """
    config = workshop.config
    return {f"earlier {place}": _hash(config, place, _VALIDATION) for place in range(_num(config))}


def with_replayed_rows(workshop: Workshop, own: RowSource, *, verify: bool) -> RowSource:
    """Give the training split with rows of earlier runs, as far as the recipe names some.

    Args:
        workshop: The run.
        own: Its training split.
        verify: Compare checksums of the earlier stores, and say what was mixed.

    Raises:
        ValueError: An earlier run does not fit, or its files are damaged.
    """
    config = workshop.config
    if not config.tune.replay_from or config.tune.replay_share == 0:
        return own
    mixture = mix(config, own, verify=verify)
    if verify:
        tqdm.write(f"train: {described(mixture)}", file=sys.stderr)
    return mixture.rows


def mix(config: RecipeConfig, own: RowSource, *, verify: bool) -> Mixture:
    """Draw the rows of earlier runs that a run trains on.

    Raises:
        ValueError: An earlier run does not fit, or its files are damaged.
    """
    older = [_open(config, place, _TRAIN, verify=verify) for place in range(_num(config))]
    held_out = [_own(config, split) for split in (_VALIDATION, _TEST)]
    return mix_rows(
        own,
        older,
        share=config.tune.replay_share,
        seen=Seen.of(rows=[own], conversations=held_out),
        seed=config.seed,
    )


def described(mixture: Mixture) -> str:
    """Say in a sentence what is trained on."""
    text = (
        f"{mixture.num_own} rows of this run and {mixture.num_replayed} of earlier ones, which "
        f"hold {mixture.share:.0%} of the answer tokens"
    )
    left_out = mixture.num_left_out
    return f"{text}; {left_out} older rows left out, known here" if left_out else text


def earlier_window(config: RecipeConfig, *, verify: bool) -> RowSource | None:
    """Give the newest rows of earlier runs, which nothing was trained on; None if there is none.

    Raises:
        ValueError: An earlier run does not fit, or its files are damaged.
    """
    return _held_out(config, _TEST, verify=verify)


def earlier_validation(config: RecipeConfig, *, verify: bool) -> RowSource | None:
    """Give the validation rows of earlier runs that are not this run's; None if there is none.

    Raises:
        ValueError: An earlier run does not fit, or its files are damaged.
    """
    return _held_out(config, _VALIDATION, verify=verify)


def _held_out(config: RecipeConfig, split: str, *, verify: bool) -> RowSource | None:
    if not config.tune.replay_from:
        return None
    older = [_open(config, place, split, verify=verify) for place in range(_num(config))]
    own = [_own(config, split) for split in (_TRAIN, _VALIDATION, _TEST)]
    return ChosenRows(older[0].folder, unseen_places(older, Seen.of(rows=own, conversations=own)))


def _num(config: RecipeConfig) -> int:
    return len(config.tune.replay_from)


def _open(config: RecipeConfig, place: int, split: str, *, verify: bool) -> FeatureStore:
    return FeatureStore.open(_folder(config, place) / split, verify=verify)


def _own(config: RecipeConfig, split: str) -> FeatureStore:
    return FeatureStore.open(config.run_dir / _FEATURES / split, verify=False, needs_features=False)


def _hash(config: RecipeConfig, place: int, split: str) -> str:
    folder = _folder(config, place)
    own = Manifest.read(config.run_dir / _FEATURES)
    assert own is not None, "stages before have run"
    _check_features(config, folder, own.target or {})
    manifest = Manifest.read(folder / split)
    assert manifest is not None, "a complete store has complete splits"
    return manifest.hash


def _folder(config: RecipeConfig, place: int) -> Path:
    run_dir = Path(config.tune.replay_from[place])
    require(
        run_dir.resolve() != config.run_dir.resolve(),
        f"tune.replay_from (={run_dir}) is the folder of this run. Leave it out, or give the run "
        "another name.",
    )
    return run_dir / _FEATURES


def _check_features(config: RecipeConfig, folder: Path, own: dict[str, Any]) -> None:
    """Refuse a folder without features, or with those of another target.

    Args:
        config: The recipe of this run.
        folder: `features` of the earlier one.
        own: The `target` block of this run.
    """
    field = f"tune.replay_from (={folder.parent})"
    require(
        config.data.features is FeaturesFrom.stored,
        f"{field} is replayed from stored features, and data.features (=online) keeps none. Set "
        "data.features to stored, or leave tune.replay_from empty.",
    )
    manifest, rows = Manifest.read(folder), Manifest.read(folder / _TRAIN)
    require(
        manifest is not None and rows is not None,
        f"{field} holds no complete features. Give the folder of a run that went through "
        "`collect`.",
    )
    assert manifest is not None
    assert rows is not None
    require(
        not WITHOUT_FEATURES.items() <= rows.details.items(),
        f"{field} was collected with data.features=online, which keeps no features to replay. Run "
        "its `collect` with data.features=stored, or leave it out.",
    )
    _check_teacher(config, rows, field)
    others = _differences(manifest.target or {}, own)
    require(
        not others,
        f"{field} holds features of another target: {'; '.join(others)}. Leave it out, or collect "
        "its conversations again with this target.",
    )


def _check_teacher(config: RecipeConfig, rows: Manifest, field: str) -> None:
    """Refuse rows without what this run's losses compare with, which training would find late."""
    own, found = config.data.teacher_top_k, rows.details.get("teacher_top_k", 0)
    is_used = config.loss.needs_teacher or (own > 0 and config.drafter.has_confidence_head)
    require(
        not is_used or config.tune.replay_share == 0 or found == own,
        f"{field} keeps {found} tokens of each distribution of the target, and this run's losses "
        f"need data.teacher_top_k (={own}). Run its `collect` with that, or leave it out.",
    )


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    names = sorted(found.keys() | wanted.keys())
    return [
        f"{name} is {found.get(name)} there and {wanted.get(name)} here"
        for name in names
        if found.get(name) != wanted.get(name)
    ]
