"""The datatrove steps of the ingest stage, phase by phase; each is a loop around pure functions.

    read    a part of the log -> scrubbed records by bucket
    spread  buckets that would not fit in memory -> their chains in all other buckets
    chain   a bucket -> records with session, placeholders and split, and their index rows
    decide  all index rows -> what stays, weights, clusters
    write   a bucket and its decisions -> shards

Content is unscrubbed in memory up to `Scrub`, and on disk nowhere.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, time, timedelta
from datetime import date as Date
from itertools import chain
from typing import Any

import numpy as np
import orjson

from dflash_data.drops import Drop, DropReason
from dflash_data.executor import Document, Documents, Phase, PipelineStep
from dflash_data.ingest.decisions import (
    KEPT,
    SEEN,
    UNKNOWN,
    UNSEEN,
    Decided,
    decide,
    read_decisions,
)
from dflash_data.ingest.dedup import cluster
from dflash_data.ingest.explode import Sifted, bucket_of, by_session, drop_orphans, explode, instant
from dflash_data.ingest.on_policy import drop_reason, judge, names_no_model
from dflash_data.ingest.partitions import PartitionWriter, read_lines_of
from dflash_data.ingest.plan import IngestPlan
from dflash_data.ingest.record_arrays import index_records, load_bands, load_rows, save_rows
from dflash_data.ingest.splits import assign_splits, time_cuts
from dflash_data.ingest.spread import crowded_buckets, spread_bucket
from dflash_data.logs.sources import read_part
from dflash_data.privacy.scrub import has_secret_in_answer, name_placeholders, scrub_call
from dflash_data.privacy.text_of_ids import has_ids, hides_text
from dflash_data.record_index import index_line, write_index_part
from dflash_train.records.conversation import SPLITS, Conversation, write_lines
from dflash_train.records.manifest import write_bytes

_SEEN = {UNKNOWN: None, SEEN: True, UNSEEN: False}


def phases(plan: IngestPlan) -> list[Phase]:
    """List the five phases in order."""
    read = [ReadPart(plan), LeaveOut(plan), Judge(plan), Scrub(plan), WritePartition(plan)]
    chained = [
        ReadBucket(plan),
        Sift("explode", explode),
        Sift("placeholders", name_sessions),
        AssignSplits(plan),
        Sift("orphans", drop_orphans),
        WriteBucket(plan),
    ]
    return [
        Phase(name="read", steps=read, num_tasks=len(plan.parts)),
        Phase(name="spread", steps=[Spread(plan)], num_tasks=1),
        Phase(name="chain", steps=chained, num_tasks=plan.num_buckets),
        Phase(name="decide", steps=[Decide(plan)], num_tasks=1),
        Phase(name="write", steps=[WriteShards(plan)], num_tasks=plan.num_buckets),
    ]


class Step(PipelineStep):
    """A step that knows the plan and counts once per task."""

    def __init__(self, plan: IngestPlan) -> None:
        super().__init__()
        self.plan = plan

    def count(self, counts: dict[str, int] | Counter[str]) -> None:
        """Add counts to the statistics of the task."""
        for name, number in counts.items():
            self.stat_update(name, value=number)


class ReadPart(Step):
    """Yields the calls of one part of the log."""

    name = "read part"
    type = "reader"

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Count every call; drop what the adapter says is unusable."""
        part = self.plan.parts[rank]
        counts: Counter[str] = Counter()
        for call in read_part(part):
            counts["read"] += 1
            if isinstance(call, Drop):
                counts[f"dropped/{call.reason.value}"] += 1
            else:
                counts[f"source/{call.source}"] += 1
                yield _document(call)
        self.count(counts)


class LeaveOut(Step):
    """Drops the calls of excluded tenants, and those that are too old, before anything else."""

    name = "leave out"
    type = "filter"

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the calls that may be used."""
        pseudonyms, excluded = self.plan.pseudonyms(), self.plan.excluded
        oldest = oldest_moment(self.plan.data.retention_date, self.plan.data.max_age_days)
        counts: Counter[str] = Counter()
        for document in data or ():
            record = _conversation(document)
            if excluded and record.tenant is not None:
                if pseudonyms.hide("tenant", record.tenant) in excluded:
                    counts[_dropped(DropReason.excluded_tenant)] += 1
                    continue
            if oldest is not None and not is_fresh(record, oldest):
                counts[_dropped(DropReason.expired)] += 1
                continue
            yield document
        self.count(counts)


class Judge(Step):
    """Says of every answer whether the target wrote it."""

    name = "judge"
    type = "annotator"

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Set `on_policy` and its reason."""
        settings = self.plan.data
        counts: Counter[str] = Counter()
        for document in data or ():
            record = _conversation(document)
            judge(record, settings)
            counts["without_model"] += names_no_model(record)
            yield document
        self.count(counts)


class Scrub(Step):
    """Replaces what is private by marks, and drops secrets in answers."""

    name = "scrub"
    type = "scrubber"

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield scrubbed records that `on_policy` keeps."""
        pseudonyms, settings = self.plan.pseudonyms(), self.plan.data
        text_of_ids = self.plan.text_of_ids()
        counts: Counter[str] = Counter()
        for document in data or ():
            record = _conversation(document)
            reason = text_of_ids.reveal(record) if hides_text(record) else None
            if reason is not None:
                counts["undecoded"] += 1
                counts[_dropped(reason)] += 1
                continue
            came_with_ids = has_ids(record)
            by_role = scrub_call(record, pseudonyms)
            fate = text_of_ids.vet(record) if came_with_ids else None
            if by_role:
                counts["records_touched"] += 1
                counts.update({f"redacted/{name}": number for name, number in by_role.items()})
            reason = DropReason.secret_in_answer if has_secret_in_answer(by_role) else None
            reason = reason or drop_reason(record, settings)
            if reason is not None:
                counts[_dropped(reason)] += 1
                continue
            counts[f"policy/{record.on_policy_reason}"] += 1
            if fate is not None:
                counts[f"ids/{fate.value}"] += 1
            yield document
        self.count(counts)


class WritePartition(Step):
    """Appends scrubbed records to the buckets of this task's partition file."""

    name = "write partition"
    type = "writer"

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write all, and note the time range for the splits."""
        moments: list[float] = []
        with PartitionWriter(self.plan.partition(rank)) as partition:
            for document in data or ():
                record = _conversation(document)
                assert record.privacy.scrubbed, "scrub runs before any write"
                moment = instant(record)
                if moment is not None:
                    moments = [min([moment, *moments]), max([moment, *moments])]
                partition.add(bucket_of(record, self.plan.num_buckets), record.to_json())
        write_bytes(self.plan.moments(rank), orjson.dumps(moments))
        yield from ()


class Spread(Step):
    """Moves whole chains out of buckets that hold too much."""

    name = "spread"
    type = "writer"

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write a partition file for each crowded bucket; mostly there is none."""
        plan = self.plan
        paths = [plan.partition(number) for number in range(len(plan.parts))]
        for bucket in crowded_buckets(paths, plan.num_buckets):
            out = plan.spread(bucket)
            num_moved = spread_bucket(paths, bucket, out, num_buckets=plan.num_buckets)
            self.count({"crowded_buckets": 1, "moved_records": num_moved})
        yield from ()


class ReadBucket(Step):
    """Yields the records of one bucket from the partitions of all reading tasks."""

    name = "read bucket"
    type = "reader"

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield in the order of the lines' bytes, so that the order of files never matters."""
        for line in sorted(read_lines_of(self.plan.bucket_files(rank), rank)):
            yield _document(Conversation.from_json(line))


class Sift(PipelineStep):
    """Hands the records of a bucket to one function and counts what it drops."""

    type = "sift"

    def __init__(self, name: str, work: Callable[[list[Conversation]], Sifted]) -> None:
        self.name = name
        super().__init__()
        self.work = work

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the records that the function keeps."""
        yield from _sifted(self, self.work([_conversation(document) for document in data or ()]))


class AssignSplits(Step):
    """Sets the split of whole sessions by the time range of the whole log."""

    name = "splits"
    type = "sift"

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the records that do not straddle a cut."""
        paths = [self.plan.moments(number) for number in range(len(self.plan.parts))]
        moments = [moment for path in paths for moment in orjson.loads(path.read_bytes())]
        settings = self.plan.data
        records = [_conversation(document) for document in data or ()]
        yield from _sifted(self, assign_splits(records, time_cuts(moments, settings), settings))


class WriteBucket(Step):
    """Writes the records of a bucket back, and their index rows beside them."""

    name = "write bucket"
    type = "writer"

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write all records in the order in which they come."""
        records = [_conversation(document) for document in data or ()]
        with PartitionWriter(self.plan.chained(rank)) as partition:
            for record in records:
                partition.add(0, record.to_json())
        save_rows(self.plan.rows, rank, *index_records(records, self.plan.evaluation))
        yield from ()


class Decide(Step):
    """Decides on all records at once, from their index rows."""

    name = "decide"
    type = "dedup"

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write the decisions bucket by bucket."""
        plan = self.plan
        rows, sizes = load_rows(plan.rows, plan.num_buckets)
        # Records that ask the very same belong together even where their answers differ.
        bands = chain(load_bands(plan.rows, plan.num_buckets), [rows["context"]])
        decided = decide(rows, cluster(bands, len(rows)), plan.data, plan.evaluation.names)
        write_bytes(plan.facts, orjson.dumps(split_facts(rows, decided)))
        ends = np.cumsum(sizes)
        for bucket, part in enumerate(np.split(decided.decisions, ends[:-1])):
            write_bytes(plan.decided(bucket), part.tobytes())
        self.count({_dropped(reason): number for reason, number in decided.dropped.items()})
        self.count(decided.facts)
        yield from ()


class WriteShards(Step):
    """Applies the decisions on a bucket and writes its shards."""

    name = "write shards"
    type = "writer"

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write one shard per split that has records here; bucket 0 writes all three."""
        plan = self.plan
        decisions = read_decisions(plan.decided(rank))
        lines: dict[str, list[bytes]] = defaultdict(list)
        index: list[dict[str, Any]] = []
        for line, decision in zip(read_lines_of([plan.chained(rank)], 0), decisions, strict=True):
            if decision["reason"] != KEPT:
                continue
            fields = apply_decision(orjson.loads(line), decision)
            of_split = lines[fields["split"]]
            shard = shard_name(fields["split"], rank)
            index.append(index_line(fields, shard=shard, row=len(of_split)))
            of_split.append(orjson.dumps(fields))
        for split in SPLITS:
            if lines[split] or rank == 0:
                write_lines(plan.out / shard_name(split, rank), lines[split])
            self.stat_update(f"rows/{split}", value=len(lines[split]))
        write_index_part(plan.index_part(rank), index)
        yield from ()


def shard_name(split: str, bucket: int = 0) -> str:
    """Give the file name of a shard."""
    return f"{split}-{bucket:05d}.jsonl.gz"


def oldest_moment(retention_date: str | None, max_age_days: int | None) -> float | None:
    """Give the time before which calls are expired, in seconds since 1970; None if none are."""
    if retention_date is None or max_age_days is None:
        return None
    day = datetime.combine(Date.fromisoformat(retention_date), time(), UTC)
    return (day - timedelta(days=max_age_days)).timestamp()


def is_fresh(record: Conversation, oldest: float) -> bool:
    """Say whether a call is young enough; one without a time cannot show that it is."""
    moment = instant(record)
    return moment is not None and moment >= oldest


def name_sessions(records: list[Conversation]) -> Sifted:
    """Name the placeholders of each session from 1."""
    for session in by_session(records):
        name_placeholders(session)
    return Sifted(records)


def apply_decision(fields: dict[str, Any], decision: np.void) -> dict[str, Any]:
    """Give a record's JSON fields with what was decided on it."""
    fields["weight"] = int(decision["weight"])
    fields["cluster"] = f"c:{int(decision['cluster']):016x}" if decision["cluster"] else None
    fields["split"] = SPLITS[decision["split"]]
    fields["seen_in_train"] = _SEEN[int(decision["seen"])]
    return fields


def split_facts(rows: np.ndarray, decided: Decided) -> dict[str, dict[str, Any]]:
    """Count rows, sessions, tenants and the time range of each split."""
    decisions = decided.decisions
    facts: dict[str, dict[str, Any]] = {}
    for place, split in enumerate(SPLITS):
        mine = rows[(decisions["reason"] == KEPT) & (decisions["split"] == place)]
        moments = mine["moment"][np.isfinite(mine["moment"])]
        facts[split] = {
            "rows": len(mine),
            "sessions": len(np.unique(mine["session"])),
            "tenants": len(np.unique(mine["tenant"][mine["tenant"] != 0])),
            "first": _utc(moments.min()) if len(moments) else None,
            "last": _utc(moments.max()) if len(moments) else None,
        }
    is_unseen = decisions["seen"] == UNSEEN
    facts["test"]["unseen_rows"] = int(is_unseen.sum())
    return facts


def _utc(moment: float) -> str:
    return datetime.fromtimestamp(float(moment), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _sifted(step: PipelineStep, sifted: Sifted) -> Iterator[Document]:
    for reason, number in sifted.dropped.items():
        step.stat_update(_dropped(reason), value=number)
    for fact, number in sifted.facts.items():
        step.stat_update(fact, value=number)
    yield from map(_document, sifted.kept)


def _dropped(reason: DropReason) -> str:
    return f"dropped/{reason.value}"


def _document(record: Conversation) -> Document:
    return Document(text="", id=record.id, metadata={"conversation": record})


def _conversation(document: Document) -> Conversation:
    return document.metadata["conversation"]
