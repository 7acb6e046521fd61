"""Hashes of the inputs that no stage of the run wrote: log files, the target, a checkpoint."""

from pathlib import Path

from dflash_train.config import CollectEngine, FeaturesFrom, require
from dflash_train.drafter.checkpoint import drafter_hash, weights_hash
from dflash_train.features.target_weights import locate_target
from dflash_train.records.manifest import file_hash
from dflash_train.stages.earlier_runs import earlier_inputs
from dflash_train.stages.workshop import Workshop


def ingest_inputs(workshop: Workshop) -> dict[str, str]:
    """Hash the given log, and files of evaluation prompts, which stay out of training."""
    return log_inputs(workshop) | prompt_inputs(workshop)


def prompt_inputs(workshop: Workshop) -> dict[str, str]:
    """Hash the files among the evaluation sets; presets are pinned by their name."""
    files = [(name, entry) for name, entry in workshop.config.evaluate.sets if name != entry]
    return {f"prompts {name}": _hash_of("evaluate.eval_sets", entry) for name, entry in files}


def report_inputs(workshop: Workshop) -> dict[str, str]:
    """Hash the measurements that a report shows beside its own."""
    evaluate = workshop.config.evaluate
    found = {f"cost table {place}": place for place in evaluate.cost_tables}
    hashes = {name: _hash_of("evaluate.cost_tables", place) for name, place in found.items()}
    if evaluate.concurrency is not None:
        hashes["concurrency"] = _hash_of("evaluate.concurrency", evaluate.concurrency)
    return hashes


def log_inputs(workshop: Workshop) -> dict[str, str]:
    """Hash the given log, by content; the fleet's own is the output of a stage."""
    if workshop.config.data.logs is None:
        return {}
    from dflash_data.ingest.plan import tokenizer_of
    from dflash_data.logs.sources import parts_hash, plan_parts

    parts = plan_parts(workshop.log, format=workshop.config.data.format)
    # What decodes token ids that stand in place of text decides which calls can be kept.
    tokenizer = tokenizer_of(workshop.config, parts)
    found = {} if tokenizer is None else {"tokenizer": file_hash(tokenizer)}
    return {"logs": parts_hash(parts)} | found


def target_input(workshop: Workshop) -> dict[str, str]:
    """Name the target and its revision."""
    return {"target": locate_target(workshop.config.target).label}


def answer_inputs(workshop: Workshop) -> dict[str, str]:
    """Name the target, who answers for it, and the seed of sampled answers.

    At which address the servers are does not decide the result.
    """
    data = workshop.config.data
    inputs = target_input(workshop)
    inputs["answered_by"] = "servers" if data.endpoints.urls else "this process"
    if not data.serving_sampling.is_greedy:
        inputs["seed"] = str(workshop.config.seed)
    return inputs


def reading_inputs(workshop: Workshop) -> dict[str, str]:
    """Name the target, an engine other than Transformers, and whether features are left out.

    Features of two engines are equal within rounding, and one store holds those of one engine.
    """
    inputs = target_input(workshop)
    if workshop.config.data.collect_engine is not CollectEngine.transformers:
        inputs["engine"] = workshop.config.data.collect_engine.value
    if workshop.config.data.features is not FeaturesFrom.stored:
        inputs["features"] = workshop.config.data.features.value
    return inputs


def training_inputs(workshop: Workshop) -> dict[str, str]:
    """Hash what training reads beside the run's own features: a start, rows of earlier runs.

    Raises:
        ValueError: There is no such drafter, or a run does not fit.
    """
    return initial_weights_input(workshop) | earlier_inputs(workshop)


def initial_weights_input(workshop: Workshop) -> dict[str, str]:
    """Hash config and weights of the drafter that training starts from, where there is one.

    Raises:
        ValueError: There is no such drafter.
    """
    init = workshop.config.init
    if init is None:
        return {}
    folder = workshop.initial_folder(init)
    return {"init": drafter_hash(folder)}


def checkpoint_input(workshop: Workshop) -> dict[str, str]:
    """Hash the weights of the drafter to evaluate.

    Raises:
        ValueError: There are none.
    """
    return {"checkpoint": weights_hash(workshop.checkpoint)}


def _hash_of(key: str, place: str) -> str:
    path = Path(place)
    require(path.is_file(), f"{key} (={place}) is not a file. Give its path, or leave it out.")
    return file_hash(path)
