"""Kill -9 a stage at random moments, start the run again, and compare the ends: `make soak`.

Each stage runs in a process of its own on the tiny target, is killed three times while it works,
and is then left to finish. The checkpoint must have the bytes of an undisturbed run.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dflash_train.records.manifest import Manifest, file_hash

pytestmark = pytest.mark.soak

RUN = "tiny"
SIZES = ["data.sample.requests=160", "training.max_steps=60", "data.max_new_tokens=48"]
KILLS = 3


@pytest.fixture(scope="module")
def overrides(tiny_overrides: list[str]) -> list[str]:
    return [*tiny_overrides, *SIZES]


@pytest.fixture(scope="module")
def hmac_key(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One key for all runs, so that their pseudonyms, and with them all bytes, can be equal."""
    path = tmp_path_factory.mktemp("key") / "hmac-key"
    path.write_text("0123456789abcdef" * 4)
    return f"data.hmac_key_file={path}"


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, overrides: list[str], hmac_key: str
) -> Path:
    runs = tmp_path_factory.mktemp("undisturbed")
    finish(runs, "run", [*overrides, hmac_key])
    return runs


def start(runs: Path, verb: str, overrides: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dflash_train", verb, f"runs_dir={runs}", *overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(runs: Path, verb: str, overrides: list[str]) -> None:
    assert start(runs, verb, overrides).wait() == 0


def kill_while_it_works(process: subprocess.Popen[bytes], folder: Path, delay_s: float) -> bool:
    """Kill once the stage has begun to write and some more time has passed; say if it still ran."""
    while process.poll() is None and not (folder / "stage.key").exists():
        time.sleep(0.01)
    time.sleep(delay_s)
    was_running = process.poll() is None
    if was_running:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return was_running


def bytes_of(folder: Path) -> dict[str, str]:
    """Hash every file that a manifest of the folder vouches for."""
    manifest = Manifest.read(folder)
    assert manifest is not None
    return {entry.path: file_hash(folder / entry.path) for entry in manifest.outputs}


@pytest.mark.parametrize(
    ("stage", "folder", "before", "longest_s"),
    [
        ("regenerate", "regenerated", ["ingest"], 1.5),
        ("collect", "features", ["ingest", "regenerate"], 0.05),
        ("train", "checkpoint", ["ingest", "regenerate", "collect"], 1.5),
    ],
)
def test_a_killed_stage_ends_with_the_same_checkpoint(
    stage: str,
    folder: str,
    before: list[str],
    longest_s: float,
    undisturbed: Path,
    tmp_path: Path,
    overrides: list[str],
    hmac_key: str,
) -> None:
    settings = [*overrides, hmac_key]
    log = undisturbed / RUN / "sample_traffic" / "traffic.jsonl"
    moments = random.Random(stage)
    settings_of_log = [*settings, f"data.logs={log}"]
    for verb in before:
        finish(tmp_path, verb, settings_of_log)
    num_kills = 0
    for _attempt in range(KILLS):
        process = start(tmp_path, stage, settings_of_log)
        delay_s = moments.uniform(0, longest_s)
        num_kills += kill_while_it_works(process, tmp_path / RUN / folder, delay_s)
    assert num_kills == KILLS, "the stage was faster than its kills: lower longest_s"
    finish(tmp_path, "run", settings_of_log)
    for name in ("regenerated", "checkpoint"):
        assert bytes_of(tmp_path / RUN / name) == bytes_of(undisturbed / RUN / name)
