"""The ingest stage: from request logs to scrubbed conversations in three splits.

    dflash-train ingest recipe=smollm2 data.logs=LOGS [executor=local|slurm|ray]

Five phases of datatrove tasks, in `ingest/steps.py`: read (tasks are parts of the log), spread (one
task, for buckets of too many calls), chain (tasks are buckets of whole sessions), decide (one task,
over rows of numbers) and write (buckets again).
Memory is bounded by what the tasks of one machine hold at a time, and no temporary file holds
anything unscrubbed. The bytes of the result depend on the log and the recipe, never on
executor, number of workers or order of files. File names matter in one case: a call without an
id of its own is identified by file name and line.

Temporary files lie in `ingest/`, named by the hash of all that decides them, so that a run cut
short goes on where it was and a changed log starts anew. They go when the stage ends.

Repeats are merged in train and validation only: traffic repeats on purpose, so the test window
keeps every call and train never absorbs calls of the test window.
"""

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from dflash_data.drops import ASKED_FOR, DropReason, all_reasons, worst_first
from dflash_data.executor import run_phases, slurm_script
from dflash_data.ingest.data_card import data_card, write_data_card
from dflash_data.ingest.decisions import KEPT, read_decisions
from dflash_data.ingest.decontaminate import EvaluationText, user_turns
from dflash_data.ingest.plan import IngestPlan
from dflash_data.ingest.steps import phases, shard_name
from dflash_data.logs.sources import LogPart, parts_hash, plan_parts
from dflash_data.privacy.pseudonyms import Pseudonyms
from dflash_data.record_index import INDEX_NAME, join_index_parts
from dflash_train.config import DataConfig, RecipeConfig, to_plain
from dflash_train.records.conversation import SPLITS, Conversation, write_shard
from dflash_train.records.manifest import (
    Counts,
    FileEntry,
    Manifest,
    atomic_path,
    content_hash,
    file_hash,
)

FOLDER = "conversations"
WORK_FOLDER = "ingest"


def ingest(
    config: RecipeConfig,
    logs: str | Path,
    *,
    evaluation: dict[str, list[Conversation]],
    manifest: Manifest,
) -> Manifest:
    """Write `conversations/` of this run: shards, index and data card, manifest last.

    Args:
        config: The recipe.
        logs: What `data.logs` may be: file, folder, glob or address.
        evaluation: Prompts of each evaluation set, by name; they stay out of training.
        manifest: Says who asked (stage, recipe hash, inputs, versions); counts, outputs and
            details are added here.

    Raises:
        ValueError: No usable line, too many drops for one reason, or a split without a record.
        UnavailableError: A cluster does the work; the same command ends the stage later.
    """
    parts = plan_parts(str(logs), format=config.data.format)
    plan = plan_ingest(config, parts, evaluation)
    try:
        totals = run_phases(phases(plan), plan.work, config.executor)
        splits = orjson.loads(plan.facts.read_bytes())
        _check(totals, str(logs), config.data)
    except ValueError:  # the user changes log or recipe, so nothing of this can be used again
        shutil.rmtree(plan.work.parent, ignore_errors=True)
        raise
    with atomic_path(config.run_dir / FOLDER) as folder:
        half_written = shutil.ignore_patterns(".partial-*")  # by a task that was killed
        shutil.copytree(plan.out, folder, copy_function=os.link, ignore=half_written)
        _finish(folder, plan, totals, splits, evaluation, manifest, config.data)
        shutil.rmtree(plan.work.parent)  # before the manifest counts, since nobody comes back
    return manifest


def plan_ingest(
    config: RecipeConfig,
    parts: list[LogPart],
    evaluation: dict[str, list[Conversation]],
    *,
    pseudonyms: Pseudonyms | None = None,
) -> IngestPlan:
    """Plan the tasks; the folder of their temporary files is named by all that decides them.

    Args:
        config: The recipe.
        parts: The log.
        evaluation: Prompts of each evaluation set, by name.
        pseudonyms: For a plan that is not carried out; else the run's key is found or made.
    """
    text = EvaluationText(evaluation)
    plan = IngestPlan(config, parts, Path(), text, pseudonyms=pseudonyms)
    decisive = [
        parts_hash(parts),
        [[(piece.name, piece.start, piece.end) for piece in part.slices] for part in parts],
        to_plain(plan.data),
        sorted(plan.excluded),
        plan.key_mark,
        None if plan.tokenizer is None else file_hash(plan.tokenizer),
        {name: [user_turns(prompt) for prompt in some] for name, some in evaluation.items()},
    ]
    name = content_hash(decisive).removeprefix("sha256:")[:12]
    plan.work = (config.run_dir / WORK_FOLDER / name).absolute()
    return plan


def slurm_scripts(
    config: RecipeConfig, logs: str | Path, *, evaluation: dict[str, list[Conversation]]
) -> dict[str, str]:
    """Give the scripts that `executor=slurm` would submit, by phase; nothing is submitted."""
    parts = plan_parts(str(logs), format=config.data.format)
    plan = plan_ingest(config, parts, evaluation)
    return {phase.name: slurm_script(phase, plan.work, config.executor) for phase in phases(plan)}


def _finish(
    folder: Path,
    plan: IngestPlan,
    totals: Counter[str],
    splits: dict[str, dict[str, object]],
    evaluation: dict[str, list[Conversation]],
    manifest: Manifest,
    data: DataConfig,
) -> None:
    """Put evaluation prompts, index, data card and manifest beside the shards."""
    shards = sorted(path.name for path in folder.iterdir())
    rows = _rows_by_shard(plan)
    outputs = [FileEntry.of(folder / name, folder, rows=rows[name]) for name in shards]
    index_parts = [plan.index_part(bucket) for bucket in range(plan.num_buckets)]
    join_index_parts(index_parts, folder / INDEX_NAME)
    for name, prompts in sorted(evaluation.items()):
        path = folder / shard_name(f"eval-{name}")
        outputs.append(FileEntry.of(path, folder, rows=_write_evaluation(path, name, prompts)))
    manifest.counts = Counts(
        read=totals["read"],
        kept=sum(totals[f"rows/{split}"] for split in SPLITS),
        dropped=all_reasons(_drops(totals)),
    )
    card = data_card(totals, manifest.counts, splits, data, sorted(evaluation))
    others = [folder / INDEX_NAME, *write_data_card(folder, card)]
    manifest.outputs = outputs + [FileEntry.of(path, folder) for path in others]
    manifest.details |= _details(card, _num_files(plan))
    manifest.write(folder)


def _rows_by_shard(plan: IngestPlan) -> dict[str, int]:
    rows: dict[str, int] = {}
    for bucket in range(plan.num_buckets):
        decisions = read_decisions(plan.decided(bucket))
        splits = decisions["split"][decisions["reason"] == KEPT]
        counts = np.bincount(splits, minlength=len(SPLITS)).tolist()
        rows |= {shard_name(split, bucket): counts[place] for place, split in enumerate(SPLITS)}
    return rows


def _write_evaluation(path: Path, name: str, prompts: list[Conversation]) -> int:
    for prompt in prompts:
        prompt.split = f"eval-{name}"
    return write_shard(path, prompts)


def _num_files(plan: IngestPlan) -> int:
    return len({piece.address for part in plan.parts for piece in part.slices})


def _drops(totals: Counter[str]) -> dict[DropReason, int]:
    return {reason: totals[f"dropped/{reason.value}"] for reason in DropReason}


def _check(totals: Counter[str], logs: str, data: DataConfig) -> None:
    """Raise ValueError if the log gives too little to go on; the message holds counts only."""
    counts = all_reasons(_drops(totals))
    occurred = f"{totals['read']} calls read, dropped: {worst_first(counts)}"
    if not any(totals[f"rows/{split}"] for split in SPLITS):
        raise ValueError(
            f"data.logs (={logs}) has no usable line ({occurred}). If it is a request log of "
            "another format than was found in it, set data.format."
        )
    # What was merged lives on in the weight of another record.
    counts[DropReason.duplicate.value] -= totals["merged_repeats"]
    counts[DropReason.cluster_cap.value] = 0
    asked_for = sum(counts.pop(reason.value) for reason in ASKED_FOR)
    meant = totals["read"] - asked_for
    for reason, count in counts.items():
        if count > data.max_drop_share * meant:
            raise ValueError(
                f"data.logs (={logs}) loses {count} of {meant} calls as {reason}: more "
                f"than data.max_drop_share (={data.max_drop_share}). Repair the log, or raise it."
            )
    for split in SPLITS:
        if not totals[f"rows/{split}"]:
            share = "test_share and data.validation_share" if split == "train" else f"{split}_share"
            raise ValueError(
                f"data.{share} leave no record for the split {split} ({occurred}). "
                "Change the shares or give a log over a longer time."
            )


def _details(card: dict[str, Any], num_files: int) -> dict[str, object]:
    """Give the facts behind the counts: repeats, redactions, sessions. Never a value."""
    return {
        "log_files": num_files,
        "undecoded": card["undecoded"],
        "merged_repeats": card["repeats"]["merged"],
        "removed_by_cap": card["repeats"]["removed_by_cap"],
        "sessions": card["sessions"],
        "sessions_not_time_based": card["sessions_not_time_based"],
        "contaminated": card["contaminated"],
        "privacy": {
            key: card["privacy"][key] for key in ("policy", "records_touched", "redactions")
        },
    }
