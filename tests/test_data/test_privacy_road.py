"""`make bench-privacy` in small: a log with private values through the real command line."""

from pathlib import Path

import pytest

from benchmarks.bench_privacy import expect, scored_goals, searched_goals
from benchmarks.byte_search import ByteSearch
from benchmarks.privacy_log import write_logs
from benchmarks.privacy_road import finds_controls, walk_road
from tests.test_data.privacy_corpus import Sample, make_corpus, score

SEED, NUM_PLANTS = 4, 320
UNKNOWN = [f"ana {number} (at) example (dot) org" for number in range(40)]
"""Addresses as the scrubber is known not to find them."""


def missed(value: str) -> Sample:
    text = f"Write to {value}, please."
    return Sample(text, text.index(value), text.index(value) + len(value), "EMAIL", True)


def test_a_byte_search_finds_exactly_what_the_scrubber_missed(tmp_path: Path):
    samples = [*make_corpus(NUM_PLANTS, seed=SEED), *map(missed, UNKNOWN)]
    total = score(iter(samples))
    expected = expect(samples, total)
    assert set(UNKNOWN) <= expected.left
    words = write_logs(tmp_path / "logs", samples, seed=SEED)
    search = ByteSearch({*expected.searched, *words.values()})
    road = walk_road(tmp_path / "logs", tmp_path / "searched", search, workers=1)
    assert set(road.found.values) == expected.left | set(words.values())
    assert set(road.killed.values) == set(road.found.values)
    assert road.counts["dropped"]["unparsable"] > 0
    assert road.counts["dropped"]["secret_in_answer"] > 0
    controls = finds_controls(tmp_path / "control")
    goals = searched_goals(expected, road, words, has_controls=controls)
    assert [name for name, goal in goals.items() if not goal["met"]] == []
    recall = scored_goals(total, NUM_PLANTS)["recall/EMAIL"]
    assert not recall["met"]
    said = "".join(path.read_text() for path in (tmp_path / "searched" / "said").iterdir())
    for reason in ("Traceback", "data.max_drop_share (=0.0001)"):
        assert reason in said
    assert not search.find(said.encode())


def test_a_leak_is_a_missed_goal(tmp_path: Path):
    samples = list(make_corpus(64, seed=SEED))
    expected = expect(samples, score(iter(samples)))
    (tmp_path / "leak.txt").write_text(next(s.value for s in samples if s.is_private))
    assert expected.left == frozenset()
    leak = ByteSearch(expected.searched).find((tmp_path / "leak.txt").read_bytes())
    assert len(leak) == 1


@pytest.fixture(autouse=True)
def _no_key_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DFLASH_HMAC_KEY", raising=False)
