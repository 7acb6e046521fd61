"""Kill -9 a run at 20 random moments, start it again each time, compare the ends: `make soak`.

The whole pipeline runs on the tiny target, from a log of several parts and buckets that two workers
ingest, to the traces. Each stage is killed four times: the whole process group or, at random, the
program alone, whose workers then have to end by themselves. Every file that the stages vouch for
must have the bytes of an undisturbed run; in traces of live decoding, all but the measured times.
"""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from dflash_train.records.manifest import FILE_NAME, Manifest, content_hash, file_hash

pytestmark = pytest.mark.soak

RUN = "tiny"
SEED = 20
STAGES = {  # name and output folder
    "ingest": "conversations",
    "regenerate": "regenerated",
    "collect": "features",
    "train": "checkpoint",
    "evaluate": "traces",
}
TIMED = ("live.jsonl", "live_lookup.jsonl", "plain.jsonl", "width1.jsonl")
KILLS_PER_STAGE = 4
LEFT_OUT = "a customer who opted out"
SIZES = [
    "training.max_steps=60",
    "data.max_new_tokens=48",
    "executor.workers=2",
    f"data.excluded_tenants=[{LEFT_OUT}]",
]
START_S, WHOLE_RUN_S, END_S = 120, 300, 10
"""Longest waits: for a stage to begin, for a run to finish, for killed processes to be gone."""


@pytest.fixture(scope="module")
def settings(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The settings of both runs: one log, and one key, so that all pseudonyms are equal."""
    folder = tmp_path_factory.mktemp("input")
    key = folder / "hmac-key"
    key.write_text("0123456789abcdef" * 4)
    write_logs(folder / "logs")
    return [*tiny_overrides, *SIZES, f"data.hmac_key_file={key}", f"data.logs={folder / 'logs'}"]


def write_logs(folder: Path) -> None:
    """Write a log of two parts (formats) and, by what a customer keeps out of it, of 3 buckets."""
    folder.mkdir()
    fleet = [sys.executable, "-m", "dflash_train", "sample-traffic", "requests=160"]
    subprocess.run([*fleet, f"out={folder / 'fleet.jsonl'}"], check=True, capture_output=True)
    question = [{"role": "user", "content": "much to read " * 80_000}]
    call = {"request": {"user": LEFT_OUT, "messages": question}, "response": None}
    with (folder / "fleet.jsonl").open("ab") as stream:
        for number in range(36):
            stream.write(orjson.dumps({"id": f"left-out-{number}"} | call) + b"\n")
    with (folder / "public.jsonl").open("wb") as stream:
        for number in range(40):
            asked = {"from": "human", "value": f"What comes after {number}, and after that?"}
            said = {"from": "gpt", "value": f"{number + 1}"}
            line = {"id": f"public-{number}", "conversations": [asked, said]}
            stream.write(orjson.dumps(line) + b"\n")


@dataclass
class Started:
    """A run under way, in a session of its own, so that its processes can be told from others."""

    process: "subprocess.Popen[bytes]"
    said: Path

    @classmethod
    def begin(cls, runs: Path, settings: list[str]) -> "Started":
        said = runs / "said.txt"
        command = [sys.executable, "-m", "dflash_train", "run", f"runs_dir={runs}", *settings]
        with said.open("wb") as stream:
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=stream, start_new_session=True
            )
        return cls(process, said)

    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait_for(self, stage: str) -> None:
        """Return when a stage has begun to work, or the run has ended."""
        end = time.monotonic() + START_S
        while self.is_running() and f"{stage}: running".encode() not in self.said.read_bytes():
            assert time.monotonic() < end, f"{stage} has not begun"
            time.sleep(0.01)

    def kill(self, *, alone: bool) -> None:
        """Kill the program alone or with all it has started; nothing of it may live on."""
        (os.kill if alone else os.killpg)(self.process.pid, signal.SIGKILL)
        self.process.wait()
        end = time.monotonic() + END_S
        while survivors := list(self.survivors()):
            assert time.monotonic() < end, f"still alive: {survivors}"
            time.sleep(0.05)

    def survivors(self) -> Iterator[str]:
        """Yield the commands of living processes of this run."""
        for process in psutil.process_iter():
            try:
                is_own = os.getsid(process.pid) == self.process.pid
                if is_own and process.status() != psutil.STATUS_ZOMBIE:
                    yield " ".join(process.cmdline())
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue

    def finish(self) -> None:
        assert self.process.wait(WHOLE_RUN_S) == 0, self.said.read_text()[-3000:]


@dataclass
class Undisturbed:
    """A run that nobody killed, and how long its stages took."""

    folder: Path
    seconds: dict[str, float]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Undisturbed:
    runs = tmp_path_factory.mktemp("undisturbed")
    started = Started.begin(runs, settings)
    begins: list[float] = []
    for stage in (*STAGES, "report"):
        started.wait_for(stage)
        begins.append(time.monotonic())
    started.finish()
    lasted = [end - begin for begin, end in itertools.pairwise(begins)]
    return Undisturbed(runs / RUN, dict(zip(STAGES, lasted, strict=True)))


def files_of(folder: Path) -> dict[str, str]:
    """Hash every file that a manifest of the folder vouches for, and the manifest's own facts."""
    manifest = Manifest.read(folder)
    assert manifest is not None
    files = {entry.path: file_hash(folder / entry.path) for entry in manifest.outputs}
    timed = [folder / name for name in TIMED if name in files]
    if timed:  # the clock is in their bytes, and with them in the manifest
        return files | {path.name: content_hash(untimed(path)) for path in timed}
    return files | {"": manifest.hash}


def untimed(path: Path) -> list[Any]:
    """Read traces of live decoding without the times that their steps took."""

    def drop_times(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: drop_times(v) for k, v in value.items() if not k.endswith("_s")}
        return [drop_times(each) for each in value] if isinstance(value, list) else value

    return [drop_times(orjson.loads(line)) for line in path.read_bytes().splitlines()]


def is_complete(run: Path, stage: str) -> bool:
    return (run / STAGES[stage] / FILE_NAME).exists()


def unfinished_stage(run: Path) -> str:
    """Name the stage that a kill has hit: the first without a manifest."""
    return next((stage for stage in STAGES if not is_complete(run, stage)), "report")


def test_a_run_killed_at_twenty_moments_ends_with_the_same_files(
    undisturbed: Undisturbed, tmp_path: Path, settings: list[str]
) -> None:
    moments = random.Random(SEED)
    for stage in STAGES:
        lasts = undisturbed.seconds[stage]
        points = [0.0, *sorted(moments.uniform(0, lasts) for _ in range(KILLS_PER_STAGE))]
        for before, point in itertools.pairwise(points):
            if is_complete(tmp_path / RUN, stage):  # the kill before came too late for it
                shutil.rmtree(tmp_path / RUN / STAGES[stage])
            started = Started.begin(tmp_path, settings)
            started.wait_for(stage)
            time.sleep(point - before)  # what was done up to the kill before is not done again
            assert started.is_running(), started.said.read_text()[-3000:]
            alone = moments.random() < 0.5
            started.kill(alone=alone)
            hit, whom = unfinished_stage(tmp_path / RUN), "program" if alone else "process group"
            print(f"seed {SEED}: {stage} + {point - before:.2f} s, {whom}, hit {hit}")
    Started.begin(tmp_path, settings).finish()
    for name in STAGES.values():
        assert files_of(tmp_path / RUN / name) == files_of(undisturbed.folder / name), name
    assert not (tmp_path / RUN / "ingest").exists(), "temporary partitions are left"
    partial = [path for path in (tmp_path / RUN).rglob("*") if ".partial-" in str(path)]
    assert not [path for path in partial if path.is_file()]
