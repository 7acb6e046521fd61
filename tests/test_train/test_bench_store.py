import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.bench_runs import take_over_answers
from benchmarks.bench_store import main
from benchmarks.store_reading import drop_cached_pages, reading_speeds
from benchmarks.store_replay import compare
from benchmarks.tiny_run import write_tiny_run
from dflash_inference.statistics import RequestSums, paired_difference
from dflash_inference.trace import DecodeTrace, StepTrace
from dflash_train.config import EvaluateConfig, RecipeConfig
from dflash_train.features.store import FeatureStore
from dflash_train.records.manifest import Manifest


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> RecipeConfig:
    return write_tiny_run(tmp_path_factory.mktemp("tiny"))


def trace(name: str, accepted: list[int], *, weight: int = 1) -> DecodeTrace:
    steps = [
        StepTrace(start=place, width=8, num_accepted=kept, committed=kept + 1)
        for place, kept in enumerate(accepted)
    ]
    return DecodeTrace(
        id=name,
        conversation=name[0],
        weight=weight,
        prompt_length=3,
        block_size=8,
        output_ids=[],
        steps=steps,
        finish_reason="stop",
    )


def test_the_smoke_run_ends_in_the_figures_of_all_three_stores(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["--smoke"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures["stores"]) == {"float32", "bfloat16", "float8_e4m3fn"}
    for each in figures["stores"].values():
        size = each["size"]
        assert size["num_bytes"] > size["num_tokens"] * each["formula"]
        assert size["num_bytes"] < size["num_tokens"] * each["formula"] * 1.05
        assert each["reading"]["num_tokens"] >= size["num_tokens"]
    assert figures["stores"]["float32"]["trained_on_plain"]["relative"] == 0
    assert set(figures["met"]) == set(figures["goals"])


def test_a_comparison_is_paired_by_request_and_agrees_with_the_difference() -> None:
    config = EvaluateConfig(resamples=2000)
    better = [
        trace("a1", [4, 4], weight=2),
        trace("b1", [2]),
        trace("b2", [6, 1]),
        trace("c1", [3]),
    ]
    worse = [trace("a1", [3, 3], weight=2), trace("b1", [1]), trace("b2", [2, 1]), trace("c1", [3])]
    found = compare(better[::-1], worse, config)
    sums = [RequestSums.of(each) for each in (better, worse)]
    apart = paired_difference(*sums, resamples=2000, seed=config.seed)
    pooled_worse = found.pooled - apart.value
    assert found.relative == pytest.approx(apart.value / pooled_worse)
    assert found.relative_interval.low == 0  # three times conversation c, which is no better
    assert found.relative < found.relative_interval.high < 1
    same = compare(worse, worse, config)
    assert (same.relative, same.relative_interval.low, same.relative_interval.high) == (0, 0, 0)


def test_reading_takes_every_row_and_fetches_it_from_the_disk(tiny: RecipeConfig) -> None:
    folder = tiny.run_dir / "features" / "train"
    speeds = reading_speeds({"one": folder, "two": folder}, num_rounds=2)
    num_tokens = sum(line.num_tokens for line in FeatureStore.open(folder).lines)
    assert [each.num_tokens for each in speeds.values()] == [num_tokens, num_tokens]
    assert all(each.sequential > 0 and each.random > 0 for each in speeds.values())
    drop_cached_pages(folder)
    assert len(FeatureStore.open(folder)) == 12  # checksums hold: dropping changes no byte


def test_a_run_that_is_taken_over_keeps_its_answers_and_loses_its_features(
    tiny: RecipeConfig, tmp_path: Path
) -> None:
    for _ in range(2):  # a bench that goes on does it again
        take_over_answers(tiny.run_dir, tmp_path / "own", ["train", "test"])
    folder = tmp_path / "own" / "regenerated"
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "test-00000.jsonl.gz", "train-00000.jsonl.gz",
    ]  # fmt: skip
    manifest, origin = Manifest.read(folder), Manifest.read(tiny.run_dir / "regenerated")
    assert manifest is not None
    assert origin is not None
    manifest.verify_outputs(folder)
    assert manifest.target == origin.target


def test_a_run_without_answers_is_refused(tiny: RecipeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval-humaneval"):
        take_over_answers(tiny.run_dir, tmp_path / "own", ["train", "eval-humaneval"])
    empty = replace(tiny, name="nothing")
    with pytest.raises(ValueError, match="is not complete"):
        take_over_answers(empty.run_dir, tmp_path / "own", ["train"])
