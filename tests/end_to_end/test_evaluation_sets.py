"""Evaluation sets of several turns and a gate at the end, by the commands that a user types."""

from pathlib import Path

import orjson
import pytest
from datasets import Dataset

from dflash_train.cli import main
from dflash_train.records.conversation import Conversation, read_split

RUN = "tiny"


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> list[str]:
    """Overrides of a run with MT-Bench from a copy of its repository and a file of prompts."""
    folder = tmp_path_factory.mktemp("sets")
    data = folder / "hub" / "HuggingFaceH4" / "mt_bench_prompts" / "data"
    data.mkdir(parents=True)
    questions = [
        {"prompt": [f"Name {number} birds.", "Sort them."], "prompt_id": 81 + number}
        for number in range(3)
    ]
    Dataset.from_list(questions).to_parquet(data / "train-00000-of-00001.parquet")
    prompts = folder / "mine.jsonl"
    prompts.write_text('{"prompt": "Say one."}\n{"prompt": "Say two.", "id": "b"}\n')
    return [
        *tiny_overrides,
        f"runs_dir={folder}",
        f"evaluate.eval_sets=[mt-bench,{prompts}]",
        f"evaluate.datasets_dir={folder / 'hub'}",
    ]


@pytest.fixture(scope="module")
def run_dir(road: list[str]) -> Path:
    """A finished run, whose gate it failed: a drafter of 12 steps reaches no length of 3.9."""
    assert main(["run", *road, "fail_under=3.9"]) == 3
    (folder,) = [value for value in road if value.startswith("runs_dir=")]
    return Path(folder.removeprefix("runs_dir=")) / RUN


def test_a_second_turn_follows_the_answer_of_the_target_to_the_first(run_dir: Path) -> None:
    written: dict[str, Conversation] = {
        record.id: record for record in read_split(run_dir / "regenerated", "eval-mt-bench")
    }
    assert len(written) == 6
    for number in (81, 82, 83):
        first, second = (written[f"eval:mt-bench/{number}/{turn}"] for turn in (0, 1))
        assert first.answer is not None
        assert [turn.role for turn in second.messages] == ["user", "assistant"] * 2
        assert second.messages[1] == first.answer
        assert second.messages[2].content == "Sort them."


def test_every_set_stands_in_the_report_by_name(run_dir: Path) -> None:
    found = orjson.loads((run_dir / "report" / "report.json").read_bytes())
    assert list(found["eval_sets"]) == ["mt-bench", "mine"]
    turns = found["eval_sets"]["mt-bench"]["acceptance_length"]
    assert (turns["num_requests"], turns["num_conversations"]) == (6, 3)
    assert set(found["requests"]) == {"test", "eval-mt-bench", "eval-mine"}
    assert [each["label"] for each in found["cuts"]["sampling"]] == ["greedy"]
    assert "MT-Bench" in (run_dir / "report" / "report.html").read_text()


def test_the_gate_passes_a_lower_limit_and_the_report_is_not_made_again(
    run_dir: Path, road: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir / "report" / "report.json"
    stamp = path.stat().st_mtime_ns
    assert main(["report", *road, "fail_under=1.0"]) == 0
    said = capsys.readouterr()
    assert "gate passed: fail_under (=1)" in said.err
    assert said.out.strip() == str(run_dir / "report")
    assert path.stat().st_mtime_ns == stamp


def test_live_traces_equal_the_replay_of_the_same_requests(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traces = run_dir / "traces"
    assert main(["compare", str(run_dir), str(run_dir / "report"), "json=true"]) == 0
    found = orjson.loads(capsys.readouterr().out)
    assert {each["name"] for each in found["slices"]} >= {"test", "eval-mt-bench", "eval-mine"}
    assert all(each["difference"]["value"] == 0 for each in found["slices"])
    plain, width_one = str(traces / "plain.jsonl"), str(traces / "width1.jsonl")
    assert main(["compare", plain, width_one, "first_difference=true"]) == 0
    assert "requests are equal at every step" in capsys.readouterr().out
