"""The target answers what the log does not hold in its words.

    dflash-train regenerate recipe=smollm2 [--dry-run]
    dflash-train regenerate recipe=smollm2 data.endpoints.urls=[http://localhost:8000/v1]

A session's turns are answered in order, each with the target's own earlier answers in its history:
in this process (`generated.py`, which keeps the features on the way), or by any servers with
OpenAI's API (`served.py`). Each shard of conversations becomes one shard of answers, so memory
does not grow with the log. The plans are a function of the input alone and the records are written
in the order in which ingest left them, so a killed run ends with the same bytes.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dflash_data.collect.feature_rows import has_exact_ids
from dflash_data.drops import DropReason, all_reasons
from dflash_data.record_index import write_record_index
from dflash_data.regenerate.answers import Answers
from dflash_data.regenerate.generated import GeneratedAnswers
from dflash_data.regenerate.plan import (
    OpenShard,
    needs_answer,
    open_shards,
    plan_shards,
    splits_in,
)
from dflash_data.regenerate.served import answer_by_servers
from dflash_train.config import RecipeConfig
from dflash_train.features.store import INDEX_NAME
from dflash_train.features.target import Target
from dflash_train.features.target_text import WrittenTarget
from dflash_train.records.conversation import write_shard
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
        ValueError: Conversations are damaged, every prompt is too long, or servers do not answer as
            the recipe wants.
        UnavailableError: No server answers any more; run it again to go on.
    """
    conversations, folder = config.run_dir / "conversations", config.run_dir / FOLDER
    source = Manifest.read(conversations)
    if source is not None:
        source.verify_outputs(conversations)  # a damaged shard must not become answers
    plans = plan_shards(folder, conversations, target=target, data=config.data)
    shards = open_shards(plans, conversations, config.data)
    books = _Books(folder)
    num_asked = sum(plan.num_asked for plan in plans)
    with tqdm(total=num_asked, desc="regenerate", unit="row", file=sys.stderr) as progress:
        if config.data.endpoints.urls:
            answer_by_servers(
                shards, config=config, target=target, folder=folder, finish=books.enter,
                progress=progress,
            )  # fmt: skip
        else:
            assert isinstance(target, Target), "only servers can do without its weights"
            engine = GeneratedAnswers(config, target, folder)
            for shard in shards:
                books.enter(shard, engine.answer(shard, progress))
            engine.write_indexes()
    write_record_index(folder)
    manifest.counts = books.counts()
    manifest.target = target.describe()
    manifest.details = books.details() | {
        "teacher_top_k": config.data.teacher_top_k,
        "answered_by": "servers" if config.data.endpoints.urls else "this process",
    }
    manifest.outputs = _outputs(folder, books)
    manifest.write(folder)
    return manifest


@dataclass
class _Books:
    """What has been written and dropped so far; records go to disk, only counts stay."""

    folder: Path
    entries: list[FileEntry] = field(default_factory=list)
    """Shards of answered records."""
    dropped: Counter[DropReason] = field(default_factory=Counter)
    redacted: Counter[str] = field(default_factory=Counter)
    """Redactions in answers, by kind."""
    without_token_ids: int = 0

    def enter(self, shard: OpenShard, answers: Answers) -> None:
        """Write the answered records of a shard, in the order in which ingest left them."""
        self.dropped.update(map(DropReason, shard.plan.dropped.values()))
        self.dropped.update(answers.dropped.values())
        records = [answers.records[i] for i in shard.records if i in answers.records]
        if not records:
            return
        for record in records:
            place = len(record.messages) - 1
            self.redacted.update(span[3] for span in record.privacy.spans if span[0] == place)
            self.without_token_ids += not has_exact_ids(record)
        path = self.folder / f"{shard.plan.name}.jsonl.gz"
        write_shard(path, records)
        tokens = sum(sum(record.usage.values()) for record in records)
        self.entries.append(FileEntry.of(path, self.folder, rows=len(records), tokens=tokens))

    def counts(self) -> Counts:
        """Give the books of the stage."""
        kept = sum(entry.rows or 0 for entry in self.entries)
        read = kept + sum(self.dropped.values())
        return Counts(read=read, kept=kept, dropped=all_reasons(self.dropped))

    def details(self) -> dict[str, Any]:
        """Give the facts behind the counts: what was redacted. Never a value."""
        return {
            "without_token_ids": self.without_token_ids,
            "redacted_in_answers": dict(sorted(self.redacted.items())),
        }


def _outputs(folder: Path, books: _Books) -> list[FileEntry]:
    """List all files that the stage vouches for."""
    shards = sorted(books.entries, key=lambda entry: entry.path)
    logs = sorted((folder / "answers").glob("*.jsonl"))
    features = sorted((folder / "features").rglob("*.*"))
    others = [folder / INDEX_NAME, *logs, *features]
    return shards + [FileEntry.of(path, folder) for path in others]
