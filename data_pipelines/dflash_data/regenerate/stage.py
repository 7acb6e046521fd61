"""The target answers what the log does not hold in its words.

    dflash-train regenerate recipe=smollm2
    dflash-train regenerate recipe=smollm2 data.endpoints.urls=[http://localhost:8000/v1]

A session's turns are answered in order, each with the target's own earlier answers in its history:
in this process (`generated_answers.py`, which keeps the features on the way), or by any servers
with OpenAI's API (`served_answers.py`). The plan is a function of the input alone and the records
are written in the order in which ingest left them, so a killed run ends with the same bytes.
"""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from dflash_data.collect.feature_rows import has_exact_ids
from dflash_data.drops import DropReason, all_reasons
from dflash_data.record_index import write_record_index
from dflash_data.regenerate.answer_log import LOG_NAME
from dflash_data.regenerate.answers import Answers, Histories
from dflash_data.regenerate.generated import GeneratedAnswers
from dflash_data.regenerate.plan import make_plan, needs_answer, read_open_records, splits_in
from dflash_data.regenerate.served import answer_by_servers
from dflash_train.config import RecipeConfig
from dflash_train.features.store import INDEX_NAME
from dflash_train.features.target import Target
from dflash_train.features.target_text import WrittenTarget
from dflash_train.records.conversation import Conversation, write_shard
from dflash_train.records.manifest import Counts, FileEntry, Manifest

__all__ = ["FOLDER", "needs_answer", "regenerate", "splits_in"]

FOLDER = "regenerated"


def regenerate(config: RecipeConfig, *, target: WrittenTarget, manifest: Manifest) -> Manifest:
    """Answer every conversation that is not on-policy, and store records and features.

    Args:
        config: The recipe; `run_dir/conversations` is read, `run_dir/regenerated` is written.
        target: The loaded target; where servers answer, its tokenizer is enough (`TargetText`).
        manifest: Prepared by the caller; completed and written last.

    Raises:
        ValueError: Every prompt is too long, or servers do not answer as the recipe wants.
        UnavailableError: No server answers any more; run it again to go on.
    """
    folder = config.run_dir / FOLDER
    open_records = read_open_records(config.run_dir / "conversations", config.data)
    histories = Histories(open_records)
    plan = make_plan(folder, open_records, histories, target=target, data=config.data)
    if config.data.endpoints.urls:
        answers = answer_by_servers(
            plan, open_records, histories, config=config, target=target, folder=folder
        )
    else:
        assert isinstance(target, Target), "only servers can do without its weights"
        engine = GeneratedAnswers(config, target, folder)
        answers = engine.answer(plan, open_records, histories)
        engine.write_indexes(plan, answers)
    _write_splits(folder, open_records, answers)
    drops = Counter(DropReason(reason) for reason in plan.dropped.values())
    drops.update(answers.dropped.values())
    manifest.counts = Counts(
        read=len(open_records), kept=len(answers.records), dropped=all_reasons(drops)
    )
    manifest.target = target.describe()
    manifest.details = _details(config, answers)
    manifest.outputs = _outputs(folder, answers)
    manifest.write(folder)
    return manifest


def _write_splits(folder: Path, open_records: dict[str, Conversation], answers: Answers) -> None:
    """Write the answered records split by split, in the order in which ingest left them."""
    by_split: dict[str, list[Conversation]] = defaultdict(list)
    for record_id, record in open_records.items():
        if record_id in answers.records:
            by_split[record.split or ""].append(answers.records[record_id])
    for split, records in by_split.items():
        write_shard(folder / f"{split}-00000.jsonl.gz", records)
    write_record_index(folder)


def _details(config: RecipeConfig, answers: Answers) -> dict[str, Any]:
    """Give the facts behind the counts: who answered, and what was redacted. Never a value."""
    redacted: Counter[str] = Counter()
    for record in answers.records.values():
        place = len(record.messages) - 1
        redacted.update(span[3] for span in record.privacy.spans if span[0] == place)
    return {
        "teacher_top_k": config.data.teacher_top_k,
        "answered_by": "servers" if config.data.endpoints.urls else "this process",
        "without_token_ids": sum(not has_exact_ids(record) for record in answers.records.values()),
        "redacted_in_answers": dict(sorted(redacted.items())),
    }


def _outputs(folder: Path, answers: Answers) -> list[FileEntry]:
    rows: dict[str, int] = defaultdict(int)
    tokens: dict[str, int] = defaultdict(int)
    for record in answers.records.values():
        rows[record.split or ""] += 1
        tokens[record.split or ""] += sum(record.usage.values())
    entries = [
        FileEntry.of(path, folder, rows=rows[split], tokens=tokens[split])
        for split in splits_in(folder)
        for path in sorted(folder.glob(f"{split}-*.jsonl.gz"))
    ]
    features = sorted((folder / "features").rglob("*.*"))
    others = [folder / INDEX_NAME, *folder.glob(LOG_NAME), *features]
    return entries + [FileEntry.of(path, folder) for path in others]
