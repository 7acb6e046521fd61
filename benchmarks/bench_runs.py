"""Run folders for benches: the records of a finished run, laid out for the stages that follow.

A bench that runs real stages needs a run folder of its own. Records are linked, and their manifests
cut down to what was taken over, so that the stages find what they check.
"""

import os
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from dflash_train.config import RecipeConfig, compose, require
from dflash_train.records.conversation import Conversation, read_split
from dflash_train.records.manifest import Manifest
from dflash_train.stages.table import stage_named

_RECORDS = ".jsonl.gz"


def config_of(run: Path, overrides: list[str]) -> RecipeConfig:
    """Compose the recipe of a run folder.

    Args:
        run: The run folder.
        overrides: `recipe=NAME` (smollm2 unless given) and further settings.
    """
    if not any(each.startswith("recipe=") for each in overrides):
        overrides = ["recipe=smollm2", *overrides]
    return replace(compose(overrides), name=run.name, runs_dir=str(run.parent))


def take_over_answers(source: Path, run_dir: Path, splits: list[str]) -> None:
    """Lay out a run whose answers are there and whose features are not.

    Args:
        source: A run folder with finished `ingest` and `regenerate`.
        run_dir: The new run folder; what was taken over before is linked again.
        splits: The splits to take over.

    Raises:
        ValueError: A stage of the source is not finished or damaged, or it lacks a split.
    """
    for stage in ("ingest", "regenerate"):
        origin, folder = (run / stage_named(stage).folder for run in (source, run_dir))
        manifest = Manifest.read(origin)
        if manifest is None:
            raise ValueError(f"--run: {origin} is not complete. Run `dflash-train run` first.")
        taken = [entry for entry in manifest.outputs if _split_of(entry.path) in splits]
        missing = sorted(set(splits) - {_split_of(entry.path) for entry in taken})
        require(not missing, f"--run: {origin} has no records of the splits {missing}.")
        cut = replace(manifest, outputs=taken, counts=None)
        cut.verify_outputs(origin)
        folder.mkdir(parents=True, exist_ok=True)
        for entry in taken:
            link = folder / entry.path
            link.unlink(missing_ok=True)
            link.symlink_to((origin / entry.path).resolve())
        cut.write(folder)


def whole_sessions(run: Path, *, split: str, num_rows: int) -> list[Conversation]:
    """Read the first whole sessions of a split until there are `num_rows` records, or all.

    Raises:
        ValueError: The run has no conversations in this split.
    """
    folder = run / stage_named("ingest").folder
    sessions: dict[str, list[Conversation]] = defaultdict(list)
    for record in read_split(folder, split):
        sessions[record.session or record.id].append(record)
    require(
        bool(sessions), f"--run: {folder} has no records of {split}. Run `dflash-train run` first."
    )
    chosen: list[Conversation] = []
    for records in sessions.values():
        if len(chosen) >= num_rows:
            break
        chosen += records
    return chosen


def load_before(bench: str) -> float:
    """Give the load of the machine, and say so where it is not idle."""
    load = os.getloadavg()[0]
    if load > 0.5:
        tell(bench, f"the machine is busy (load {load:.1f}); these figures mean little")
    return round(load, 2)


def tell(bench: str, what: str) -> None:
    """Report progress on stderr."""
    print(f"{bench}: {what}", file=sys.stderr, flush=True)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """Give a table whose first column is text and whose others are figures."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _split_of(path: str) -> str | None:
    """Give the split of a shard of records like `test-00000.jsonl.gz`; None of any other file."""
    return path.rsplit("-", 1)[0] if path.endswith(_RECORDS) and "/" not in path else None
