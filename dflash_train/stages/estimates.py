"""What a stage would take, as lines to print: `dflash-train <verb> --dry-run`.

The lines come first; then the disk is checked, so that a full one does not hide the figures.
"""

from collections.abc import Callable, Iterator

from dflash_train.config import RecipeConfig
from dflash_train.stages.table import finished
from dflash_train.stages.work import evaluation_prompts
from dflash_train.stages.workshop import Workshop


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


ESTIMATES: dict[str, Callable[[RecipeConfig], Iterator[str]]] = {
    "ingest": estimate_ingest,
    "regenerate": estimate_regeneration,
    "collect": estimate_collection,
}
"""By verb: the stages whose cost is worth knowing before it is paid."""
