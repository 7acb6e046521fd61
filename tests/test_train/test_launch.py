"""Our launcher with small programs in place of the training: exit codes and signals."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from dflash_train.launch import main
from tests.test_train.launched_runs import ROOT

LAUNCH_FILES = ROOT / "recipes" / "launch"
ONE, TWO = LAUNCH_FILES / "cpu.yaml", LAUNCH_FILES / "ddp.yaml"
SAVES_ON_SIGTERM = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (folder.joinpath("saved").touch(), sys.exit(130)))
folder.joinpath("ready").touch()
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def run(folder: Path, program: str, launch_file: Path) -> int:
    script = folder / "program.py"
    script.write_text(program)
    return main(["--config_file", str(launch_file), str(script), str(folder)])


@pytest.mark.parametrize("launch_file", [ONE, TWO], ids=["one process", "two processes"])
@pytest.mark.parametrize("code", [0, 2, 130])
def test_a_launch_ends_with_the_code_of_its_processes(tmp_path: Path, launch_file: Path, code: int):
    assert run(tmp_path, f"import sys; sys.exit({code})", launch_file) == code


@pytest.mark.parametrize("launch_file", [ONE, TWO], ids=["one process", "two processes"])
def test_a_killed_process_gives_the_code_of_a_shell(tmp_path: Path, launch_file: Path):
    program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run(tmp_path, program, launch_file) == 128 + signal.SIGKILL


@pytest.mark.parametrize("launch_file", [ONE, TWO], ids=["one process", "two processes"])
def test_a_launcher_that_is_told_to_stop_waits_for_what_is_saved(tmp_path: Path, launch_file: Path):
    def stop_once_it_runs() -> None:
        end = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop_once_it_runs)
    thread.start()
    code = run(tmp_path, SAVES_ON_SIGTERM, launch_file)
    thread.join()
    assert code == 130
    assert (tmp_path / "saved").exists()
    assert signal.getsignal(signal.SIGTERM) is before
