from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dflash_train.features.mixed_rows import Mixture, Seen, mix_rows, unseen_places
from dflash_train.features.row_source import RowSource
from dflash_train.features.store import FeatureRow, FeatureStore
from dflash_train.features.target import Target
from tests.test_train.conftest import AnswerRows, WriteSplit

PROMPTS = [5, 7, 6, 9, 8, 5, 7, 6]


@pytest.fixture(scope="module")
def stores(
    tmp_path_factory: pytest.TempPathFactory,
    target32: Target,
    answer_rows: AnswerRows,
    write_split: WriteSplit,
) -> list[FeatureStore]:
    """Three stores of other rows: the run's own, and two of earlier runs."""
    folder = tmp_path_factory.mktemp("stores")
    return [
        write_split(folder / str(seed), answer_rows(target32, PROMPTS, seed=seed))
        for seed in range(3)
    ]


def every(source: RowSource) -> list[FeatureRow]:
    return source.read(range(len(source)))


def named(rows: Sequence[FeatureRow]) -> list[str]:
    return [row.id for row in rows]


def mixed(stores: list[FeatureStore], share: float, *, seed: int = 0) -> Mixture:
    own, *older = stores
    return mix_rows(own, older, share=share, seen=Seen.of(rows=[own]), seed=seed)


def answer_tokens(rows: Sequence[FeatureRow]) -> int:
    return sum(len(row.input_ids) - row.prompt_length for row in rows)


def test_replayed_rows_hold_their_share_of_the_answer_tokens(stores: list[FeatureStore]):
    for share in (0.1, 0.3, 0.5):
        mixture = mixed(stores, share)
        rows = every(mixture.rows)
        replayed = answer_tokens(rows[mixture.num_own :])
        assert replayed / answer_tokens(rows) == pytest.approx(mixture.share)
        one_row = max(map(len, (row.input_ids for row in rows)))
        assert share <= mixture.share <= share + one_row / answer_tokens(rows)


def test_own_rows_come_first_and_unchanged_and_nothing_is_replayed_at_no_share(
    stores: list[FeatureStore],
):
    mixture = mixed(stores, 0.5)
    assert named(every(mixture.rows))[: len(PROMPTS)] == named(every(stores[0]))
    nothing = mixed(stores, 0.0)
    assert (nothing.num_own, nothing.num_replayed, nothing.share) == (len(PROMPTS), 0, 0.0)


def test_a_mixed_split_reads_each_row_as_its_own_store_does(stores: list[FeatureStore]):
    rows = mixed(stores, 0.6).rows
    originals = {row.id: row for store in stores for row in every(store)}
    assert len(rows) == len(rows.lines) > len(PROMPTS)
    for position, row in enumerate(rows.read(range(len(rows)))):
        original = originals[row.id]
        assert torch.equal(row.features, original.features)
        assert torch.equal(row.input_ids, original.input_ids)
        assert rows.lines[position].id == row.id
        ids, mask = rows.read_tokens(position)
        assert torch.equal(ids, original.input_ids)
        assert torch.equal(mask, original.loss_mask)


def test_the_draw_follows_from_the_seed_and_not_from_the_order_of_runs(
    stores: list[FeatureStore],
):
    own, first, second = stores
    chosen = named(every(mixed(stores, 0.4).rows))
    assert named(every(mixed([own, second, first], 0.4).rows)) == chosen
    assert named(every(mixed(stores, 0.4, seed=1).rows)) != chosen


def test_few_older_rows_give_a_smaller_share_and_none_twice(stores: list[FeatureStore]):
    mixture = mixed(stores, 0.95)
    names = named(every(mixture.rows))
    assert mixture.num_replayed == 2 * len(PROMPTS)
    assert mixture.share < 0.95
    assert len(set(names)) == len(names)


def test_rows_and_conversations_of_the_held_out_windows_are_left_out(
    stores: list[FeatureStore],
):
    own, older, other = stores
    line = other.lines[3]
    seen = Seen(ids=frozenset({older.lines[2].id}), sessions=frozenset({line.session or ""}))
    kept = {source.lines[place].id for source, place in unseen_places([older, other], seen)}
    left_out = {each.id for each in (*older.lines, *other.lines)} - kept
    sessions = {each.id for each in (*older.lines, *other.lines) if each.session == line.session}
    assert left_out == {older.lines[2].id} | sessions
    mixture = mix_rows(own, [older, other], share=0.9, seen=seen, seed=0)
    assert mixture.num_left_out == len(left_out)
    assert left_out.isdisjoint(named(every(mixture.rows)))


def test_rows_without_a_session_are_told_apart_by_their_ids_alone(
    tmp_path: Path, stores: list[FeatureStore], write_split: WriteSplit
):
    lone = [replace(row, session=None) for row in every(stores[1])]
    store = write_split(tmp_path / "lone", lone)
    seen = Seen.of(rows=[], conversations=[write_split(tmp_path / "held", lone[:2])])
    kept = {source.lines[place].id for source, place in unseen_places([store], seen)}
    assert kept == {row.id for row in lone[2:]}
