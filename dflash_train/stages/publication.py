"""What a run gives away: its conversations as a dataset repository. Nothing is uploaded."""

from pathlib import Path

from dflash_train.config import RecipeConfig, require
from dflash_train.stages.table import finished, stage_named
from dflash_train.stages.walk import recipe_hash


def export_dataset(config: RecipeConfig, *, license_id: str, out: Path | None) -> Path:
    """Write the run's conversations as a dataset repository and give its folder.

    Args:
        config: The recipe.
        license_id: Of the dataset card, as the Hub names it.
        out: The folder; None takes `dataset/` of the run.

    Raises:
        ValueError: `ingest` has not run with this recipe, a record must not be published, or `out`
            holds something else.
    """
    from dflash_data.dataset_repository import export_dataset
    from dflash_data.privacy.pseudonyms import rehearsal_pseudonyms

    ingest = stage_named("ingest")
    require(
        finished(config, ingest.name).recipe_hash == recipe_hash(config, ingest),
        f"{config.run_dir / ingest.folder} was made with other settings than this recipe's, which "
        "may leave out more (opt-outs, retention). Run `dflash-train ingest` with it first.",
    )
    pseudonyms = rehearsal_pseudonyms(config)
    names = config.data.excluded_tenants
    excluded = frozenset(pseudonyms.hide("tenant", name) for name in names)
    folder = out or config.run_dir / "dataset"
    export_dataset(config.run_dir / ingest.folder, folder, license_id=license_id, excluded=excluded)
    return folder
