"""Our side of the capture: feed rows to a vLLM process, read the features it writes.

vLLM pins its own torch and transformers, so it runs under a Python of its own (`VllmEngine.python`)
as `driver.py`, and features come back as one file per row. Rows are sent as the reader consumes
them: files that nobody has read yet are bounded, in number of bytes, by `max_waiting_bytes`.

A file is named by what was asked: target, dtype, tap layers and token ids. So after a kill the rows
whose files are there already are not run again, and a file of another target is never taken for one
of this.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from dflash_data.collect.vllm_capture.driver import REASON
from dflash_train.config import UnavailableError, require
from dflash_train.features.target_loading import load_target_config
from dflash_train.features.target_weights import TargetLocation

VLLM_LAYER_OFFSET = 1
"""vLLM's layer id n is the state after n layers; our tap k is the state after layer k, 0-based."""
DRIVER = Path(__file__).with_name("driver.py")
LOG_NAME = "vllm.log"
_POLL_S = 0.01
_STOP_S = 30.0


@dataclass(kw_only=True)
class VllmEngine:
    """Which vLLM reads features, and of which target."""

    python: Path
    """Interpreter of the environment that holds vLLM 0.32."""
    target: TargetLocation
    """Where both engines load the target from."""
    dtype: str
    """Number format of target and features: `float32`, `bfloat16`, `float16`."""
    target_layer_ids: list[int]
    """0-based tap layers, in the order of the feature columns; the last layer is never tapped."""
    max_row_tokens: int
    """Longest row, in tokens, at most the positions that the target knows."""
    max_waiting_bytes: int = 2 << 30
    """Disk for rows that vLLM works on and files not read yet, in bytes; one row always fits."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`, such as `tensor_parallel_size`."""

    def __post_init__(self) -> None:
        require(
            os.access(self.python, os.X_OK) and self.python.is_file(),
            f"data.vllm_python (={self.python}) is not an interpreter. Give the path of a Python "
            "that has vLLM 0.32, such as /opt/vllm/bin/python.",
        )

    @property
    def vllm_layer_ids(self) -> list[int]:
        """The tap layers as vLLM counts them, ascending, which is the order of its states."""
        return sorted({layer + VLLM_LAYER_OFFSET for layer in self.target_layer_ids})

    @property
    def columns(self) -> list[int]:
        """Where each tap layer stands among the states that vLLM gives."""
        return [self.vllm_layer_ids.index(k + VLLM_LAYER_OFFSET) for k in self.target_layer_ids]

    def hidden_size(self) -> int:
        """Read E from the target's configuration, and check the tap layers against it.

        Raises:
            ValueError: A tap layer is out of range: vLLM itself would leave it out silently.
        """
        config = load_target_config(self.target)
        require(
            all(0 <= layer < config.num_hidden_layers - 1 for layer in self.target_layer_ids),
            f"drafter.target_layer_ids (={self.target_layer_ids}) must lie in "
            f"0..{config.num_hidden_layers - 2} for this target.",
        )
        return config.hidden_size


def capture_features(
    rows: Iterable[list[int]], *, engine: VllmEngine, folder: Path
) -> Generator[Tensor]:
    """Run finished rows through vLLM and yield their features in order, as `Target.features_of`.

    Args:
        rows: Token ids of prompt and answer; read as features are consumed.
        engine: The vLLM that runs them; it is started by the first row without a file.
        folder: Scratch for this call alone. It holds vLLM's log and unread files; it is removed
            when the last row has been consumed, and kept for the next try otherwise.

    Yields:
        `[tokens, L*E]` in the target's dtype; the last row is zeros, since the last token is
        never fed.

    Raises:
        ValueError: A tap layer is out of range, or a row is longer than `max_row_tokens`.
        UnavailableError: The interpreter has no vLLM 0.32, or vLLM stopped.
    """
    hidden_size, dtype = engine.hidden_size(), getattr(torch, engine.dtype)
    token_bytes = len(engine.vllm_layer_ids) * hidden_size * dtype.itemsize
    nothing = torch.zeros(0, len(engine.vllm_layer_ids), hidden_size, dtype=dtype)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    asked = (_Row.of(ids, engine, folder) for ids in rows)
    waiting: deque[_Row] = deque()
    with _Driver(engine, folder) as driver:
        upcoming = next(asked, None)
        while upcoming is not None or waiting:
            while upcoming is not None and _has_room(
                waiting, upcoming, engine.max_waiting_bytes // token_bytes
            ):
                driver.send(upcoming)
                waiting.append(upcoming)
                upcoming = next(asked, None)
            row = waiting.popleft()
            states = driver.take(row) if row.fed else nothing
            yield functional.pad(states[:, engine.columns].flatten(1), (0, 0, 0, 1))
    shutil.rmtree(folder)


@dataclass(kw_only=True)
class _Row:
    """One row on its way: all tokens but the last, and the file that vLLM answers with."""

    fed: list[int]
    path: Path

    @classmethod
    def of(cls, ids: list[int], engine: VllmEngine, folder: Path) -> "_Row":
        require(
            0 < len(ids) <= engine.max_row_tokens,
            f"max_row_tokens (={engine.max_row_tokens}) must be at least the longest row's "
            f"{len(ids)} tokens, and no row may be empty. Raise it, or drop the row.",
        )
        identity = [engine.target.path, engine.target.label, engine.dtype, engine.vllm_layer_ids]
        digest = hashlib.sha256(json.dumps([identity, ids[:-1]]).encode()).hexdigest()
        return cls(fed=ids[:-1], path=folder / f"{digest[:32]}.safetensors")


def _has_room(waiting: "deque[_Row]", row: _Row, max_waiting_tokens: int) -> bool:
    """Whether a row may be sent now; equal rows share a file, so one waits for the other."""
    num_tokens = sum(len(sent.fed) for sent in waiting) + len(row.fed)
    is_new = all(sent.path != row.path for sent in waiting)
    return not waiting or (num_tokens <= max_waiting_tokens and is_new)


class _Driver:
    """The vLLM process; started by the first row that has no file yet."""

    def __init__(self, engine: VllmEngine, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "_Driver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        """End the process: gently when all is read, at once when the reader gave up."""
        if self._process is None:
            return
        if kind is not None:
            self._process.kill()
        self._end_input(self._process)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def send(self, row: _Row) -> None:
        """Hand a row over, unless its file is there already."""
        if not row.fed or row.path.exists():
            return
        self._process = self._process or self._start()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(
                json.dumps({"path": str(row.path), "token_ids": row.fed}) + "\n"
            )
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure() from error

    def take(self, row: _Row) -> Tensor:
        """Wait for a row's file, `[N, L, E]`, and remove it."""
        while not row.path.exists():
            assert self._process is not None, "send() started it, since there was no file"
            if self._process.poll() is not None:
                raise self._failure()
            time.sleep(_POLL_S)
        tensors = load_file(row.path)
        if tensors["token_ids"].tolist() != row.fed:
            raise RuntimeError(f"{row.path} holds the states of other tokens than were asked for.")
        row.path.unlink()
        return tensors["hidden_states"]

    def _start(self) -> "subprocess.Popen[str]":
        engine, folder = self._engine, self._folder
        job = {
            "model": engine.target.path,
            "revision": engine.target.revision,
            "dtype": engine.dtype,
            "max_model_len": engine.max_row_tokens,
            "vllm_layer_ids": engine.vllm_layer_ids,
            "folder": str(folder),
            "settings": engine.settings,
        }
        (folder / "job.json").write_text(json.dumps(job))
        environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        print(f"vLLM starts; its log is {folder / LOG_NAME}", file=sys.stderr)
        with (folder / LOG_NAME).open("w") as log:
            return subprocess.Popen(
                [engine.python, DRIVER, folder / "job.json"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )

    def _failure(self) -> UnavailableError:
        """Say why the process ended: in the driver's words, else by the last line of its log."""
        assert self._process is not None
        self._process.wait()
        log = self._folder / LOG_NAME
        lines = log.read_text(errors="replace").strip().splitlines()
        reason = next((line for line in reversed(lines) if line.startswith(REASON)), None)
        return UnavailableError(
            f"vLLM of {self._engine.python} stopped before all features were there: "
            f"{reason or ' '.join(lines[-1:])} Its log is {log}."
        )

    @staticmethod
    def _end_input(process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass  # it ended before it read its last rows; whoever waits for them is told so
