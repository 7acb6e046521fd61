"""What the command line does beside running stages: the fleet, inspect, names, the last lines."""

from pathlib import Path

from dflash_train.config import RecipeConfig, require
from dflash_train.features.target_text import load_target_text
from dflash_train.release.inspection import Choice, View, find_record, prompt_view, text_source


def play_fleet(out: Path, *, seed: int, num_requests: int) -> dict[str, int]:
    """Write the simulated fleet's log and give the number of requests by kind."""
    from dflash_data.sample_traffic.fleet import write_sample_traffic

    return write_sample_traffic(out, seed=seed, num_requests=num_requests)


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
    source = "passed through, not tokenised" if has_exact_ids(record) else text_source(record)
    row = answer_row(record, target, serving=config.data.serving_sampling)
    if isinstance(row, DropReason):
        row, source = None, f"{source}: `collect` drops it as {row.value}"
    return View(record=record, tokenizer=target.tokenizer, row=row, remark=source)


def tenant_pseudonym(config: RecipeConfig, name: str) -> str:
    """Give the keyed hash that stands for a tenant wherever this run speaks of it.

    Args:
        config: Says which key: `data.hmac_key_file`, the environment, or the run's own.
        name: As the logs write it.

    Raises:
        ValueError: No name is given, or there is no key yet.
    """
    from dflash_data.privacy.pseudonyms import has_key, load_pseudonyms

    require(bool(name), "tenant must be set: add tenant=NAME, as the logs write it.")
    require(
        has_key(config),
        f"{config.run_dir} has no key, so it knows nobody by a hash. Give name=RUN of a run that "
        "has read logs, or the data.hmac_key_file that it took.",
    )
    return load_pseudonyms(config).hide("tenant", name)


def summary(config: RecipeConfig) -> list[str]:
    """Give the lines that end a run on screen: acceptance length, live check, speed."""
    from dflash_inference.report import summary_lines

    return summary_lines(config)
