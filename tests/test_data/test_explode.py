from dflash_data.drops import DropReason
from dflash_data.explode import drop_orphans, explode, merge_repeats, prefix_key
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


def test_repeats_merge_into_the_first_and_add_to_its_weight():
    records = [call(name, "Q", at=at, session=name) for at, name in enumerate("cab")]
    sifted = merge_repeats(records, ("train",))
    assert [(record.id, record.weight) for record in sifted.kept] == [("c", 3)]
    assert sifted.dropped == {DropReason.duplicate: 2}
    assert sifted.facts["merged"] == 2


def test_repeats_never_merge_across_splits_and_never_in_test():
    records = [
        call("a", "Q", at=1),
        call("b", "Q", at=2, split="validation"),
        call("c", "Q", at=3, split="test"),
        call("d", "Q", at=4, split="test"),
    ]
    sifted = merge_repeats(records, ("train", "validation"))
    assert [(record.id, record.weight) for record in sifted.kept] == [
        ("a", 1), ("b", 1), ("c", 1), ("d", 1),
    ]  # fmt: skip


def test_repeated_opener_stays_where_later_turns_build_on_it():
    records = [
        call("a0", "Q", at=1, session="a"),
        call("b0", "Q", at=2, session="b"),
        call("b1", "Q", None, "and?", at=3, session="b"),
        call("c0", "Q", at=4, session="c"),
        call("c1", "Q", None, "and?", at=5, session="c"),
    ]
    sifted = merge_repeats(records, ("train",))
    assert [(record.id, record.weight) for record in sifted.kept] == [("b0", 3), ("b1", 2)]
    assert ids(drop_orphans(sifted.kept).kept) == ["b0", "b1"]


def test_only_answers_of_the_target_itself_count_as_different():
    rewritten = [call("a", "Q", at=1, answer="x"), call("b", "Q", at=2, answer="y")]
    assert ids(merge_repeats(rewritten, ("train",)).kept) == ["a"]
    own = [
        call(str(at), "Q", at=at, answer=str(at % 6), on_policy=True, session=str(at))
        for at in range(8)
    ]
    sifted = merge_repeats(own, ("train",))
    assert [(record.id, record.weight) for record in sifted.kept] == [
        ("0", 2), ("1", 2), ("2", 1), ("3", 1),
    ]  # fmt: skip
    assert sifted.dropped == {DropReason.duplicate: 4}
    assert sifted.facts["merged"] == 2
