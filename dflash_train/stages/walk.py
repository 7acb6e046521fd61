"""Walk the stages of a recipe and run those whose result is missing or out of date.

A stage is complete when its folder's manifest is there and its key still matches: the parts of
the recipe that it reads and the hashes of what it reads. Then it is skipped; otherwise it resumes
unfinished work of the same key, or starts clean.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dflash_train.config import RecipeConfig, to_plain
from dflash_train.records.manifest import FILE_NAME, Manifest, content_hash, write_bytes
from dflash_train.records.provenance import code_version, command_line, package_versions
from dflash_train.stages.table import Stage, finished, stage_named, stages_of
from dflash_train.stages.work import check_collect_engine
from dflash_train.stages.workshop import Workshop

KEY_NAME = "stage.key"
_WATCHING = {"training": ("profile_steps",), "launch": ("kernels",)}
"""By group: settings that change nothing of a stage's result, the device's rounding apart."""
_UNSET: dict[str, dict[str, Any]] = {
    "training": {"patience": None},
}
"""By group: settings without effect at this value; runs from before they existed stay complete."""


def run(config: RecipeConfig, *, force: bool = False) -> None:
    """Walk all stages of a recipe."""
    workshop = Workshop(config)
    _ = workshop.drafter_config  # a target that does not fit is found before any work
    check_collect_engine(workshop)
    if config.init is not None and config.checkpoint is None:
        workshop.initial_drafter(config.init)  # nor is a wrong start found after it
    for stage in stages_of(config):
        run_stage(workshop, stage.name, force=force)


def run_stage(workshop: Workshop, name: str, *, force: bool = False) -> bool:
    """Bring one stage up to date.

    Args:
        workshop: Recipe and loaded models.
        name: A name of the stage table.
        force: Do a finished stage again; an unfinished one goes on either way.

    Returns:
        False if there was nothing to do.

    Raises:
        ValueError: A stage before it has not run, or its input is unusable.
    """
    stage = stage_named(name)
    folder = workshop.config.run_dir / stage.folder
    manifest = _prepare(stage, workshop)
    if _is_current(manifest, folder) and not force:
        tqdm.write(f"{name}: complete and unchanged, nothing to do", file=sys.stderr)
        return False
    if stage.is_distributed:  # every process has decided before the first one changes the folder
        workshop.accelerator.wait_for_everyone()
    if not stage.is_distributed or workshop.accelerator.is_main_process:
        tqdm.write(f"{name}: running", file=sys.stderr)
        keeps_files = stage.is_repairable and not force
        was_done = Manifest.read(folder) is not None
        _claim(
            stage,
            workshop.config.run_dir,
            manifest.key,
            afresh=was_done and not keeps_files,
        )
    if stage.is_distributed:
        workshop.accelerator.wait_for_everyone()
    stage.execute(workshop, manifest)
    return True


def is_complete(workshop: Workshop, name: str) -> bool:
    """Tell whether a stage has nothing to do; it has where one before it has not run.

    Raises:
        ValueError: An input that no stage wrote is not there.
    """
    stage, config = stage_named(name), workshop.config
    before = [each for each in stages_of(config) if each.name in stage.upstream]
    if any(Manifest.read(config.run_dir / each.folder) is None for each in before):
        return False
    return _is_current(_prepare(stage, workshop), config.run_dir / stage.folder)


def _is_current(wanted: Manifest, folder: Path) -> bool:
    done = Manifest.read(folder)
    return done is not None and done.key == wanted.key and done.has_outputs(folder)


def _prepare(stage: Stage, workshop: Workshop) -> Manifest:
    """Give the manifest of a stage before its work: settings, inputs, target, provenance."""
    config = workshop.config
    present = {each.name for each in stages_of(config)}
    upstream = {name: finished(config, name) for name in stage.upstream if name in present}
    inputs = {name: manifest.hash for name, manifest in upstream.items()}
    return Manifest(
        stage=stage.name,
        recipe_hash=recipe_hash(config, stage),
        inputs=inputs | stage.more_inputs(workshop),
        target=None if stage.target_from is None else upstream[stage.target_from].target,
        command=command_line(),
        code=dict(code_version()),
        versions=package_versions(),
    )


def recipe_hash(config: RecipeConfig, stage: Stage) -> str:
    """Give the hash of the settings that a stage reads."""
    plain = to_plain(config)
    return content_hash({key: _setting(plain, key) for key in stage.settings})


def _setting(plain: dict[str, Any], key: str) -> Any:
    value: Any = plain
    for part in key.split("."):
        value = value[part]
    watching = _WATCHING.get(key, ())
    if watching:
        value = {name: value[name] for name in value if name not in watching}
    unset = _UNSET.get(key)
    if unset:
        value = {k: each for k, each in value.items() if k not in unset or each != unset[k]}
    return value


def _claim(stage: Stage, run_dir: Path, key: str, *, afresh: bool) -> None:
    """Keep unfinished work of the same key, remove everything else this stage owns."""
    folder = run_dir / stage.folder
    for left_by_a_kill in [*run_dir.glob(".partial-*"), *folder.rglob(".partial-*")]:
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    (folder / FILE_NAME).unlink(missing_ok=True)  # from here on the stage is not complete
    marker = folder / KEY_NAME
    if afresh or not marker.exists() or marker.read_text() != key:
        for owned in (folder, *(run_dir / name for name in stage.leavings)):
            if owned.is_dir():
                shutil.rmtree(owned)
            else:
                owned.unlink(missing_ok=True)
    write_bytes(marker, key.encode())
