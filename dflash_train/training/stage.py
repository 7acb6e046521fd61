"""The stage `train`: opens the features, turns minutes into steps, and runs the trainer.

dflash-train train recipe=NAME
accelerate launch train.py recipe=NAME
"""

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from tqdm import tqdm

from dflash_train.config import RecipeConfig
from dflash_train.drafter.metadata import CheckpointMetadata
from dflash_train.drafter.model import Drafter
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.row_source import RowSource
from dflash_train.features.store import FeatureStore
from dflash_train.records.manifest import FILE_NAME, Manifest
from dflash_train.records.provenance import machine
from dflash_train.training.calibration import (
    Calibration,
    calibrate,
    read_calibration,
    write_calibration,
)
from dflash_train.training.keeping import STATE_FOLDER
from dflash_train.training.trainer import Trainer

_PROBE_SCHEDULE = 1_000
"""Steps of the schedule that the timed steps follow; no schedule changes their time."""


def train(
    config: RecipeConfig,
    *,
    accelerator: Accelerator,
    head: FrozenHead,
    drafter: Drafter,
    manifest: Manifest,
    open_rows: Callable[[str], RowSource] | None = None,
    stop_token_ids: Sequence[int] = (),
) -> Manifest:
    """Run the stage `train`: `features/{train,validation}` in, `checkpoint/{best,last}` out.

    Args:
        config: The recipe.
        accelerator: From `build_accelerator`.
        head: The target's embedding and LM head.
        drafter: Where training starts; the same weights on every rank.
        manifest: Stage, recipe hash and inputs; its outputs and details are filled in here.
        open_rows: Opens the rows of a split; None opens those of the feature store.
        stop_token_ids: Ids that end an answer; a reduced draft vocabulary holds them all.

    Returns:
        The manifest as written to `checkpoint/manifest.json`.

    Raises:
        ValueError: Features are missing, damaged or do not fit.
        KeyboardInterrupt: SIGINT or SIGTERM came; the train state is saved.
    """
    run_dir = config.run_dir
    set_seed(config.seed)
    open_rows = open_rows or functools.partial(_open_split, run_dir, accelerator)
    train_rows, validation_rows = open_rows("train"), open_rows("validation")

    def build(settings: RecipeConfig, start: Drafter) -> Trainer:
        return Trainer(
            settings,
            accelerator=accelerator,
            drafter=start,
            head=head,
            train=train_rows,
            validation=validation_rows,
            run_dir=run_dir,
            key=manifest.key,
            stop_token_ids=stop_token_ids,
            description=describe(config, manifest),
        )

    try:
        if config.training.minutes is not None:
            calibration = _calibration(config, build, drafter, accelerator, key=manifest.key)
            manifest.details["calibration"] = asdict(calibration)
            config = _with_steps(config, calibration.max_steps)
        trainer = build(config, drafter)
        if accelerator.is_main_process:  # from here on the stage is not complete
            (trainer.checkpoint_dir / FILE_NAME).unlink(missing_ok=True)
        trainer.fit()
        return trainer.finish(manifest)
    finally:
        accelerator.free_memory()


def describe(config: RecipeConfig, manifest: Manifest) -> CheckpointMetadata:
    """Give what is known about the checkpoints of a run before its first step."""
    sampling = config.data.serving_sampling
    has_switch = sampling.enable_thinking is not None or sampling.reasoning_effort is not None
    hardware = {name: machine()[name] for name in ("processor", "cores", "accelerator")}
    is_private = config.init is None or Path(config.init).exists()  # a path tells of a machine
    return CheckpointMetadata(
        target=manifest.target,
        thinking=sampling.thinks if has_switch else None,
        provenance={
            "recipe": config.name,
            "recipe_hash": manifest.recipe_hash,
            "inputs": dict(manifest.inputs),
            "code": manifest.code,
            "versions": manifest.versions,
            "hardware": hardware,
            "init": None if is_private else config.init,
        },
    )


def _calibration(
    config: RecipeConfig,
    build: Callable[[RecipeConfig, Drafter], Trainer],
    drafter: Drafter,
    accelerator: Accelerator,
    *,
    key: str,
) -> Calibration:
    """Read this run's calibration, or time a copy of its start and store the result."""
    folder, minutes = config.run_dir / STATE_FOLDER, config.training.minutes
    assert minutes is not None
    stored = read_calibration(folder, key=key)
    accelerator.wait_for_everyone()
    if stored is not None:
        return stored
    with torch.random.fork_rng():
        measured = _time(
            build(_with_steps(config, _PROBE_SCHEDULE), copy.deepcopy(drafter)), minutes
        )
    accelerator.free_memory()
    (agreed,) = broadcast_object_list([measured])
    if accelerator.is_main_process:
        write_calibration(folder, agreed, key=key)
        message = f"{minutes:g} minutes are {agreed.max_steps} steps"
        tqdm.write(f"train: {message} of {agreed.seconds_per_step:.2f} s", file=sys.stderr)
    return agreed


def _time(probe: Trainer, minutes: float) -> Calibration:
    stream = probe.source.stream(epoch=0, position=0)
    return calibrate(
        lambda: probe.train_step(probe.next_window(stream)),
        probe.validate,
        minutes=minutes,
        validate_every=probe.config.training.validate_every,
    )


def _with_steps(config: RecipeConfig, max_steps: int) -> RecipeConfig:
    training = replace(config.training, max_steps=max_steps, minutes=None)
    return replace(config, training=training)


def _open_split(run_dir: Path, accelerator: Accelerator, split: str) -> FeatureStore:
    return FeatureStore.open(run_dir / "features" / split, verify=accelerator.is_main_process)
