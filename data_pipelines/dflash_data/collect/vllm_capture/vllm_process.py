"""A vLLM under a Python of its own: its release, its start, its rows, and why it ended.

It never sees text (its tokenizer is off), so all that its log could tell of a conversation is token
ids. What we repeat of that log has its lists of numbers taken out.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from dflash_data.collect.vllm_capture.driver import ASKS_VERSION, REASON, VERSION
from dflash_train.config import UnavailableError, require

DRIVER = Path(__file__).with_name("driver.py")
LOG_NAME = "vllm.log"
_POLL_S = 0.01
_STOP_S = 30.0
_TAIL_LINES = 8
_NUMBERS = re.compile(r"\d+(?:\s*,\s*\d+){3,}")


def check_interpreter(python: Path) -> None:
    """Raise ValueError unless `data.vllm_python` can be run."""
    require(
        os.access(python, os.X_OK) and python.is_file(),
        f"data.vllm_python (={python}) is not an interpreter. Give the path of a Python "
        "that has vLLM 0.32, such as /opt/vllm/bin/python.",
    )


@functools.cache
def vllm_version(python: Path) -> str:
    """Ask an interpreter for the release of its vLLM; takes some seconds.

    Raises:
        ValueError: It is not an interpreter.
        UnavailableError: It has no vLLM, or a release that the driver was never tried with.
    """
    check_interpreter(python)
    command = [python, DRIVER, ASKS_VERSION]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, env=_environment()
        )
    except OSError as error:  # a file that may be run and is no program
        raise UnavailableError(f"data.vllm_python (={python}) does not serve: {error}") from error
    lines = (result.stdout + result.stderr).splitlines()
    found = _after(VERSION, lines)
    if result.returncode != 0 or found is None:
        raise UnavailableError(f"data.vllm_python (={python}) does not serve: {_cause(lines)}")
    return found


class VllmProcess:
    """The driver in its own Python; started by the first row that is sent.

    A context manager: the process ends gently when all is read, at once when the reader gave up.
    """

    def __init__(self, python: Path, folder: Path, job: dict[str, Any]) -> None:
        """Start nothing yet.

        Args:
            python: Interpreter that has vLLM.
            folder: Where the log and the job go.
            job: What `driver.start_engine` reads.
        """
        self._python = python
        self._folder = folder
        self._job = job
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "VllmProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        if kind is not None:
            self._process.kill()
        _end_input(self._process)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def send(self, path: Path, token_ids: list[int]) -> None:
        """Ask for the hidden states of a row, to be written to a path.

        Raises:
            UnavailableError: vLLM stopped.
        """
        self._process = self._process or self._start()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(
                json.dumps({"path": str(path), "token_ids": token_ids}) + "\n"
            )
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure() from error

    def wait_for(self, path: Path) -> None:
        """Return once a file that was asked for is there.

        Raises:
            UnavailableError: vLLM stopped without it.
        """
        while not path.exists():
            assert self._process is not None, "send() started it, since there was no file"
            if self._process.poll() is not None and not path.exists():
                raise self._failure()
            time.sleep(_POLL_S)

    def _start(self) -> "subprocess.Popen[str]":
        job, log = self._folder / "job.json", self._folder / LOG_NAME
        job.write_text(json.dumps(self._job))
        tqdm.write(f"vLLM starts, which takes a minute; its log is {log}", file=sys.stderr)
        with log.open("w") as output:
            return subprocess.Popen(
                [self._python, DRIVER, job],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env=_environment(),
            )

    def _failure(self) -> UnavailableError:
        """Say how and why the process ended."""
        assert self._process is not None
        code, log = self._process.wait(), self._folder / LOG_NAME
        ended = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        return UnavailableError(
            f"vLLM of {self._python} ended {ended} before all features were there. "
            f"{_cause(log.read_text(errors='replace').splitlines())}\nIts log is {log}. "
            "What is finished is kept: run it again to go on."
        )


def _environment() -> dict[str, str]:
    """Give this process's environment without the path to our own packages."""
    return {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}


def _cause(lines: list[str]) -> str:
    """Give the driver's own words for its end, else the last lines, without lists of numbers."""
    reason = _after(REASON, lines)
    if reason is not None:
        return _NUMBERS.sub("...", reason)
    tail = [line for line in lines if line.strip()][-_TAIL_LINES:]
    if not tail:
        return "It printed nothing."
    shown = "\n".join(f"  {_NUMBERS.sub('...', line)}" for line in tail)
    return f"The last lines that it printed:\n{shown}"


def _after(beginning: str, lines: list[str]) -> str | None:
    """Give the rest of the last line with this beginning."""
    found = (line for line in reversed(lines) if line.startswith(beginning))
    line = next(found, None)
    return None if line is None else line.removeprefix(beginning)


def _end_input(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    try:
        process.stdin.close()
    except BrokenPipeError:
        pass  # it ended before it read its last rows; whoever waits for them is told so
