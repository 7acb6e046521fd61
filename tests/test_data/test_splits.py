from collections import defaultdict

import pytest

from dflash_data.drops import DropReason
from dflash_data.ingest.explode import explode, instant
from dflash_data.ingest.splits import assign_splits, time_cuts
from dflash_train.config import DataConfig
from dflash_train.records.conversation import Conversation, Turn

DATA = DataConfig(test_share=0.2, validation_share=0.1)


def call(name: str, day: int | None, session: str | None) -> Conversation:
    return Conversation(
        id=name, source="openai", messages=[Turn(role="user", content=f"Q{name}")], session=session,
        ts=None if day is None else f"2026-10-{day:02d}T00:00:00Z",
    )  # fmt: skip


def moments(records: list[Conversation]) -> list[float]:
    return [moment for record in records if (moment := instant(record)) is not None]


def split(records: list[Conversation], data: DataConfig = DATA) -> dict[str, str | None]:
    sifted = assign_splits(records, time_cuts(moments(records), data), data)
    return {record.id: record.split for record in sifted.kept}


def test_newest_window_is_test_and_the_one_before_validates():
    records = [call(str(day), day, str(day)) for day in range(1, 22)]
    splits = split(records)
    assert [splits[str(day)] for day in (1, 14, 15, 16, 17, 21)] == [
        "train", "train", "validation", "validation", "test", "test",
    ]  # fmt: skip


def test_windows_in_days_override_the_shares():
    records = [call(str(day), day, str(day)) for day in range(1, 22)]
    splits = split(records, DataConfig(test_days=2, validation_days=5))
    assert [splits[str(day)] for day in (13, 14, 18, 19, 21)] == [
        "train", "validation", "validation", "test", "test",
    ]  # fmt: skip


def test_session_across_a_cut_keeps_only_its_calls_before_it():
    records = [call(str(day), day, str(day)) for day in range(1, 22)]
    records += [call("s0", 13, "s"), call("s1", 14, "s"), call("s2", 15, "s"), call("s3", 20, "s")]
    sifted = assign_splits(records, time_cuts(moments(records), DATA), DATA)
    kept = [record for record in sifted.kept if record.session == "s"]
    assert [(record.id, record.split) for record in kept] == [("s0", "train"), ("s1", "train")]
    assert sifted.dropped == {DropReason.straddles_cut: 2}


@pytest.mark.parametrize("day", [None, 3])
def test_without_a_time_range_sessions_are_hashed_whole(day: int | None):
    records = [
        call(f"{session}-{turn}", day, str(session)) for session in range(400) for turn in (0, 1)
    ]
    sifted = assign_splits(records, time_cuts(moments(records), DATA), DATA)
    by_session = defaultdict(set)
    for record in sifted.kept:
        by_session[record.session].add(record.split)
    assert all(len(splits) == 1 for splits in by_session.values())
    sizes = [
        sum(splits == {name} for splits in by_session.values()) for name in ("test", "validation")
    ]
    assert sizes == pytest.approx([80, 40], abs=20)
    assert sifted.facts["sessions_not_time_based"] == 400


def test_without_time_and_session_the_cluster_will_decide():
    records = explode([call("a", None, None), call("b", None, "b")]).kept
    splits = split(records)
    assert splits["a"] is None
    assert splits["b"] is not None


def test_call_without_a_time_follows_its_session():
    records = [call("a", 1, "a"), call("b", 21, "b"), call("c", None, "b")]
    assert split(records) == {"a": "train", "b": "test", "c": "test"}
