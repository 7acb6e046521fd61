import numpy as np
import pytest

from dflash_data.drops import DropReason
from dflash_data.ingest.decisions import DECISION, KEPT, REASONS, SEEN, UNSEEN, Decided, decide
from dflash_data.ingest.decontaminate import EvaluationText
from dflash_data.ingest.explode import drop_orphans
from dflash_data.ingest.record_arrays import ROW, index_records
from dflash_train.config import DataConfig
from dflash_train.records.conversation import SPLITS, Conversation, Turn

NOTHING = EvaluationText({})


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
        id=name, source="openai", messages=turns, session=session or name, tenant="acme",
        split=split, ts=f"2026-10-01T00:{at:02d}:00Z", turn=len(contents) // 2,
        on_policy=on_policy,
    )  # fmt: skip


def decided_on(
    records: list[Conversation],
    *,
    clusters: list[int] | None = None,
    evaluation: EvaluationText = NOTHING,
    **limits: int,
) -> Decided:
    rows, _ = index_records(records, evaluation)
    root = np.array(list(range(len(records))) if clusters is None else clusters, dtype=np.int64)
    data = DataConfig(**limits)  # type: ignore[arg-type]
    return decide(rows, root, data, evaluation.names)


def kept(records: list[Conversation], decided: Decided) -> dict[str, int]:
    """Give the weights of the kept records by id."""
    pairs = zip(records, decided.decisions, strict=True)
    return {record.id: int(one["weight"]) for record, one in pairs if one["reason"] == KEPT}


def test_repeats_merge_into_the_first_and_add_to_its_weight():
    records = [call(name, "Q", at=at) for at, name in enumerate("cab")]
    decided = decided_on(records)
    assert kept(records, decided) == {"c": 3}
    assert decided.dropped[DropReason.duplicate] == 2
    assert decided.facts["merged_repeats"] == 2


def test_repeats_that_differ_in_case_and_space_merge_too():
    records = [call("a", "Is bay 4 free?", at=1), call("b", "is  bay 4 FREE?", at=2)]
    assert kept(records, decided_on(records)) == {"a": 2}


def test_repeats_never_merge_across_splits_and_never_in_test():
    records = [
        call("a", "Q", at=1),
        call("b", "Q", at=2, split="validation"),
        call("c", "Q", at=3, split="test"),
        call("d", "Q", at=4, split="test"),
    ]
    assert kept(records, decided_on(records)) == {"a": 1, "b": 1, "c": 1, "d": 1}


def test_repeated_opener_stays_where_later_turns_build_on_it():
    records = [
        call("a0", "Q", at=1, session="a"),
        call("b0", "Q", at=2, session="b"),
        call("b1", "Q", None, "and?", at=3, session="b"),
        call("c0", "Q", at=4, session="c"),
        call("c1", "Q", None, "and?", at=5, session="c"),
    ]
    weights = kept(records, decided_on(records))
    assert weights == {"b0": 3, "b1": 2}
    left = [record for record in records if record.id in weights]
    assert len(drop_orphans(left).kept) == 2


def test_long_histories_keep_every_turn_that_they_build_on():
    session = ["Q0"]
    records = [call("s0", *session, session="s")]
    for turn in range(1, 6):
        session += [None, f"Q{turn}"]  # type: ignore[list-item]
        records.append(call(f"s{turn}", *session, at=turn, session="s"))
    records += [call("t0", "Q0", at=10, session="t"), call("t1", "Q0", None, "Q1", at=11)]
    weights = kept(records, decided_on(records, max_per_cluster=1, clusters=[0] * len(records)))
    assert set(weights) == {f"s{turn}" for turn in range(6)}
    assert sum(weights.values()) == len(records)


def test_only_answers_of_the_target_itself_count_as_different():
    rewritten = [call("a", "Q", at=1, answer="x"), call("b", "Q", at=2, answer="y")]
    assert kept(rewritten, decided_on(rewritten)) == {"a": 2}
    own = [call(str(at), "Q", at=at, answer=str(at % 6), on_policy=True) for at in range(8)]
    decided = decided_on(own, max_answers_per_prefix=4)
    assert kept(own, decided) == {"0": 2, "1": 2, "2": 1, "3": 1}
    assert decided.dropped[DropReason.duplicate] == 4
    assert decided.facts["merged_repeats"] == 2
    assert len(kept(own, decided_on(own, max_answers_per_prefix=6))) == 6


def test_clusters_are_capped_in_train_and_validation_and_never_in_test():
    records = [
        call(f"{split}{number}", f"{split} {number}", at=number, split=split)
        for split in SPLITS
        for number in range(5)
    ]
    decided = decided_on(records, clusters=[0] * 15, max_per_cluster=3)
    weights = kept(records, decided)
    assert decided.dropped[DropReason.cluster_cap] == 4
    assert weights["train0"] == weights["validation0"] == 3
    assert [name for name in weights if name.startswith("train")] == ["train0", "train1", "train2"]
    assert sum(name.startswith("test") for name in weights) == 5


def test_weights_of_all_that_is_removed_add_up():
    random = np.random.default_rng(5)
    records = [
        call(str(n), f"Q{random.integers(12)}", at=n % 60, split=SPLITS[n % 2]) for n in range(200)
    ]
    clusters = [next(j for j in range(200) if j % 10 == n % 10) for n in range(200)]
    decided = decided_on(records, clusters=clusters, max_per_cluster=2)
    assert sum(kept(records, decided).values()) == 200


def test_cluster_is_named_by_its_smallest_id_whatever_the_order():
    records = [call(name, f"Q{name}") for name in "abcd"]
    one = decided_on(records, clusters=[0, 0, 0, 3]).decisions["cluster"]
    other = decided_on(records[::-1], clusters=[0, 1, 1, 1]).decisions["cluster"]
    assert one[0] == one[1] == one[2] != 0
    assert one[3] == 0
    assert one.tolist() == other[::-1].tolist()


def test_contaminated_records_go_from_learning_splits_and_are_counted_by_set():
    leaked = "Write a haiku please"
    text = EvaluationText({"tasks": [call("e", leaked)], "other": [call("f", "nothing")]})
    records = [call(split, leaked, split=split) for split in SPLITS]
    decided = decided_on(records, evaluation=text)
    assert kept(records, decided) == {"test": 1}
    assert decided.dropped[DropReason.contaminated] == 2
    assert (decided.facts["contaminated/tasks"], decided.facts["contaminated/other"]) == (2, 0)


def test_a_test_session_is_seen_if_any_of_its_records_resembles_a_kept_training_record():
    records = [
        call("train", "A"),
        call("gone", "leaked text"),
        call("s0", "B", session="s", split="test"),
        call("s1", "A2", session="s", at=1, split="test"),
        call("u0", "C", session="u", split="test"),
        call("v0", "leaked", session="v", split="test"),
    ]
    text = EvaluationText({"tasks": [call("e", "leaked text")]})
    decided = decided_on(records, clusters=[0, 1, 2, 0, 4, 1], evaluation=text)
    assert decided.decisions["seen"].tolist() == [0, 0, SEEN, SEEN, UNSEEN, UNSEEN]


def test_without_time_and_session_whole_clusters_and_chains_share_a_split():
    records = [call(str(n), f"Q{n}", session=f"s{n // 2}", split=None) for n in range(400)]
    clusters = [n - 1 if n % 4 == 2 else n for n in range(400)]  # joins every two sessions
    split = decided_on(records, clusters=clusters).decisions["split"]
    for group in range(0, 400, 4):
        assert len(set(split[group : group + 4].tolist())) == 1
    assert set(split.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("size", [0, 1])
def test_few_records_are_no_special_case(size: int):
    records = [call("a", "Q", split=None)][:size]
    decided = decided_on(records)
    assert len(decided.decisions) == size
    assert decided.dropped == dict.fromkeys(REASONS, 0)


def test_a_record_takes_less_than_200_bytes():
    assert ROW.itemsize + DECISION.itemsize + 4 * 8 + 3 * 8 <= 200
