"""The stage table: what each stage reads, which files it owns and which keys decide its result."""

from collections.abc import Callable
from dataclasses import dataclass

from dflash_train.config import RecipeConfig
from dflash_train.records.manifest import Manifest
from dflash_train.stages import inputs, work
from dflash_train.stages.tune import blending, judging
from dflash_train.stages.tune.start import TUNING_FOLDER
from dflash_train.stages.workshop import SAMPLE_FOLDER, Workshop


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
    target_from: str | None = None
    """The upstream stage whose `target` block this one hands on; None if it sets its own."""
    more_inputs: Callable[[Workshop], dict[str, str]] = lambda workshop: {}
    """Hashes of inputs that no stage wrote: log files, weights."""
    leavings: tuple[str, ...] = ()
    """Further files and folders of the run that this stage owns."""
    is_distributed: bool = False
    """Several processes may run it together under `accelerate launch`."""
    is_repairable: bool = False
    """Where files of a finished stage are missing, it makes those again and keeps the others."""


_TARGET = ("target.name_or_path", "target.revision", "target.dtype", "target.attention")
_TAPS = (*_TARGET, "drafter.num_taps", "drafter.target_layer_ids")
_COLLECTED = (
    *_TAPS,
    "data.max_prompt_tokens",
    "data.batch_size",
    "data.features_dtype",
    "data.teacher_top_k",
)

SAMPLE_TRAFFIC = Stage(
    name="sample-traffic",
    folder=SAMPLE_FOLDER,
    settings=("data.sample",),
    upstream=(),
    execute=work.sample_traffic,
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
            "data.served_model",
        ),
        upstream=("sample-traffic",),
        execute=work.ingest,
        more_inputs=inputs.ingest_inputs,
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
        execute=work.regenerate,
        more_inputs=inputs.answer_inputs,
        is_repairable=True,
    ),
    Stage(
        name="collect",
        folder="features",
        settings=(*_COLLECTED, "data.max_new_tokens", "data.shard_bytes"),
        upstream=("ingest", "regenerate"),
        execute=work.collect,
        target_from="regenerate",
        more_inputs=inputs.reading_inputs,
        is_distributed=True,
        is_repairable=True,
    ),
    Stage(
        name="train",
        folder="checkpoint",
        settings=("seed", *_TARGET, "drafter", "training", "loss", "optim", "launch"),
        upstream=("collect",),
        execute=work.train,
        target_from="collect",
        more_inputs=inputs.training_inputs,
        leavings=("state", "metrics.jsonl", "stream"),
        is_distributed=True,
    ),
    Stage(
        name="evaluate",
        folder="traces",
        settings=(
            *_TARGET, "evaluate.eval_sets", "evaluate.live_traffic", "evaluate.live_per_set",
            "evaluate.live_max_new_tokens", "evaluate.fast", "evaluate.seed",
        ),
        upstream=("collect",),
        execute=work.evaluate,
        target_from="collect",
        more_inputs=inputs.checkpoint_input,
    ),
    Stage(
        name="report",
        folder="report",
        settings=("evaluate.resamples", "evaluate.seed"),
        upstream=("ingest", "regenerate", "train", "evaluate"),
        execute=work.report,
        target_from="evaluate",
        more_inputs=inputs.report_inputs,
    ),
)  # fmt: skip
BLEND = Stage(
    name="blend",
    folder=blending.BLEND_FOLDER,
    settings=(
        *_TARGET, "tune.blends", "tune.blend_rows", "tune.tenant_margin", "evaluate.seed",
    ),
    upstream=("collect", "train"),
    execute=blending.blend,
    target_from="collect",
    more_inputs=blending.blending_inputs,
)  # fmt: skip
"""Mixes what training has found with what it began from; only the verb `tune` walks here."""
TUNE = Stage(
    name="tune",
    folder=TUNING_FOLDER,
    settings=(
        *_TARGET, "tune.min_requests", "tune.tenant_margin", "evaluate.resamples", "evaluate.seed",
    ),
    upstream=("ingest", "collect", "train"),
    execute=judging.judge_candidate,
    target_from="collect",
    more_inputs=judging.judging_inputs,
)  # fmt: skip
"""Judges what the stages before have made; only the verb `tune` walks here."""
_BY_NAME = {stage.name: stage for stage in (SAMPLE_TRAFFIC, *STAGES, BLEND, TUNE)}


def stage_named(name: str) -> Stage:
    """Give a row of the table."""
    return _BY_NAME[name]


def stages_of(config: RecipeConfig) -> list[Stage]:
    """List the stages of a recipe in order.

    The fleet plays only where no log is given, and nothing is trained where a checkpoint is.
    """
    stages = [SAMPLE_TRAFFIC, *STAGES] if config.data.logs is None else list(STAGES)
    return [stage for stage in stages if not (stage.name == "train" and config.checkpoint)]


def finished(config: RecipeConfig, name: str) -> Manifest:
    """Give the manifest of a stage that has to be complete.

    Raises:
        ValueError: It is not.
    """
    folder = config.run_dir / _BY_NAME[name].folder
    manifest = Manifest.read(folder)
    if manifest is None:
        raise ValueError(
            f"{folder} is not complete. Run `dflash-train {name}` with this recipe first, or "
            "`dflash-train run` for all stages."
        )
    return manifest
