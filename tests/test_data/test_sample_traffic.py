import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from dflash_data.sample_traffic.fleet import (
    DAY_S,
    EPOCH,
    NUM_DAYS,
    play_fleet,
    write_sample_traffic,
)
from dflash_data.sample_traffic.library import read_library
from dflash_data.sample_traffic.tenants import TENANTS

DIRT = ("malformed", "truncated", "failed", "repeated")


def usable_requests(num_requests: int, seed: int = 0) -> list[dict]:
    pairs = {}
    for line in play_fleet(seed=seed, num_requests=num_requests):
        try:
            pair = json.loads(line)
        except ValueError:
            continue
        if "error" not in pair:
            pairs[pair["id"]] = pair
    return list(pairs.values())


def test_same_seed_gives_the_same_bytes_and_another_seed_other_ones():
    assert list(play_fleet(seed=3, num_requests=50)) == list(play_fleet(seed=3, num_requests=50))
    assert list(play_fleet(seed=3, num_requests=50)) != list(play_fleet(seed=4, num_requests=50))


@pytest.mark.parametrize("num_requests", [1, 7, 120])
def test_file_holds_the_asked_number_of_usable_requests_and_every_kind_of_dirt(
    tmp_path: Path, num_requests: int
):
    out = tmp_path / "logs" / "traffic.jsonl"
    kinds = write_sample_traffic(out, seed=1, num_requests=num_requests)
    assert sum(count for kind, count in kinds.items() if kind not in DIRT) == num_requests
    assert all(kinds[kind] >= 1 for kind in DIRT)
    assert out.read_bytes().count(b"\n") == sum(kinds.values())
    assert out.read_bytes().splitlines() == list(play_fleet(seed=1, num_requests=num_requests))
    assert [path.name for path in out.parent.iterdir()] == ["traffic.jsonl"]


def test_tenants_differ_in_system_prompt_and_in_what_they_ask():
    asked = defaultdict(Counter)
    systems = defaultdict(set)
    for pair in usable_requests(400):
        system, user = pair["request"]["messages"][:2]
        tenant = pair["request"]["user"]
        systems[tenant].add(system["content"])
        asked[tenant]["code" if "```python" in user["content"] else "text"] += 1
    assert set(asked) == {tenant.name for tenant in TENANTS}
    assert len(asked) >= 4
    assert all(len(prompts) == 1 for prompts in systems.values())
    assert asked["code-tour"]["code"] > 3 * asked["code-tour"]["text"]
    assert asked["sum-school"]["code"] == 0


def test_each_request_repeats_its_session_and_leaves_answers_open():
    sessions = defaultdict(list)
    for pair in usable_requests(300):
        assert pair["response"] is None
        sessions[pair["request"]["metadata"]["session_id"]].append(pair)
    sizes = Counter(len(calls) for calls in sessions.values())
    assert set(sizes) == {1, 2, 3}
    assert sizes[1] > sizes[2] > sizes[3]
    for calls in sessions.values():
        for before, after in itertools.pairwise(calls):
            history = after["request"]["messages"][:-2]
            assert history == before["request"]["messages"]
            assert after["request"]["messages"][-2] == {"role": "assistant", "content": None}
            assert before["created"] < after["created"]


def test_requests_spread_over_fourteen_days_in_order():
    created = [pair["created"] for pair in usable_requests(400)]
    assert created == sorted(created)
    assert {(moment - EPOCH) // DAY_S for moment in created} == set(range(NUM_DAYS))


def test_some_requests_are_popular_and_most_are_new():
    openers = Counter(
        pair["request"]["messages"][1]["content"]
        for pair in usable_requests(600)
        if len(pair["request"]["messages"]) == 2
    )
    assert openers.most_common(1)[0][1] >= 4
    assert sum(count == 1 for count in openers.values()) > 0.8 * len(openers)


def test_prompts_are_short_enough_for_a_laptop():
    lengths = [
        sum(len(message["content"] or "") for message in pair["request"]["messages"])
        for pair in usable_requests(600)
    ]
    assert max(lengths) < 900
    assert sum(lengths) / len(lengths) < 420


def test_library_gives_enough_to_ask_about():
    library = read_library()
    assert len(library.functions) > 500
    assert len(library.paragraphs) > 200


def test_impossible_orders_are_refused_in_a_sentence(tmp_path: Path):
    with pytest.raises(ValueError, match=r"requests \(=0\) must be at least 1"):
        write_sample_traffic(tmp_path / "log.jsonl", seed=0, num_requests=0)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"out \(=.*\) cannot be written"):
        write_sample_traffic(tmp_path / "file" / "log.jsonl", seed=0, num_requests=1)
