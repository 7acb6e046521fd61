from dflash_data.drops import DropReason
from dflash_data.ingest.explode import (
    bucket_of,
    by_session,
    drop_orphans,
    explode,
    is_chained,
    prefix_key,
)
from dflash_train.records.conversation import Conversation, Turn


def call(
    name: str,
    *contents: str | None,
    at: int = 0,
    session: str | None = None,
    answer: str | None = None,
    on_policy: bool = False,
    split: str | None = "train",
) -> Conversation:
    turns = [
        Turn(role="assistant" if index % 2 else "user", content=content)
        for index, content in enumerate(contents)
    ]
    if answer is not None:
        turns.append(Turn(role="assistant", content=answer))
    return Conversation(
        id=name, source="openai", messages=turns, session=session, tenant="acme", split=split,
        ts=f"2026-10-01T00:{at:02d}:00Z", turn=len(contents) // 2, on_policy=on_policy,
    )  # fmt: skip


def ids(records: list[Conversation]) -> list[str]:
    return [record.id for record in records]


def test_line_logged_twice_is_kept_once():
    sifted = explode([call("b", "Q", at=2), call("a", "Q", at=1), call("b", "Q", at=2)])
    assert ids(sifted.kept) == ["a", "b"]
    assert sifted.dropped == {DropReason.duplicate: 1}


def test_calls_that_repeat_a_history_join_its_session():
    calls = [
        call("a0", "A", at=1),
        call("b0", "B", at=2),
        call("a1", "A", None, "more", at=3),
        call("b1", "B", "an answer", "more", at=4),
        call("a2", "A", None, "more", None, "end", at=5),
        call("c1", "C", None, "more", at=6),
    ]
    sessions = {record.id: record.session for record in explode(calls).kept}
    assert sessions["a0"] == sessions["a1"] == sessions["a2"]
    assert sessions["b0"] == sessions["b1"]
    assert len({sessions["a0"], sessions["b0"], sessions["c1"]}) == 3


def test_two_users_with_the_same_opener_are_told_apart():
    calls = [
        call("a0", "A", at=1),
        call("b0", "A", at=2),
        call("x1", "A", None, "this", at=3),
        call("y1", "A", None, "that", at=4),
    ]
    sessions = {record.id: record.session for record in explode(calls).kept}
    assert {sessions["x1"], sessions["y1"]} == {sessions["a0"], sessions["b0"]}


def test_logged_sessions_are_believed():
    kept = explode([call("a", "A", session="s"), call("b", "A", None, "B", session="t")]).kept
    assert [record.session for record in kept] == ["s", "t"]


def test_history_that_nobody_can_write_is_dropped_with_all_that_follows():
    records = [
        call("a0", "A", session="s"),
        call("a1", "A", None, "B", session="s"),
        call("lost1", "C", None, "D", session="t"),
        call("lost2", "C", None, "D", None, "E", session="t"),
        call("logged", "C", "an answer", "D", session="u"),
        call("foreign", "A", None, "B", session="v"),
    ]
    sifted = drop_orphans(records)
    assert sorted(ids(sifted.kept)) == ["a0", "a1", "logged"]
    assert sifted.dropped == {DropReason.content_missing: 3}


def test_every_place_to_fill_has_its_prompt_in_the_same_session():
    records = [call("a0", "A", session="s"), call("a1", "A", None, "B", session="s")]
    kept = drop_orphans(records).kept
    assert prefix_key(kept[1].messages[:1], kept[1]) == prefix_key(kept[0].prompt, kept[0])


def test_buckets_hold_whole_sessions_and_whole_chains():
    chain = [call("a0", "A"), call("a1", "A", None, "more"), call("a2", "A", "x", "B", None, "C")]
    assert len({bucket_of(record, 1000) for record in chain}) == 1
    session = [call("b0", "B", session="s"), call("b1", "other", session="s")]
    assert len({bucket_of(record, 1000) for record in session}) == 1
    spread = {bucket_of(call(str(n), str(n)), 7) for n in range(200)}
    assert spread == set(range(7))


def test_a_session_found_by_its_history_is_told_from_a_logged_one():
    kept = explode([call("a", "A"), call("b", "A", None, "B", at=1), call("c", "C", session="s")])
    assert [is_chained(session) for session in by_session(kept.kept)] == [True, False]
