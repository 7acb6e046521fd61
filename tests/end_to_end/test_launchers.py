"""`train.py recipe=qwen3` as users type it, under each launcher that runs without a GPU."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest

from dflash_train.stages.walk import run_stage
from dflash_train.stages.workshop import Workshop
from tests.end_to_end.recipe_runs import RECIPES, small_overrides, small_recipe

ROOT = RECIPES.parent
ACCELERATE = ["-m", "accelerate.commands.launch"]
TRAIN = [str(ROOT / "train.py"), "recipe=qwen3"]
NEXT_STAGE = "is not complete. Run `dflash-train collect` with this recipe first"


def by_file(module: str, launch_file: str) -> list[str]:
    return ["-m", module, "--config_file", str(RECIPES / "launch" / f"{launch_file}.yaml")]


LAUNCHERS = {
    "python": [],
    "ours, one process": by_file("dflash_train.launch", "cpu"),
    "ours, two processes": by_file("dflash_train.launch", "ddp"),
    "accelerate": by_file("accelerate.commands.launch", "single"),
}


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A command that has ended."""

    code: int
    output: str
    errors: str


def start(folder: Path, *words: str) -> "subprocess.Popen[str]":
    """Run Python with these words in a folder where nobody has configured accelerate."""
    own = {"ACCELERATE_USE_CPU": "true", "HF_HOME": str(folder / "home")}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: "subprocess.Popen[str]") -> Ended:
    output, errors = process.communicate(timeout=300)
    return Ended(code=process.returncode, output=output, errors=errors)


@pytest.fixture(scope="module")
def without_features(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """What each launcher ends with where no stage has run; they run side by side."""
    folder = tmp_path_factory.mktemp("empty")
    started = {name: start(folder, *words, *TRAIN) for name, words in LAUNCHERS.items()}
    return {name: end(process) for name, process in started.items()}


def test_without_a_target_or_features_accelerate_launches_a_plan(tmp_path: Path):
    ended = end(start(tmp_path, *ACCELERATE, *TRAIN, "--dry-run"))
    assert ended.code == 0, ended.errors[-3000:]
    lines = ended.output.splitlines()
    assert lines[0] == "plan of qwen3 for 8 x h100"
    assert lines[-1].startswith("next: runs/qwen3/features is not there: `dflash-train run`")
    assert "Qwen/Qwen3-8B is out of reach, planned from target.shapes" in ended.errors


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if name != "accelerate"])
def test_without_features_the_stage_to_run_is_named_and_the_exit_code_is_2(
    without_features: dict[str, Ended], launcher: str
):
    ended = without_features[launcher]
    assert ended.code == 2
    assert NEXT_STAGE in ended.errors
    assert "Traceback" not in ended.errors
    assert not ended.output


def test_accelerates_own_command_says_the_same_and_ends_with_its_own_code(
    without_features: dict[str, Ended],
):
    ended = without_features["accelerate"]
    assert NEXT_STAGE in ended.errors
    assert "returned non-zero exit status 2." in ended.errors
    assert ended.code == 1  # when this is 2, dflash_train.launch may go


def test_with_a_tiny_target_and_its_features_the_same_command_trains(tmp_path: Path):
    overrides = small_overrides("qwen3", tmp_path)
    config = small_recipe("qwen3", overrides)
    workshop = Workshop(config)
    for stage in ("regenerate", "collect"):
        run_stage(workshop, stage)
    ended = end(start(tmp_path, *ACCELERATE, *TRAIN, *overrides))
    assert ended.code == 0, ended.errors[-3000:]
    assert ended.output.splitlines()[-1] == str(config.run_dir / "checkpoint")
    lines = map(orjson.loads, (config.run_dir / "metrics.jsonl").read_bytes().splitlines())
    assert len([line for line in lines if "loss" in line]) == 2
