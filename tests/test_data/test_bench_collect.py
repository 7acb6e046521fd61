import json
from pathlib import Path

import pytest
import torch

from benchmarks.bench_collect import Bench, PlainTarget, main, summary
from benchmarks.bench_runs import whole_sessions
from dflash_train.config import FeaturesDtype, RecipeConfig
from dflash_train.features.store import FeatureStore
from dflash_train.features.target import Target
from dflash_train.testing import LIMITS, ask, assert_close, write_conversations

OUTPUT_LIMIT, _ = LIMITS[torch.float32]


def test_the_smoke_run_ends_in_both_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--smoke"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    middle, traffic = figures["medians_s"], figures["traffic"]
    assert figures["collect_of_bare"] == pytest.approx(middle["bare"] / middle["collect"], abs=1e-4)
    assert figures["one_pass_of_two"] > 0
    assert len(figures["rounds_s"]) == 2
    assert traffic["num_rows"] == 12
    assert 0 <= figures["padding_share"] < 1
    assert traffic["read_tokens"] < traffic["prompt_tokens"] + traffic["answer_tokens"]
    assert set(figures["met"]) == set(figures["goals"])


def test_a_target_without_taps_writes_the_same_answers(target: Target) -> None:
    prompts = [[1, 40, 50, 60], [1, 70]]
    plain = PlainTarget(target)
    want = target.generate_batch(prompts, max_new_tokens=9)
    got = plain.generate_batch(prompts, max_new_tokens=9)
    assert [row.output_ids for row in got] == [row.output_ids for row in want]
    assert [row.features.shape[1] for row in got] == [0, 0]
    assert plain.prefill_s > 0
    assert plain.decode_s > 0


def test_both_ways_leave_the_same_features(
    config: RecipeConfig, target: Target, tmp_path: Path
) -> None:
    config.data.features_dtype = FeaturesDtype.float32
    records = [ask(f"{name}0", f"question {name}" * (2 + at)) for at, name in enumerate("abc")]
    bench = Bench(config, target, records, tmp_path / "bench")
    rounds = [bench.round(0), bench.round(1)]
    assert bench.traffic().num_rows == 3
    assert summary(rounds, bench.traffic())["bench"] == "collect"
    one, two = (
        {row.id: row for row in FeatureStore.open(bench.folder / name / "features" / "train")}
        for name in ("one-pass", "two-passes")
    )
    assert one.keys() == two.keys() == {"a0", "b0", "c0"}
    for name, row in one.items():
        assert torch.equal(row.input_ids, two[name].input_ids)
        assert_close(name, two[name].features, row.features, OUTPUT_LIMIT)


def test_only_whole_sessions_are_taken(config: RecipeConfig) -> None:
    asked = [ask("a0", "one"), ask("a1", "one", None, "two"), ask("b0", "three"), ask("c0", "four")]
    write_conversations(config, asked)
    chosen = whole_sessions(config.run_dir, split="train", num_rows=1)
    assert [record.id for record in chosen] == ["a0", "a1"]
    assert len(whole_sessions(config.run_dir, split="train", num_rows=100)) == 4
    with pytest.raises(ValueError, match="dflash-train run"):
        whole_sessions(config.run_dir, split="nothing", num_rows=1)
