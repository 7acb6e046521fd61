from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from dflash_inference.report import report
from dflash_train.config import RecipeConfig
from dflash_train.records.manifest import Manifest
from dflash_train.stages.judgement import GATE_FAILED, pass_gate, read_gate

Judge = Callable[..., tuple[int, str]]


@pytest.fixture
def judge(invented_run: RecipeConfig, capsys: pytest.CaptureFixture[str]) -> Judge:
    """Give the exit code and the words of a gate at the end of the invented run."""
    report(invented_run, manifest=Manifest(stage="report", recipe_hash="sha256:0"))

    def judge(*words: str) -> tuple[int, str]:
        gate, others = read_gate([*words, "recipe=smollm2"])
        assert others == ["recipe=smollm2"]
        return pass_gate(invented_run, gate), capsys.readouterr().err

    return judge


def earlier(run: RecipeConfig, path: Path, *, more_tokens: int, last: int | None = None) -> str:
    """Write the run's report as an earlier one that committed more tokens in each request."""
    found = orjson.loads((run.run_dir / "report" / "report.json").read_bytes())
    columns = {name: values[:last] for name, values in found["requests"]["test"].items()}
    columns["tokens"] = [tokens + more_tokens for tokens in columns["tokens"]]
    found["requests"]["test"] = columns
    path.write_bytes(orjson.dumps(found))
    return f"baseline={path}"


def test_a_limit_fails_only_where_the_whole_interval_lies_below(
    invented_run: RecipeConfig, judge: Judge
) -> None:
    found = orjson.loads((invented_run.run_dir / "report" / "report.json").read_bytes())
    low, high = found["acceptance_length"]["interval"]
    between = (found["acceptance_length"]["pooled"] + high) / 2
    assert judge(f"fail_under={low}")[0] == 0
    assert judge(f"fail_under={between}")[0] == 0
    code, words = judge(f"fail_under={high + 0.01}")
    assert code == GATE_FAILED == 3
    assert f"fail_under (={high + 0.01:g})" in words
    assert f"{found['acceptance_length']['pooled']:.3f}" in words
    assert f"{low:.3f} to {high:.3f}" in words
    assert "gate FAILED" in words


def test_a_run_worse_than_the_baseline_fails_and_an_equal_one_passes(
    invented_run: RecipeConfig, judge: Judge, tmp_path: Path
) -> None:
    path = tmp_path / "old.json"
    code, words = judge(earlier(invented_run, path, more_tokens=4))
    assert code == GATE_FAILED
    assert "worse" in words
    assert str(path) in words
    assert "on 104 shared requests" in words
    assert judge(earlier(invented_run, path, more_tokens=0))[0] == 0
    assert judge(earlier(invented_run, path, more_tokens=-4))[0] == 0


def test_few_shared_requests_make_no_claim(
    invented_run: RecipeConfig, judge: Judge, tmp_path: Path
) -> None:
    words = earlier(invented_run, tmp_path / "old.json", more_tokens=9, last=49)
    code, said = judge(words)
    assert code == 0
    assert "49 shared requests, fewer than 50 make no claim" in said


def test_one_failed_question_is_enough(
    invented_run: RecipeConfig, judge: Judge, tmp_path: Path
) -> None:
    words = earlier(invented_run, tmp_path / "old.json", more_tokens=0)
    code, said = judge("fail_under=7.9", words)
    assert code == GATE_FAILED
    assert "gate FAILED: fail_under" in said
    assert "gate passed: baseline" in said


def test_without_a_question_nothing_is_judged(judge: Judge) -> None:
    assert judge() == (0, "")


@pytest.mark.parametrize("text", ["high", "0", "-1", "nan", ""])
def test_a_limit_that_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"fail_under .* must be a number above 0"):
        read_gate([f"fail_under={text}"])


def test_a_baseline_must_be_an_earlier_report(
    invented_run: RecipeConfig, judge: Judge, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        read_gate([f"baseline={tmp_path / 'none.json'}"])
    with pytest.raises(ValueError, match="the report of this run itself"):
        judge(f"baseline={invented_run.run_dir / 'report' / 'report.json'}")
    old = tmp_path / "old.json"
    old.write_text('{"acceptance_length": {"ceiling": 8}}')
    with pytest.raises(ValueError, match="is no report of this version"):
        judge(f"baseline={old}")
    found = orjson.loads((invented_run.run_dir / "report" / "report.json").read_bytes())
    columns = found["requests"]["test"]
    columns["id"] = [f"other-{name}" for name in columns["id"]]
    old.write_bytes(orjson.dumps(found))
    with pytest.raises(ValueError, match="share no request"):
        judge(f"baseline={old}")
