import gzip
import json
from collections import defaultdict
from functools import partial
from pathlib import Path

import orjson
import pytest

import dflash_data.ingest.plan
import dflash_data.ingest.spread
import dflash_data.ingest.stage
from dflash_data.ingest.explode import explode
from dflash_data.ingest.partitions import PartitionWriter, read_lines_of
from dflash_data.ingest.spread import crowded_buckets, spread_bucket
from dflash_data.ingest.stage import ingest
from dflash_data.logs.sources import plan_parts
from dflash_data.privacy.pseudonyms import KEY_FILE_NAME
from dflash_train.config import DataConfig, RecipeConfig
from dflash_train.records.conversation import SPLITS, Conversation, Turn
from dflash_train.records.manifest import Manifest, content_hash

NUM_BUCKETS = 7


def call(number: int, *texts: str, session: str | None = None) -> Conversation:
    """Give a call whose turns alternate, the user's first and last."""
    roles = ("user", "assistant")
    return Conversation(
        id=content_hash(number),
        source="openai",
        tenant="h:1",
        session=session,
        ts=f"2026-10-14T08:{number // 60 % 60:02d}:{number % 60:02d}Z",
        messages=[Turn(role=roles[place % 2], content=text) for place, text in enumerate(texts)],
    )


def crowd() -> list[Conversation]:
    """Give calls that open alike: repeats, chains of up to three calls, named sessions, doubles."""
    calls: list[Conversation] = []
    for number in range(0, 300, 5):
        calls.append(call(number, "hello"))
        if number % 2:
            calls.append(call(number + 1, "hello", "Hi!", f"Is bay {number % 9} free?"))
        if number % 3 == 0:
            calls.append(
                call(number + 2, "hello", "Hi!", f"Is bay {number % 9} free?", "Yes.", "Since?")
            )
        if number % 25 == 0:
            calls += [call(number + 3, "hello", session="h:named"), call(number, "hello")]
    return calls


def sessions_of(calls: list[Conversation]) -> dict[str, str | None]:
    return {record.id: record.session for record in explode(calls).kept}


def written(path: Path, calls: list[Conversation]) -> Path:
    with PartitionWriter(path) as partition:
        for record in calls:
            partition.add(3, record.to_json())
    return path


def test_spreading_keeps_every_chain_whole_and_as_it_would_have_been(tmp_path: Path):
    paths = [
        written(tmp_path / "0.zst", crowd()[::2]),
        written(tmp_path / "1.zst", crowd()[1::2]),
    ]
    out = tmp_path / "spread.zst"
    num_moved = spread_bucket(paths, 3, out, num_buckets=NUM_BUCKETS)
    found: dict[str, str | None] = {}
    buckets = defaultdict(set)
    num_lines = 0
    for bucket in range(NUM_BUCKETS):
        records = [Conversation.from_json(line) for line in read_lines_of([out], bucket)]
        num_lines += len(records)
        found |= sessions_of(records)
        for record in records:
            buckets[record.session].add(bucket)
    assert found == sessions_of(crowd())
    assert len(set(found.values())) > 20
    assert num_lines == len(crowd())
    assert all(len(places) == 1 for places in buckets.values())
    assert len(set.union(*buckets.values())) == NUM_BUCKETS
    assert buckets["h:named"] == {3}
    assert num_moved > 50


def test_order_of_files_does_not_change_where_a_record_goes(tmp_path: Path):
    spreads: list[list[list[bytes]]] = []
    for name, calls in (("a", crowd()), ("b", crowd()[::-1])):
        path = written(tmp_path / f"{name}.zst", calls)
        out = tmp_path / f"{name}-spread.zst"
        spread_bucket([path], 3, out, num_buckets=NUM_BUCKETS)
        spreads.append([sorted(read_lines_of([out], bucket)) for bucket in range(NUM_BUCKETS)])
    assert spreads[0] == spreads[1]


def test_only_a_bucket_beyond_the_limit_is_crowded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = [written(tmp_path / f"{n}.zst", [call(n, "hello")]) for n in range(2)]
    size = len(call(0, "hello").to_json()) * 2
    for limit, crowded in ((size, []), (size - 1, [3])):
        monkeypatch.setattr(dflash_data.ingest.spread, "CROWDED_BYTES", limit)
        assert crowded_buckets(paths, NUM_BUCKETS) == crowded
    assert crowded_buckets(paths, 1) == []


def pair(number: int, content: str) -> bytes:
    request = {"messages": [{"role": "user", "content": content}], "user": "acme"}
    fields = {"id": f"r{number}", "created": 1_792_000_000 + 600 * number}
    return json.dumps({**fields, "request": request, "response": None}).encode()


def lines_of(folder: Path) -> list[bytes]:
    shards = [*folder.glob("train-*.gz"), *folder.glob("valid*.gz"), *folder.glob("test-*.gz")]
    return sorted(line for path in shards for line in gzip.open(path).read().splitlines())


def test_a_crowded_log_gives_the_records_of_an_uncrowded_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One question makes up two thirds of the log; no task may hold all of it."""
    log = tmp_path / "calls.jsonl"
    questions = ["Is bay 4 free?" if n % 3 else f"What of item {n * 7919}?" for n in range(240)]
    log.write_bytes(b"\n".join(pair(n, text) for n, text in enumerate(questions)))
    monkeypatch.setattr(
        dflash_data.ingest.stage, "plan_parts", partial(plan_parts, part_bytes=9_000)
    )
    monkeypatch.setattr(dflash_data.ingest.plan, "BUCKET_BYTES", 6_000)
    kept: list[list[bytes]] = []
    for workers, limit in ((1, 1 << 30), (2, 24_000)):
        monkeypatch.setattr(dflash_data.ingest.spread, "CROWDED_BYTES", limit)
        config = RecipeConfig(
            name="run",
            runs_dir=str(tmp_path / str(limit)),
            data=DataConfig(test_share=0.3, validation_share=0.2),
        )
        config.executor.workers = workers
        config.run_dir.mkdir(parents=True)
        (config.run_dir / KEY_FILE_NAME).write_text("the same key for both of them")
        ingest(config, log, evaluation={}, manifest=Manifest(stage="i", recipe_hash="sha256:0"))
        folder = config.run_dir / "conversations"
        kept.append(lines_of(folder))
        held = [line for path in folder.glob("test-*.gz") for line in gzip.open(path)]
        repeats = [line for line in held if b"bay 4" in line]
        assert len(repeats) == 48
        shards = [gzip.open(path).read().count(b"bay 4") for path in folder.glob("test-*.gz")]
        assert (max(shards) == 48) == (limit == 1 << 30)
    assert kept[0] == kept[1]
    assert {orjson.loads(line)["split"] for line in kept[0]} == set(SPLITS)
