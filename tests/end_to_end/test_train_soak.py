"""Kill a training of 200 steps 30 times, start it again each time, compare the ends: `make soak`.

Each kill comes after a new train state and some steps drawn from a seed. Half are SIGTERM, which
saves and leaves with exit code 130; the others are SIGKILL, every third of them aimed at the middle
of a save, of which most must hit: what they leave is half a state. Weights, manifest and metrics
(seconds aside) must equal those of an undisturbed run.
"""

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from dflash_train.records.manifest import Manifest, file_hash

pytestmark = pytest.mark.soak

RUN = "tiny"
SEED = 30
NUM_KILLS, NUM_STEPS, SAVE_EVERY = 30, 200, 2
AIMED_AT_SAVES = range(0, NUM_KILLS, 6)
"""Numbers of the kills that wait for a save to begin."""
STEPS_AFTER_STATE = (3, 5)
"""Fewest and most steps from the state that a run goes on from to its kill: a new save at least."""
SIZES = [
    f"training.max_steps={NUM_STEPS}",
    f"training.save_every={SAVE_EVERY}",
    "training.validate_every=50",
    "training.log_every=1",
]
BEFORE = ("ingest", "regenerate", "collect")
COMPARED = ("step", "loss", "cross_entropy", "lr", "grad_norm", "slot_accuracy", "joint_accuracy",
            "validation")  # fmt: skip
LONGEST_WAIT_S = 120
INTERRUPTED = 130


def command(verb: str, runs: Path, settings: list[str]) -> list[str]:
    return [sys.executable, "-m", "dflash_train", verb, f"runs_dir={runs}", *settings]


@pytest.fixture(scope="module")
def settings(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("input")
    key, log = folder / "hmac-key", folder / "traffic.jsonl"
    key.write_text("0123456789abcdef" * 4)
    fleet = [sys.executable, "-m", "dflash_train", "sample-traffic", "requests=60", f"out={log}"]
    subprocess.run(fleet, check=True, capture_output=True)
    return [*tiny_overrides, *SIZES, f"data.hmac_key_file={key}", f"data.logs={log}"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    """The folder of all runs after one that nobody killed."""
    runs = tmp_path_factory.mktemp("undisturbed")
    for verb in (*BEFORE, "train"):
        subprocess.run(command(verb, runs, settings), check=True, capture_output=True)
    return runs


@dataclass
class Training:
    """A training under way."""

    process: "subprocess.Popen[bytes]"
    run: Path

    @classmethod
    def begin(cls, runs: Path, settings: list[str]) -> "Training":
        said = (runs / "said.txt").open("wb")
        process = subprocess.Popen(
            command("train", runs, settings), stdout=subprocess.DEVNULL, stderr=said
        )
        return cls(process, runs / RUN)

    def wait_until(self, what: str, is_so: Callable[[], bool]) -> None:
        end = time.monotonic() + LONGEST_WAIT_S
        while not is_so():
            assert self.process.poll() is None, f"ended before {what}"
            assert time.monotonic() < end, f"waited too long for {what}"
            time.sleep(0.0005)

    def last_step(self) -> int:
        """Give the newest step of the metrics; 0 while there is none."""
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines[-3:] if line.endswith(b"\n")]
        return orjson.loads(whole[-1])["step"] if whole else 0

    def is_saving(self) -> bool:
        return any((self.run / "state").glob(".partial-step-*"))

    def kill(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        code = self.process.wait(LONGEST_WAIT_S)
        assert code == (INTERRUPTED if number == signal.SIGTERM else -signal.SIGKILL)


def newest_state(run: Path) -> int:
    steps = [int(path.name.removeprefix("step-")) for path in (run / "state").glob("step-*")]
    return max(steps, default=0)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    return [{key: line[key] for key in COMPARED if key in line} for line in lines]


def test_thirty_kills_change_no_weight_and_no_metric(
    undisturbed: Path, tmp_path: Path, settings: list[str]
) -> None:
    draws = random.Random(SEED)
    run = tmp_path / RUN
    shutil.copytree(
        undisturbed / RUN, run,
        ignore=shutil.ignore_patterns("checkpoint", "state", "metrics.jsonl"),
    )  # fmt: skip
    num_cut_saves = 0
    for number in range(NUM_KILLS):
        before = newest_state(run)
        target = before + draws.randint(*STEPS_AFTER_STATE)
        training = Training.begin(tmp_path, settings)
        # Until the first new state the metrics may still be those of the run before.
        training.wait_until("a new state", lambda: newest_state(run) > before)  # noqa: B023
        training.wait_until(f"step {target}", lambda: training.last_step() >= target)  # noqa: B023
        sent = signal.SIGTERM if number % 2 else signal.SIGKILL
        if number in AIMED_AT_SAVES:
            training.wait_until("a save", training.is_saving)
        training.kill(sent)
        has_cut = training.is_saving()
        num_cut_saves += has_cut
        after = newest_state(run)
        assert after > before, "each kill comes after a new save"
        place = f"step {training.last_step()}{' during a save' if has_cut else ''}"
        print(f"seed {SEED}: {sent.name} at {place}, state of step {after}")
    subprocess.run(command("train", tmp_path, settings), check=True, capture_output=True)
    print(f"{num_cut_saves} of {NUM_KILLS} kills cut a save")
    assert num_cut_saves > len(AIMED_AT_SAVES) / 2, "most of those that are aimed at a save hit it"
    assert metrics(run) == metrics(undisturbed / RUN)
    checkpoints = run / "checkpoint", undisturbed / RUN / "checkpoint"
    got, want = (Manifest.read(folder) for folder in checkpoints)
    assert got is not None
    assert want is not None
    assert got.hash == want.hash
    for entry in want.outputs:
        hashes = {file_hash(folder / entry.path) for folder in checkpoints}
        assert len(hashes) == 1, entry.path
