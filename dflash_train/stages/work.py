"""What each stage does: a call into the package that does it.

The manifest comes with the stage's key, provenance and target block; the called function adds what
it wrote and writes it last.
"""

from dflash_train.config import FeaturesFrom, RecipeConfig
from dflash_train.records.conversation import Conversation
from dflash_train.records.manifest import FileEntry, Manifest
from dflash_train.stages.drafters import import_drafter
from dflash_train.stages.online import open_rows, training_rows
from dflash_train.stages.tools import play_fleet
from dflash_train.stages.workshop import Workshop
from dflash_train.training import stage as training
from dflash_train.training.tracking import open_wandb


def sample_traffic(workshop: Workshop, manifest: Manifest) -> None:
    """Play the simulated fleet into the run's own log."""
    sample = workshop.config.data.sample
    path = workshop.sample_log
    counts = play_fleet(path, seed=sample.seed, num_requests=sample.requests)
    manifest.details = dict(counts)
    manifest.outputs = [FileEntry.of(path, path.parent)]
    manifest.write(path.parent)


def ingest(workshop: Workshop, manifest: Manifest) -> None:
    """Turn the log into conversations."""
    from dflash_data.ingest import stage

    config = workshop.config
    evaluation = evaluation_prompts(config)
    stage.ingest(config, workshop.log, evaluation=evaluation, manifest=manifest)


def evaluation_prompts(config: RecipeConfig) -> dict[str, list[Conversation]]:
    """Load the prompts of the recipe's evaluation sets, by set: training must not see them."""
    from dflash_inference.eval_sets import load_eval_set

    return {
        name: load_eval_set(
            entry,
            num_prompts=config.evaluate.prompts_per_set,
            datasets_dir=config.evaluate.datasets_dir,
        )
        for name, entry in config.evaluate.sets
    }


def regenerate(workshop: Workshop, manifest: Manifest) -> None:
    """Let the target write the answers that are not its own."""
    from dflash_data.regenerate import stage

    stage.regenerate(workshop.config, target=workshop.answering_target, manifest=manifest)


def collect(workshop: Workshop, manifest: Manifest) -> None:
    """Store the target's features of every answered conversation."""
    from dflash_data.collect import stage

    try:
        stage.collect(
            workshop.config,
            load_target=workshop.target_to_read,
            manifest=manifest,
            accelerator=workshop.accelerator,
        )
    finally:
        workshop.accelerator.end_training()


def check_collect_engine(workshop: Workshop) -> None:
    """Refuse a vLLM that cannot be started, before hours of other stages lead to it."""
    from dflash_data.collect.vllm_reader import engine_versions

    if Manifest.read(workshop.config.run_dir / "features") is None:
        engine_versions(workshop.config.data)


def train(workshop: Workshop, manifest: Manifest) -> None:
    """Train the drafter on the target's features, stored or online.

    Stored ones need embedding and head of the target alone: its layers would take tens of GB from
    the drafter on every GPU.
    """
    try:
        with training_rows(workshop) as open_split:
            head, drafter = workshop.target.head, workshop.new_drafter()
            stop_token_ids = sorted(workshop.target.stop_token_ids)
            if workshop.config.data.features is FeaturesFrom.stored:
                workshop.let_target_go()
            training.train(
                workshop.config,
                accelerator=workshop.accelerator,
                head=head,
                drafter=drafter,
                manifest=manifest,
                open_rows=open_split,
                stop_token_ids=stop_token_ids,
            )
    finally:
        workshop.accelerator.end_training()  # gloo aborts a process that leaves without it


def evaluate(workshop: Workshop, manifest: Manifest) -> None:
    """Trace the drafter's verify steps on held-out answers."""
    from dflash_inference import evaluate as evaluation

    splits = ["test", *(f"eval-{name}" for name, _ in workshop.config.evaluate.sets)]
    stores = {name: open_rows(workshop, name) for name in splits}
    drafter = import_drafter(workshop.checkpoint, workshop.config.target).drafter
    drafter.to(workshop.target.device)
    evaluation.evaluate(
        workshop.config, target=workshop.target, drafter=drafter, stores=stores, manifest=manifest
    )


def report(workshop: Workshop, manifest: Manifest) -> None:
    """Sum the traces up as a report; W&B gets its tables and files if the recipe asks for it."""
    from dflash_inference import report as reporting
    from dflash_inference.report_tables import report_tables

    config = workshop.config
    wants_wandb = config.tracking.wandb
    tracker = open_wandb(config, run_dir=config.run_dir, is_new=False) if wants_wandb else None
    reporting.report(config, manifest=manifest)
    if tracker is not None:
        for name, table in report_tables(reporting.read_findings(config)).items():
            tracker.log_table(f"report/{name}", table.columns, table.rows)
        tracker.log_folder(config.run_dir / reporting.REPORT_FOLDER, kind="report")
        tracker.close()
