"""The protocol's command on a tiny target with invented questions, from questions to figures."""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from dflash_train.config import TargetConfig
from dflash_train.features.target import Target, load_target
from dflash_train.records.chat_template import render_prompt
from dflash_train.records.conversation import Turn
from dflash_train.records.manifest import Manifest, file_hash

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 24
NUM_TRAIN, NUM_VALIDATION, NUM_TEST, NUM_STORED_TEST = 8, 2, 6, 4

Command = Callable[..., int]


@pytest.fixture
def gsm8k(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """The script's main, with a cache of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("DFLASH_HOME", str(tmp_path / "home"))
    return importlib.import_module("gsm8k").main


@pytest.fixture
def overrides(tiny_overrides: list[str], tmp_path: Path) -> list[str]:
    kept = [each for each in tiny_overrides if not each.startswith("evaluate.prompts_per_set")]
    return ["--smoke", f"runs_dir={tmp_path / 'runs'}", "training.minutes=null", *kept]


def write_questions(folder: Path) -> None:
    num_ablation = NUM_TEST
    for file, number in (("train", NUM_TRAIN + NUM_VALIDATION + num_ablation), ("test", NUM_TEST)):
        lines = [{"question": f"{file} {index}: how many?"} for index in range(number)]
        write_lines(folder / "gsm8k" / f"{file}.jsonl", lines)


def write_answers(folder: Path, target: Target) -> None:
    files = (("train", NUM_TRAIN, "train-1280"), ("test", NUM_STORED_TEST, "test-64"))
    for file, number, name in files:
        questions = (folder / "gsm8k" / f"{file}.jsonl").read_bytes().splitlines()[:number]
        prompts = [
            render_prompt(
                target.tokenizer, [Turn(role="user", content=orjson.loads(line)["question"])]
            )
            for line in questions
        ]
        rows = target.generate_batch(prompts, max_new_tokens=BUDGET)
        lines = [
            {
                "index": index,
                "prompt_token_ids": prompt,
                "output_token_ids": row.output_ids,
                "finish_reason": row.finish_reason,
            }
            for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]
        write_lines(folder / "gsm8k_smollm2" / f"{name}.jsonl", lines)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))


@pytest.fixture
def data(tmp_path: Path, tiny_target_folder: Path) -> Path:
    """Invented questions, and answers of the tiny target to some of them."""
    folder = tmp_path / "data"
    write_questions(folder)
    write_answers(folder, load_target(TargetConfig(name_or_path=str(tiny_target_folder)), [1, 3]))
    return folder


def figures_of(output: str) -> dict[str, Any]:
    return orjson.loads(output.strip().splitlines()[-1])


def test_the_protocol_runs_resumes_and_compares(
    gsm8k: Command,
    data: Path,
    overrides: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = f"--gsm8k={data}"
    assert gsm8k(["run", folder, *overrides]) == 0
    figures = figures_of(capsys.readouterr().out)
    assert figures["test"]["num_requests"] == NUM_TEST
    assert figures["test_first_4"]["num_requests"] == NUM_STORED_TEST
    assert figures["train"]["num_requests"] == 4
    assert figures["live"]["num_equal_to_replay"] == figures["live"]["num_requests"] == 2
    low, high = figures["test"]["interval"].values()
    assert 1.0 <= low <= figures["test"]["pooled"] <= high <= 4.0
    assert figures["draft_cost"]["calls"] == 50
    assert figures["draft_cost"]["median_s"] > 0
    assert figures["training"]["steps"] == 12
    assert figures["training"]["seconds"] > 0
    for size in ("K=8", "K=16"):
        lookup = figures["prompt_lookup"][size]
        difference = lookup["drafter_minus_lookup"]["value"]
        assert difference == pytest.approx(figures["test"]["pooled"] - lookup["pooled"])
    positions = figures["test"]["positions"]
    assert positions["reached"][0] == sum(figures["test"]["steps_by_length"][1:])

    runs = tmp_path / "runs"
    weights = file_hash(runs / "tiny" / "checkpoint" / "last" / "model.safetensors")
    assert gsm8k(["run", *overrides]) == 0  # without the folder: everything is there
    assert figures_of(capsys.readouterr().out) == figures
    assert file_hash(runs / "tiny" / "checkpoint" / "last" / "model.safetensors") == weights

    assert gsm8k(["run", folder, *overrides, "name=other", "seed=1"]) == 0
    other = figures_of(capsys.readouterr().out)
    assert gsm8k(["compare", str(runs / "tiny"), str(runs / "other"), *overrides]) == 0
    difference = figures_of(capsys.readouterr().out)["first_minus_second"]
    want = figures["test"]["pooled"] - other["test"]["pooled"]
    assert difference["value"] == pytest.approx(want)
    assert difference["verdict"] == "undecided"  # six questions prove nothing


def test_settings_are_compared_on_questions_that_no_figure_uses(
    gsm8k: Command,
    data: Path,
    overrides: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = f"--gsm8k={data}"
    for name in ("one", "two"):
        assert gsm8k(["ablate", folder, *overrides, f"name={name}", f"seed={len(name)}"]) == 0
    assert figures_of(capsys.readouterr().out)["test"]["num_requests"] == NUM_TEST
    runs = tmp_path / "runs"
    traces = (runs / "one" / "measure-ablation" / "replay-test.jsonl").read_bytes().splitlines()
    first = NUM_TRAIN + NUM_VALIDATION
    asked = [orjson.loads(line)["id"] for line in traces]
    assert asked == [f"gsm8k-train-{first + index:04d}" for index in range(NUM_TEST)]
    runs_folders = [str(runs / name) for name in ("one", "two")]
    assert gsm8k(["compare", "--ablation", *runs_folders, *overrides]) == 0
    assert figures_of(capsys.readouterr().out)["first"] == runs_folders[0]
    assert not (runs / "one" / "measure").exists()


def test_without_stored_answers_the_target_writes_them(
    gsm8k: Command,
    data: Path,
    overrides: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.rmtree(data / "gsm8k_smollm2")
    assert gsm8k(["prepare", f"--gsm8k={data}", *overrides]) == 0
    features = Path(capsys.readouterr().out.strip().splitlines()[-1]) / "features"
    rows = {split: Manifest.read(features / split) for split in ("train", "validation", "test")}
    kept = {split: each and each.counts and each.counts.kept for split, each in rows.items()}
    assert kept == {"train": NUM_TRAIN, "validation": NUM_VALIDATION, "test": NUM_TEST}


def test_the_drafter_is_kept_in_the_cache_and_made_once(
    gsm8k: Command,
    data: Path,
    overrides: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert gsm8k(["drafter", f"--gsm8k={data}", *overrides]) == 0
    folder = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert folder == tmp_path / "home" / "drafters" / "gsm8k-smoke"
    manifest = Manifest.read(folder)
    assert manifest is not None
    manifest.verify_outputs(folder)
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(tmp_path / "home" / "protocols")
    for arguments in (["drafter"], ["drafter", f"--gsm8k={data}"]):
        assert gsm8k([*arguments, *overrides]) == 0
        output = capsys.readouterr()
        assert output.out.strip() == str(folder)
        assert "nothing to do" in output.err
    assert gsm8k(["drafter", *overrides, "seed=1"]) == 2  # another drafter, and no data for it
    assert "--gsm8k must be set" in capsys.readouterr().err


def test_a_folder_without_questions_is_named(
    gsm8k: Command, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gsm8k(["prepare", f"--gsm8k={tmp_path}", *overrides]) == 2
    assert "gsm8k/train.jsonl" in capsys.readouterr().err
