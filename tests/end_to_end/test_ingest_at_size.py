"""Ingest at a size that shows what single cases cannot: `make soak`.

5,000 invented calls, whose near-duplicates are then found by comparing sets of 5-grams, pair by
pair; and many broken lines of every format (`DFLASH_FUZZ_LINES`, 100,000 in all if unset).
"""

import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import pytest

from dflash_data.ingest.stage import ingest
from dflash_inference.eval_sets import load_eval_set
from dflash_train.config import DataConfig, RecipeConfig
from dflash_train.records.conversation import SPLITS, Conversation, read_split
from dflash_train.records.manifest import Manifest
from tests.test_data.log_mutations import ALL_FORMATS, fuzz, num_dropped

pytestmark = pytest.mark.soak

NUM_CALLS = 5_000
NUM_PLANTED = 164
START, SPACING_S = 1_792_000_000, 300
PLANTED, SUM = "solve this for me", "for the ledger"


def words(rng: Random, number: int) -> list[str]:
    return [
        "".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(3, 8))) for _ in range(number)
    ]


def changed(rng: Random, base: list[str]) -> str:
    """Give a text of which up to three words are others: at most 15 of 116 5-grams."""
    text = list(base)
    for _ in range(rng.randint(0, 3)):
        text[rng.randrange(len(text))] = words(rng, 1)[0]
    return " ".join(text)


def invent_log(path: Path, prompts: list[str]) -> set[str]:
    """Write templates, fresh texts, sums, sessions and planted prompts; give the early sums."""
    rng = Random(7)
    bases = [words(rng, 120) for _ in range(80)]
    lines: list[bytes] = []
    sums: set[str] = set()
    planted = iter(prompts)
    for number in range(NUM_CALLS):
        is_early = number < NUM_CALLS * 0.6
        kind = rng.random()
        session = f"alone-{number}"
        if is_early and number % 18 == 0 and (prompt := next(planted, None)) is not None:
            tenant, text = "coder", f"{PLANTED}\n{prompt}\nand explain it"
        elif kind < 0.45:
            tenant, text = "templated", changed(rng, rng.choice(bases))
            session = f"long-{number // 50}-{rng.randrange(10)}"
        elif kind < 0.65:
            tenant = "sums"
            text = f"Please add {rng.randrange(10**5)} to {rng.randrange(10**5)} {SUM} today"
            sums |= {text} if is_early else set()
        else:
            tenant, text = "fresh", " ".join(words(rng, rng.randint(6, 60)))
        request = {
            "messages": [{"role": "user", "content": text}],
            "user": tenant,
            "metadata": {"session_id": session},
        }
        fields = {"id": f"r{number}", "created": START + SPACING_S * number}
        lines.append(json.dumps({**fields, "request": request, "response": None}).encode())
    path.write_bytes(b"\n".join(lines))
    return sums


Shingles = frozenset[tuple[str, ...]]


def shingles(record: Conversation) -> Shingles:
    text = (record.messages[-1].content or "").lower().split()
    return frozenset(tuple(text[place : place + 5]) for place in range(max(1, len(text) - 4)))


def largest_jaccard(ones: list[Shingles], others: list[Shingles]) -> list[float]:
    """Give for each set its largest Jaccard similarity with any other, exactly."""
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for place, other in enumerate(others):
        for shingle in other:
            holders[shingle].append(place)
    largest: list[float] = []
    for one in ones:
        shared = Counter(place for shingle in one for place in holders.get(shingle, ()))
        ratios = [both / (len(one) + len(others[at]) - both) for at, both in shared.items()]
        largest.append(max(ratios, default=0.0))
    return largest


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Manifest, dict[str, list[Conversation]], set[str]]:
    folder = tmp_path_factory.mktemp("size")
    evaluation = load_eval_set("humaneval", num_prompts=NUM_PLANTED)
    prompts = [prompt.messages[-1].content or "" for prompt in evaluation]
    sums = invent_log(folder / "calls.jsonl", prompts)
    config = RecipeConfig(
        name="run",
        runs_dir=str(folder / "runs"),
        data=DataConfig(test_share=0.2, validation_share=0.1, max_drop_share=0.9),
    )
    manifest = ingest(
        config,
        folder / "calls.jsonl",
        evaluation={"humaneval": evaluation},
        manifest=Manifest(stage="ingest", recipe_hash="sha256:0"),
    )
    written = {s: list(read_split(config.run_dir / "conversations", s)) for s in SPLITS}
    return manifest, written, sums


Made = tuple[Manifest, dict[str, list[Conversation]], set[str]]


def test_no_near_duplicate_of_a_training_record_is_unseen(made: Made):
    train = [shingles(record) for record in made[1]["train"]]
    jaccard = {
        is_seen: largest_jaccard(
            [shingles(record) for record in made[1]["test"] if record.seen_in_train is is_seen],
            train,
        )
        for is_seen in (True, False)
    }
    assert len(jaccard[False]) > 200
    assert sum(each >= 0.9 for each in jaccard[True]) > 50
    assert max(jaccard[False]) < 0.9


def test_no_session_crosses_the_splits(made: Made):
    splits: dict[str | None, set[str]] = defaultdict(set)
    sizes: Counter[str | None] = Counter()
    for split, records in made[1].items():
        for record in records:
            splits[record.session].add(split)
            sizes[record.session] += 1
    assert max(map(len, splits.values())) == 1
    assert sum(size > 1 for size in sizes.values()) > 100


def test_planted_evaluation_prompts_are_always_caught(made: Made):
    manifest, written, _ = made
    assert manifest.counts is not None
    assert manifest.counts.dropped["contaminated"] == NUM_PLANTED
    assert manifest.details["contaminated"] == {"humaneval": NUM_PLANTED}
    for split in ("train", "validation"):
        assert not any(PLANTED in str(record.messages[-1].content) for record in written[split])


def test_the_arithmetic_tenant_keeps_its_variety(made: Made):
    _, written, sums = made
    kept = {record.messages[-1].content for record in written["train"]}
    assert len(sums) > 400
    assert sums <= kept


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_many_broken_lines_never_stop_a_reader_and_the_books_balance(name: str, tmp_path: Path):
    num_lines = int(os.environ.get("DFLASH_FUZZ_LINES", "100000")) // len(ALL_FORMATS)
    total = fuzz(name, tmp_path / "broken.jsonl", num_lines)
    assert total["lines"] >= num_lines
    assert total["kept"] > 0 < num_dropped(total)
