"""The stages of a run: what each reads, writes and costs to repeat; `run` walks them.

    dflash-train run recipe=smollm2

A stage is complete when its folder's manifest is there and its key still matches: the parts of
the recipe that it reads and the hashes of what it reads. Then it is skipped; otherwise it resumes
unfinished work of the same key, or starts clean. This is the one place where the data pipelines,
the trainer and the decoder meet.
"""

import functools
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dflash_train.config import DrafterInit, RecipeConfig, require, to_plain
from dflash_train.drafter.checkpoint import WEIGHTS_NAME, load_checkpoint
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.initialization import initialize_from_target
from dflash_train.drafter.model import Drafter
from dflash_train.features.store import FeatureStore
from dflash_train.features.target import Target, load_target
from dflash_train.features.target_loading import load_target_config
from dflash_train.features.target_text import WrittenTarget, load_target_text
from dflash_train.features.target_weights import locate_target
from dflash_train.records.conversation import Conversation
from dflash_train.records.manifest import (
    FILE_NAME,
    FileEntry,
    Manifest,
    content_hash,
    file_hash,
    write_bytes,
)
from dflash_train.records.provenance import code_version, command_line, package_versions
from dflash_train.release.doctor import examine
from dflash_train.release.finding import Finding
from dflash_train.release.inspection import Choice, View, find_record, prompt_view
from dflash_train.training.accelerator import Accelerator, build_accelerator
from dflash_train.training.stage import train

KEY_NAME = "stage.key"


class Workshop:
    """What the stages of one process share: the recipe, and the target once it is loaded."""

    def __init__(self, config: RecipeConfig) -> None:
        """Load nothing yet."""
        self.config = config

    @functools.cached_property
    def drafter_config(self) -> DrafterConfig:
        """The drafter's full shape: the recipe's settings completed by the target's."""
        target_config = load_target_config(locate_target(self.config.target))
        return DrafterConfig.for_target(self.config.drafter, target_config)

    @functools.cached_property
    def target(self) -> Target:
        """The loaded target."""
        return load_target(self.config.target, self.drafter_config.target_layer_ids)

    @functools.cached_property
    def accelerator(self) -> Accelerator:
        """The processes of this launch."""
        return build_accelerator(self.config.launch)

    def new_drafter(self) -> Drafter:
        """Build the drafter that training starts from: a function of the recipe's seed."""
        torch.manual_seed(self.config.seed)
        drafter = Drafter(self.drafter_config)
        if self.config.drafter.init is DrafterInit.target:
            initialize_from_target(drafter, self.target.model)
        return drafter

    @property
    def checkpoint(self) -> Path:
        """The drafter to evaluate: the recipe's choice, else the best one of this run."""
        chosen = self.config.checkpoint
        return Path(chosen) if chosen else self.config.run_dir / "checkpoint" / "best"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the stage table."""

    name: str
    folder: str
    """Output folder inside the run folder, which holds the manifest."""
    settings: tuple[str, ...]
    """Dotted recipe keys that decide the result."""
    upstream: tuple[str, ...]
    """Stages whose manifests are inputs, as far as the recipe has them."""
    execute: Callable[[Workshop, Manifest], object]
    more_inputs: Callable[[Workshop], dict[str, str]] = lambda workshop: {}
    """Hashes of inputs that no stage wrote: log files, weights."""
    leavings: tuple[str, ...] = ()
    """Further files and folders of the run that this stage owns."""
    is_distributed: bool = False
    """Several processes may run it together under `accelerate launch`."""
    is_repairable: bool = False
    """Where files of a finished stage are missing, it makes those again and keeps the others."""


def _sample_traffic(workshop: Workshop, manifest: Manifest) -> None:
    sample = workshop.config.data.sample
    path = sample_log(workshop.config)
    counts = play_fleet(path, seed=sample.seed, num_requests=sample.requests)
    manifest.details = dict(counts)
    manifest.outputs = [FileEntry.of(path, path.parent)]
    manifest.write(path.parent)


def _ingest(workshop: Workshop, manifest: Manifest) -> None:
    from dflash_data.ingest.stage import ingest

    config = workshop.config
    evaluation = _evaluation_prompts(config)
    ingest(config, log_path(config), evaluation=evaluation, manifest=manifest)


def _evaluation_prompts(config: RecipeConfig) -> dict[str, list[Conversation]]:
    from dflash_inference.eval_sets import load_eval_set

    return {
        name: load_eval_set(name, num_prompts=config.evaluate.prompts_per_set)
        for name in config.evaluate.eval_sets
    }


def _regenerate(workshop: Workshop, manifest: Manifest) -> None:
    from dflash_data.regenerate.stage import regenerate

    regenerate(workshop.config, target=_answering_target(workshop), manifest=manifest)


def _answering_target(workshop: Workshop) -> WrittenTarget:
    """Give the loaded target; where servers answer, its tokenizer is enough."""
    config = workshop.config
    if config.data.endpoints.urls:
        return load_target_text(config.target, workshop.drafter_config.target_layer_ids)
    return workshop.target


def _collect(workshop: Workshop, manifest: Manifest) -> None:
    from dflash_data.collect.stage import collect

    manifest.target = _upstream(workshop.config, "regenerate").target
    try:
        collect(
            workshop.config,
            load_target=lambda: workshop.target,
            manifest=manifest,
            accelerator=workshop.accelerator,
        )
    finally:
        workshop.accelerator.end_training()


def _train(workshop: Workshop, manifest: Manifest) -> None:
    manifest.target = _upstream(workshop.config, "collect").target
    try:
        train(
            workshop.config,
            accelerator=workshop.accelerator,
            head=workshop.target.head,
            drafter=workshop.new_drafter(),
            manifest=manifest,
            stop_token_ids=sorted(workshop.target.stop_token_ids),
        )
    finally:
        workshop.accelerator.end_training()  # gloo aborts a process that leaves without it


def _evaluate(workshop: Workshop, manifest: Manifest) -> None:
    from dflash_inference.evaluate import evaluate

    features = workshop.config.run_dir / "features"
    splits = ["test", *(f"eval-{name}" for name in workshop.config.evaluate.eval_sets)]
    stores = {name: FeatureStore.open(features / name) for name in splits}
    drafter = load_checkpoint(workshop.checkpoint).to(workshop.target.device)
    manifest.target = _upstream(workshop.config, "collect").target
    evaluate(
        workshop.config, target=workshop.target, drafter=drafter, stores=stores, manifest=manifest
    )


def _report(workshop: Workshop, manifest: Manifest) -> None:
    from dflash_inference.report import report

    manifest.target = _upstream(workshop.config, "evaluate").target
    report(workshop.config, manifest=manifest)


def _log_inputs(workshop: Workshop) -> dict[str, str]:
    if workshop.config.data.logs is None:
        return {}
    from dflash_data.ingest.plan import tokenizer_of
    from dflash_data.logs.sources import parts_hash, plan_parts

    parts = plan_parts(log_path(workshop.config), format=workshop.config.data.format)
    # What decodes token ids that stand in place of text decides which calls can be kept.
    tokenizer = tokenizer_of(workshop.config, parts)
    found = {} if tokenizer is None else {"tokenizer": file_hash(tokenizer)}
    return {"logs": parts_hash(parts)} | found


def _target_input(workshop: Workshop) -> dict[str, str]:
    return {"target": locate_target(workshop.config.target).label}


def _answer_inputs(workshop: Workshop) -> dict[str, str]:
    """Name the target, who answers for it, and the seed of sampled answers.

    At which address the servers are does not decide the result.
    """
    data = workshop.config.data
    inputs = _target_input(workshop)
    inputs["answered_by"] = "servers" if data.endpoints.urls else "this process"
    if not data.serving_sampling.is_greedy:
        inputs["seed"] = str(workshop.config.seed)
    return inputs


def _checkpoint_input(workshop: Workshop) -> dict[str, str]:
    weights = workshop.checkpoint / WEIGHTS_NAME
    require(
        weights.is_file(),
        f"checkpoint (={workshop.checkpoint}) holds no {WEIGHTS_NAME}. Run `train` first, or give "
        "checkpoint=DIR.",
    )
    return {"checkpoint": file_hash(weights)}


_TAPS = ("target", "drafter.num_taps", "drafter.target_layer_ids")
_COLLECTED = (
    *_TAPS,
    "data.max_prompt_tokens",
    "data.batch_size",
    "data.features_dtype",
    "data.teacher_top_k",
)

SAMPLE_TRAFFIC = Stage(
    name="sample-traffic",
    folder="sample_traffic",
    settings=("data.sample",),
    upstream=(),
    execute=_sample_traffic,
)
STAGES = (
    Stage(
        name="ingest",
        folder="conversations",
        settings=(
            "data.hmac_key_file", "data.format", "data.excluded_tenants", "data.max_age_days",
            "data.retention_date", "data.max_answers_per_prefix", "data.max_per_cluster",
            "data.validation_days", "data.test_days", "data.validation_share", "data.test_share",
            "data.max_drop_share", "evaluate.eval_sets", "evaluate.prompts_per_set",
            "data.target_aliases", "data.target_valid_from", "data.target_valid_until",
            "data.serving_sampling", "data.trust_unknown_sampling", "data.regenerate",
        ),
        upstream=("sample-traffic",),
        execute=_ingest,
        more_inputs=_log_inputs,
        leavings=("ingest",),
    ),
    Stage(
        name="regenerate",
        folder="regenerated",
        settings=(
            *_COLLECTED, "data.max_new_tokens", "data.serving_sampling", "data.endpoints.model",
            "data.endpoints.api",
        ),
        upstream=("ingest",),
        execute=_regenerate,
        more_inputs=_answer_inputs,
        is_repairable=True,
    ),
    Stage(
        name="collect",
        folder="features",
        settings=(*_COLLECTED, "data.max_new_tokens", "data.shard_bytes"),
        upstream=("ingest", "regenerate"),
        execute=_collect,
        more_inputs=_target_input,
        is_distributed=True,
        is_repairable=True,
    ),
    Stage(
        name="train",
        folder="checkpoint",
        settings=("seed", "target", "drafter", "training", "loss", "optim", "launch"),
        upstream=("collect",),
        execute=_train,
        leavings=("state", "metrics.jsonl"),
        is_distributed=True,
    ),
    Stage(
        name="evaluate",
        folder="traces",
        settings=(
            "target", "evaluate.eval_sets", "evaluate.live_traffic", "evaluate.live_per_set",
            "evaluate.live_max_new_tokens", "evaluate.seed",
        ),
        upstream=("collect",),
        execute=_evaluate,
        more_inputs=_checkpoint_input,
    ),
    Stage(
        name="report",
        folder="report",
        settings=("evaluate.resamples", "evaluate.seed"),
        upstream=("ingest", "regenerate", "train", "evaluate"),
        execute=_report,
    ),
)  # fmt: skip
_BY_NAME = {stage.name: stage for stage in (SAMPLE_TRAFFIC, *STAGES)}


def stage_folder(name: str) -> str:
    """Give the output folder of a stage, inside the run folder."""
    return _BY_NAME[name].folder


def sample_log(config: RecipeConfig) -> Path:
    """Give where the simulated fleet's log of a run lies."""
    return config.run_dir / SAMPLE_TRAFFIC.folder / "traffic.jsonl"


def log_path(config: RecipeConfig) -> str:
    """Give the log that a run ingests, a path or an address: the recipe's, else the fleet's."""
    return str(sample_log(config)) if config.data.logs is None else config.data.logs


def stages_of(config: RecipeConfig) -> list[Stage]:
    """List the stages of a recipe in order.

    The fleet plays only where no log is given, and nothing is trained where a checkpoint is.
    """
    stages = [SAMPLE_TRAFFIC, *STAGES] if config.data.logs is None else list(STAGES)
    return [stage for stage in stages if not (stage.name == "train" and config.checkpoint)]


def play_fleet(out: Path, *, seed: int, num_requests: int) -> dict[str, int]:
    """Write the simulated fleet's log and give the number of requests by kind."""
    from dflash_data.sample_traffic.fleet import write_sample_traffic

    return write_sample_traffic(out, seed=seed, num_requests=num_requests)


def estimate_ingest(config: RecipeConfig) -> Iterator[str]:
    """Yield what `ingest` would take, as lines to print, then check that the disk would hold it.

    Raises:
        ValueError: There is no log, or it is refused.
        UnavailableError: The disk would not hold the conversations.
    """
    from dflash_data.ingest.estimate import check_disk, estimate_ingest

    evaluation = _evaluation_prompts(config)
    estimate = estimate_ingest(config, log_path(config), evaluation=evaluation)
    yield from estimate.lines()
    check_disk(estimate, config)


def estimate_regeneration(config: RecipeConfig) -> Iterator[str]:
    """Yield what `regenerate` would take, as lines to print, then check the disk.

    Raises:
        ValueError: `ingest` has not run.
        UnavailableError: The disk would not hold the features.
    """
    from dflash_data.collect.stage import check_disk
    from dflash_data.regenerate.estimate import estimate_regeneration

    _upstream(config, "ingest")
    estimate = estimate_regeneration(config, target=_answering_target(Workshop(config)))
    yield from estimate.lines()
    check_disk(estimate.disk_bytes or 0, config.run_dir)


def estimate_collection(config: RecipeConfig) -> Iterator[str]:
    """Yield what `collect` would take, as lines to print, then check that the disk would hold it.

    Raises:
        ValueError: `ingest` or `regenerate` has not run.
        UnavailableError: The disk would not hold the features.
    """
    from dflash_data.collect.estimate import plan_collection
    from dflash_data.collect.stage import check_disk

    for name in ("ingest", "regenerate"):
        _upstream(config, name)
    workshop = Workshop(config)
    estimate = plan_collection(config, load_target=lambda: workshop.target)
    yield from estimate.lines()
    check_disk(estimate.disk_bytes, config.run_dir)


def examine_checkpoint(config: RecipeConfig) -> list[Finding]:
    """Check a drafter, the recipe's or the best one of its run, against the recipe's target.

    Raises:
        ValueError: There is no such folder, or the target cannot be loaded.
    """
    folder = Workshop(config).checkpoint
    require(
        folder.is_dir(),
        f"checkpoint (={folder}) is not a folder. Give checkpoint=DIR with config.json in it.",
    )
    return examine(folder, load_target(config.target, []))


def view_conversation(config: RecipeConfig, choice: Choice) -> View:
    """Give one record of a run and the tokens that training sees of it; loads no weights.

    Raises:
        ValueError: There is no such record, or the target's tokenizer cannot be read.
    """
    from dflash_data.collect.feature_rows import answer_row, has_exact_ids
    from dflash_data.drops import DropReason

    record = find_record(config.run_dir, choice)
    target = load_target_text(config.target, [])
    if record.answer is None or not record.on_policy:
        return prompt_view(record, target.tokenizer, serving=config.data.serving_sampling)
    source = "passed through, not tokenised" if has_exact_ids(record) else "chat template"
    row = answer_row(record, target, serving=config.data.serving_sampling)
    if isinstance(row, DropReason):
        row, source = None, f"{source}: `collect` drops it as {row.value}"
    return View(record=record, tokenizer=target.tokenizer, row=row, remark=source)


def summary(config: RecipeConfig) -> list[str]:
    """Give the lines that end a run on screen: acceptance length, live check, speed."""
    from dflash_inference.report import summary_lines

    return summary_lines(config)


def run(config: RecipeConfig, *, force: bool = False) -> None:
    """Walk all stages of a recipe."""
    workshop = Workshop(config)
    _ = workshop.drafter_config  # a target that does not fit is found before any work
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
    stage = _BY_NAME[name]
    folder = workshop.config.run_dir / stage.folder
    manifest = _prepare(stage, workshop)
    done = Manifest.read(folder)
    is_current = done is not None and done.key == manifest.key and done.has_outputs(folder)
    if is_current and not force:
        tqdm.write(f"{name}: complete and unchanged, nothing to do", file=sys.stderr)
        return False
    if stage.is_distributed:  # every process has decided before the first one changes the folder
        workshop.accelerator.wait_for_everyone()
    if not stage.is_distributed or workshop.accelerator.is_main_process:
        tqdm.write(f"{name}: running", file=sys.stderr)
        keeps_files = stage.is_repairable and not force
        _claim(
            stage,
            workshop.config.run_dir,
            manifest.key,
            afresh=done is not None and not keeps_files,
        )
    if stage.is_distributed:
        workshop.accelerator.wait_for_everyone()
    stage.execute(workshop, manifest)
    return True


def _prepare(stage: Stage, workshop: Workshop) -> Manifest:
    """Give the manifest of a stage before its work: settings, inputs, provenance."""
    config = workshop.config
    present = {each.name for each in stages_of(config)}
    inputs = {name: _upstream(config, name).hash for name in stage.upstream if name in present}
    return Manifest(
        stage=stage.name,
        recipe_hash=content_hash({key: _setting(config, key) for key in stage.settings}),
        inputs=inputs | stage.more_inputs(workshop),
        command=command_line(),
        code=dict(code_version()),
        versions=package_versions(),
    )


def _setting(config: RecipeConfig, key: str) -> Any:
    value: Any = to_plain(config)
    for part in key.split("."):
        value = value[part]
    return value


def _upstream(config: RecipeConfig, name: str) -> Manifest:
    folder = config.run_dir / _BY_NAME[name].folder
    manifest = Manifest.read(folder)
    if manifest is None:
        raise ValueError(
            f"{folder} is not complete. Run `dflash-train {name}` with this recipe first, or "
            "`dflash-train run` for all stages."
        )
    return manifest


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
