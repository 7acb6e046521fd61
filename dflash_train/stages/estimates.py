"""What a stage would take, as lines to print: `dflash-train <verb> --dry-run`.

The lines come first; then the disk is checked, so that a full one does not hide the figures.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from dflash_train.config import RecipeConfig
from dflash_train.features.store import FeatureStore, read_index
from dflash_train.records.manifest import Manifest
from dflash_train.stages.table import finished
from dflash_train.stages.work import evaluation_prompts
from dflash_train.stages.workshop import Workshop
from dflash_train.training import plan
from dflash_train.training.vocabulary import count_labels


def estimate_ingest(config: RecipeConfig) -> Iterator[str]:
    """Yield what `ingest` would take, then check that the disk would hold it.

    Raises:
        ValueError: There is no log, or it is refused.
        UnavailableError: The disk would not hold the conversations.
    """
    from dflash_data.ingest import estimate as ingest

    evaluation = evaluation_prompts(config)
    estimate = ingest.estimate_ingest(config, Workshop(config).log, evaluation=evaluation)
    yield from estimate.lines()
    ingest.check_disk(estimate, config)


def estimate_regeneration(config: RecipeConfig) -> Iterator[str]:
    """Yield what `regenerate` would take, then check that the disk would hold it.

    Raises:
        ValueError: `ingest` has not run.
        UnavailableError: The disk would not hold the features.
    """
    from dflash_data.collect.stage import check_disk
    from dflash_data.regenerate import estimate as regenerate

    finished(config, "ingest")
    target = Workshop(config).answering_target
    estimate = regenerate.estimate_regeneration(config, target=target)
    yield from estimate.lines()
    check_disk(estimate.disk_bytes or 0, config.run_dir)


def estimate_collection(config: RecipeConfig) -> Iterator[str]:
    """Yield what `collect` would take, then check that the disk would hold it.

    Raises:
        ValueError: `ingest` or `regenerate` has not run.
        UnavailableError: The disk would not hold the features.
    """
    from dflash_data.collect.estimate import plan_collection
    from dflash_data.collect.stage import check_disk

    for name in ("ingest", "regenerate"):
        finished(config, name)
    workshop = Workshop(config)
    estimate = plan_collection(config, load_target=workshop.target_to_read)
    yield from estimate.lines()
    check_disk(estimate.disk_bytes, config.run_dir)


def estimate_training(config: RecipeConfig) -> Iterator[str]:
    """Yield what `train` would take on the hardware of `plan`.

    Neither features nor the target's files are needed: then rows are those that the recipe allows,
    and the target's shape is the one that it writes down.

    Raises:
        ValueError: The target is out of reach and its shape unknown, or `plan.gpu` is not known.
    """
    yield from plan_training(config).lines()
    if Manifest.read(config.run_dir / "features" / "train") is None:
        yield f"next: {config.run_dir / 'features'} is not there: `dflash-train run` makes it"


def plan_training(config: RecipeConfig) -> plan.Plan:
    """Plan `train` on the hardware of `plan`.

    Raises:
        ValueError: The target is out of reach and its shape unknown, or `plan.gpu` is not known.
    """
    workshop = Workshop(config)
    drafter = workshop.planned_drafter_config
    folder = config.run_dir / "features" / "train"
    has_rows = Manifest.read(folder) is not None
    if has_rows:
        lines = read_index(folder)
        loads = plan.loads_of_features(lines, config, drafter)
        labels = _count_label_ids(folder, config, vocab_size=drafter.vocab_size)
    else:
        loads, labels = plan.loads_of_recipe(config, drafter), None
    facts = plan.TargetFacts.of(workshop.planned_target_config, num_label_ids=labels)
    gpu = config.plan.gpu or plan.local_gpu()
    if gpu is None:
        device = plan.measure_machine(drafter, loads.mean, config.launch)
    else:
        device = plan.device_named(gpu, is_bf16=plan.is_bf16(config))
    return plan.make_plan(
        config,
        drafter,
        target=facts,
        loads=loads,
        device=device,
        is_cpu=gpu is None,
    )


def _count_label_ids(folder: Path, config: RecipeConfig, *, vocab_size: int) -> int | None:
    """Count the ids that are a label somewhere; None where the recipe does not need to know."""
    if config.training.head_sample == 0:
        return None
    store = FeatureStore.open(folder, verify=False)
    counts = count_labels(store, list(range(len(store))), vocab_size=vocab_size)
    return int((counts > 0).sum())


ESTIMATES: dict[str, Callable[[RecipeConfig], Iterator[str]]] = {
    "ingest": estimate_ingest,
    "regenerate": estimate_regeneration,
    "collect": estimate_collection,
    "train": estimate_training,
}
"""By verb: the stages whose cost is worth knowing before it is paid."""
