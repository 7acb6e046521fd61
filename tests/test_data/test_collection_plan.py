from pathlib import Path

import pytest

from dflash_data.collect.plan import (
    CollectionPlan,
    RenderedCall,
    ShardLimits,
    make_plan,
    open_plan,
    pack_shards,
    share_prefixes,
)
from dflash_train.features.store import IndexLine
from dflash_train.records.manifest import Counts

LIMITS = ShardLimits(batch_size=2, token_bytes=10, shard_bytes=400)


def call(name: str, prompt: str, answer: str, *, session: str | None = "s") -> RenderedCall:
    """A call whose tokens are the codes of its characters."""
    line = IndexLine(
        id=name,
        tenant=None,
        session=session,
        shard="",
        row=-1,
        num_tokens=len(prompt + answer),
        prompt_length=len(prompt),
        max_length=99,
        finish_reason="stop",
        weight=1,
    )
    mask = [place >= len(prompt) for place in range(line.num_tokens)]
    return RenderedCall(line=line, input_ids=[*map(ord, prompt + answer)], loss_mask=mask)


CONVERSATION = [
    call("a0", "hi", "AB"),
    call("a1", "hiABmore", "CD"),
    call("a2", "hiABmoreCDlast", "E"),
]


def make(folder: Path, calls: list[RenderedCall], *, key: str = "k") -> CollectionPlan:
    counts = Counts(read=len(calls), kept=len(calls))
    return make_plan(folder, [calls], counts=counts, key=key, limits=LIMITS)


def ids_of(calls: list[RenderedCall]) -> list[list[str]]:
    return sorted([line.id for line in row.lines] for row in share_prefixes(calls))


def test_the_last_call_of_a_session_serves_the_earlier_ones():
    (row,) = share_prefixes(CONVERSATION)
    assert [line.id for line in row.lines] == ["a2", "a1", "a0"]
    assert row.input_ids == CONVERSATION[2].input_ids
    supervised = "".join(chr(i) for i, m in zip(row.input_ids, row.loss_mask, strict=True) if m)
    assert supervised == "ABCDE"
    assert row.prompt_length == 2


def test_tokens_masked_in_an_earlier_answer_stay_masked():
    calls = [call("a0", "hi", "AB"), call("a1", "hiABmore", "CD")]
    calls[0].loss_mask[3] = False
    (row,) = share_prefixes(calls)
    assert [place for place, written in enumerate(row.loss_mask) if written] == [2, 8, 9]
    assert calls[1].loss_mask == [False] * 8 + [True] * 2


@pytest.mark.parametrize(
    ("other", "rows"),
    [
        (call("b", "hi", "AX"), [["a1", "a0"], ["b"]]),  # a retry that nothing continues
        (call("b", "hiABmore", "CD"), [["a1", "a0"], ["b"]]),  # the same call again
        (call("b", "hiABm", "or"), [["a1", "b", "a0"]]),  # another end of the same prompt
        (call("b", "hiA", "Bm"), [["a0"], ["a1", "b"]]),  # answers that overlap
        (call("b", "hi", "AB", session="t"), [["a1", "a0"], ["b"]]),
        (call("b", "hi", "AB", session=None), [["a1", "a0"], ["b"]]),
    ],
    ids=["retry", "again", "inside", "overlap", "other session", "no session"],
)
def test_rows_are_shared_only_by_calls_that_continue_one_another(
    other: RenderedCall, rows: list[list[str]]
):
    assert ids_of([*CONVERSATION[:2], other]) == rows


def test_calls_without_a_session_stand_alone():
    calls = [call(name, "hi", "AB" * (1 + place), session=None) for place, name in enumerate("ab")]
    assert ids_of(calls) == [["a"], ["b"]]


def test_shards_and_batches_are_bounded_and_hold_every_row_once():
    rows = [(length, f"id-{length}") for length in (9, 3, 30, 12, 7, 55, 3, 8, 11)]
    shards = pack_shards(rows, LIMITS)
    batches = [batch for shard in shards for batch in shard.batches]
    places = [place for batch in batches for place in batch]
    assert sorted(places) == list(range(len(rows)))
    assert [rows[place][0] for place in places] == sorted(length for length, _id in rows)
    assert all(1 <= len(batch) <= 2 for batch in batches)
    for shard in shards:
        members = [rows[place][0] for batch in shard.batches for place in batch]
        assert shard.num_tokens == sum(members)
        assert shard.num_bytes == 10 * sum(members) + 8 * (len(members) + 1)
        assert shard.num_bytes <= 400 or len(members) == 1
    assert len({shard.name for shard in shards}) == len(shards) > 2


def test_a_stored_plan_comes_back_and_another_key_does_not(tmp_path: Path):
    calls = [*CONVERSATION, call("b0", "ho", "X", session="t")]
    made = make(tmp_path / "plan", calls)
    read = open_plan(tmp_path / "plan", key="k")
    assert read is not None
    assert (read.shards, read.counts) == (made.shards, made.counts)
    assert open_plan(tmp_path / "plan", key="other") is None
    assert open_plan(tmp_path / "none", key="k") is None
    (batch,) = read.shards[0].batches
    short, long = read.read_rows(batch)
    assert short.input_ids == calls[3].input_ids
    assert long.input_ids == CONVERSATION[2].input_ids
    assert (short.prompt_length, long.prompt_length) == (2, 2)
    lines = [(line.id, line.row, line.num_tokens) for line in read.read_lines()]
    assert lines == [("b0", 0, 3), ("a0", 1, 4), ("a1", 1, 10), ("a2", 1, 15)]


def test_a_plan_is_a_function_of_the_calls_and_not_of_their_order(tmp_path: Path):
    calls = [*CONVERSATION, *(call(f"{n}", "x" * n, "Y", session=None) for n in range(1, 9))]
    one, other = make(tmp_path / "one", calls), make(tmp_path / "other", calls[::-1])
    assert [line for line in one.read_lines()] == [line for line in other.read_lines()]
    for shard, twin in zip(one.shards, other.shards, strict=True):
        for batch, twins in zip(shard.batches, twin.batches, strict=True):
            assert one.read_rows(batch) == other.read_rows(twins)


def test_a_damaged_plan_is_named(tmp_path: Path):
    make(tmp_path / "plan", CONVERSATION)
    for path in sorted((tmp_path / "plan").iterdir()):
        sound = path.read_bytes()
        path.write_bytes(sound[:-5] + bytes([sound[-5] ^ 1]) + sound[-4:])
        with pytest.raises(ValueError, match=path.name):
            open_plan(tmp_path / "plan", key="k")
        path.write_bytes(sound)


def test_nothing_to_plan_is_a_plan_without_shards(tmp_path: Path):
    plan = make(tmp_path / "plan", [])
    assert plan.shards == []
    assert plan.read_lines() == []
