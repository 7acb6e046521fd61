"""The ingest stage: from request logs to scrubbed conversations in three splits.

    dflash-train ingest recipe=smollm2 data.logs=LOGS

One datatrove pipeline, top to bottom in `pipeline()`. Each step loops and counts; the work is a
pure function of its own module. Most steps need the whole log (a session may span files), and
nothing may reach the disk unscrubbed, so the log is held in memory.

Repeats are merged after the splits, and in train and validation only: traffic repeats on
purpose, so the test window keeps every call and train never absorbs calls of the test window.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from dflash_data.adapters import ADAPTERS, Adapter
from dflash_data.decontaminate import EvaluationText, decontaminate
from dflash_data.drops import Drop, DropReason, all_reasons, worst_first
from dflash_data.executor import Document, Documents, PipelineStep, run_pipeline
from dflash_data.explode import Sifted, drop_orphans, explode, merge_repeats
from dflash_data.log_files import find_log_files, read_lines
from dflash_data.pseudonyms import Pseudonyms, load_pseudonyms
from dflash_data.record_index import write_record_index
from dflash_data.scrub import POLICY, scrub
from dflash_data.splits import assign_splits, time_cuts
from dflash_train.config import DataConfig, RecipeConfig
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
LEARNING_SPLITS = ("train", "validation")
"""Splits that are balanced and decontaminated; test stays as production sent it."""


def ingest(
    config: RecipeConfig,
    logs: Path,
    *,
    evaluation: dict[str, list[Conversation]],
    manifest: Manifest,
) -> Manifest:
    """Write `conversations/` of this run: one shard per split and evaluation set, manifest last.

    Args:
        config: The recipe.
        logs: Log file, folder or glob.
        evaluation: Prompts of each evaluation set, by name; they stay out of training.
        manifest: Says who asked (stage, recipe hash, inputs, versions); counts, outputs and
            details are added here.

    Raises:
        ValueError: No usable line, too many drops for one reason, or a split without a record.
    """
    files = find_log_files(logs)
    pseudonyms = load_pseudonyms(config)
    input_hash = content_hash([file_hash(path) for path in files])
    with atomic_path(config.run_dir / FOLDER) as folder:
        folder.mkdir()
        steps = pipeline(files, folder, config.data, pseudonyms, EvaluationText(evaluation))
        totals = run_pipeline(steps, config.run_dir / "logs", input_hash)
        _check(totals, logs, config.data)
        rows = {split: totals[f"rows/{split}"] for split in SPLITS}
        for name, prompts in sorted(evaluation.items()):
            rows[f"eval-{name}"] = _write_evaluation(folder, name, prompts)
        manifest.counts = Counts(
            read=totals["read"],
            kept=sum(rows[split] for split in SPLITS),
            dropped=all_reasons(_drops(totals)),
        )
        manifest.outputs = [
            FileEntry.of(_shard(folder, split), folder, rows=num_rows)
            for split, num_rows in rows.items()
        ]
        manifest.outputs.append(FileEntry.of(write_record_index(folder), folder))
        manifest.details |= _details(totals, len(files), sorted(evaluation))
        manifest.write(folder)
    return manifest


def pipeline(
    files: list[Path],
    folder: Path,
    data: DataConfig,
    pseudonyms: Pseudonyms,
    evaluation: EvaluationText,
) -> list[PipelineStep]:
    """List the steps in order; content is unscrubbed up to and including `explode`."""
    return [
        ReadLogs(files),
        Adapt(ADAPTERS["openai"]),
        Sift("explode", explode),
        Sift("scrub", lambda records: scrub(records, pseudonyms)),
        Sift("splits", lambda records: assign_splits(records, time_cuts(records, data), data)),
        Sift("decontaminate", lambda records: decontaminate(records, evaluation, LEARNING_SPLITS)),
        Sift("orphans", drop_orphans),
        Sift("repeats", partial(merge_repeats, splits=LEARNING_SPLITS)),
        WriteShards(folder),
    ]


class ReadLogs(PipelineStep):
    """Yields one document per log line, held in memory only."""

    name = "read logs"
    type = "reader"

    def __init__(self, files: list[Path]) -> None:
        super().__init__()
        self.files = files

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Read all files in order."""
        for path in self.files:
            for place, line in read_lines(path):
                yield Document(text="", id=place, metadata={"line": line})


class Adapt(PipelineStep):
    """Turns lines into conversations."""

    name = "adapt"
    type = "adapter"

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the conversations of every line; count what was read and dropped."""
        for line in data or ():
            for call in self.adapter(line.metadata["line"], line.id):
                self.stat_update("read")
                if isinstance(call, Drop):
                    self.stat_update(f"dropped/{call.reason.value}")
                else:
                    yield _document(call)


class Sift(PipelineStep):
    """Hands all records to one function of the whole log and counts what it drops."""

    type = "sift"

    def __init__(self, name: str, work: Callable[[list[Conversation]], Sifted]) -> None:
        self.name = name
        super().__init__()
        self.work = work

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the records that the function keeps."""
        sifted = self.work([_conversation(document) for document in data or ()])
        for reason, count in sifted.dropped.items():
            self.stat_update(f"dropped/{reason.value}", value=count)
        for fact, count in sifted.facts.items():
            self.stat_update(f"{self.name}/{fact}", value=count)
        yield from map(_document, sifted.kept)


class WriteShards(PipelineStep):
    """Writes one shard per split; an empty split gives an empty shard."""

    name = "write shards"
    type = "writer"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write all records in the order in which they come."""
        records = [_conversation(document) for document in data or ()]
        assert all(record.privacy.scrubbed for record in records), "scrub runs before any write"
        for split in SPLITS:
            of_split = [record for record in records if record.split == split]
            num_rows = write_shard(_shard(self.folder, split), of_split)
            self.stat_update(f"rows/{split}", value=num_rows)
        yield from map(_document, records)


def _document(record: Conversation) -> Document:
    return Document(text="", id=record.id, metadata={"conversation": record})


def _conversation(document: Document) -> Conversation:
    return document.metadata["conversation"]


def _shard(folder: Path, split: str) -> Path:
    return folder / f"{split}-00000.jsonl.gz"


def _write_evaluation(folder: Path, name: str, prompts: list[Conversation]) -> int:
    for prompt in prompts:
        prompt.split = f"eval-{name}"
    return write_shard(_shard(folder, f"eval-{name}"), prompts)


def _drops(totals: Counter[str]) -> dict[DropReason, int]:
    return {reason: totals[f"dropped/{reason.value}"] for reason in DropReason}


def _check(totals: Counter[str], logs: Path, data: DataConfig) -> None:
    """Raise ValueError if the log gives too little to go on; the message holds counts only."""
    counts = all_reasons(_drops(totals))
    occurred = f"{totals['read']} calls read, dropped: {worst_first(counts)}"
    if not any(totals[f"rows/{split}"] for split in SPLITS):
        raise ValueError(
            f"data.logs (={logs}) has no usable line ({occurred}). It must hold OpenAI "
            'request/response pairs, one JSON object per line: {"request": ..., "response": ...}.'
        )
    # A merged repeat lives on in the weight of another record.
    counts[DropReason.duplicate.value] -= totals["repeats/merged"]
    for reason, count in counts.items():
        if count > data.max_drop_share * totals["read"]:
            raise ValueError(
                f"data.logs (={logs}) loses {count} of {totals['read']} calls as {reason}: more "
                f"than data.max_drop_share (={data.max_drop_share}). Repair the log, or raise it."
            )
    for split in SPLITS:
        if not totals[f"rows/{split}"]:
            share = "test_share and data.validation_share" if split == "train" else f"{split}_share"
            raise ValueError(
                f"data.{share} leave no record for the split {split} ({occurred}). "
                "Change the shares or give a log over a longer time."
            )


def _details(totals: Counter[str], num_files: int, eval_names: list[str]) -> dict[str, object]:
    """Give the facts behind the counts: repeats, redactions, sessions. Never a value."""
    redactions = {
        name.removeprefix("scrub/"): count
        for name, count in sorted(totals.items())
        if name.startswith("scrub/") and name != "scrub/records_touched"
    }
    return {
        "log_files": num_files,
        "merged_repeats": totals["repeats/merged"],
        "sessions": totals["splits/sessions"],
        "sessions_not_time_based": totals["splits/sessions_not_time_based"],
        "contaminated": {name: totals[f"decontaminate/{name}"] for name in eval_names},
        "privacy": {
            "policy": POLICY,
            "records_touched": totals["scrub/records_touched"],
            "redactions": redactions,
        },
    }
