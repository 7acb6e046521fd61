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
import shutil
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from dflash_data.collect.vllm_capture.vllm_process import VllmProcess, check_interpreter
from dflash_train.config import require
from dflash_train.features.target_loading import load_target_config
from dflash_train.features.target_weights import TargetLocation

VLLM_LAYER_OFFSET = 1
"""vLLM's layer id n is the state after n layers; our tap k is the state after layer k, 0-based."""


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
        check_interpreter(self.python)

    @property
    def vllm_layer_ids(self) -> list[int]:
        """The tap layers as vLLM counts them, ascending, which is the order of its states."""
        return sorted({layer + VLLM_LAYER_OFFSET for layer in self.target_layer_ids})

    @property
    def columns(self) -> list[int]:
        """Where each tap layer stands among the states that vLLM gives."""
        return [self.vllm_layer_ids.index(k + VLLM_LAYER_OFFSET) for k in self.target_layer_ids]

    def token_bytes(self) -> int:
        """Give the bytes of one token in a file that vLLM writes."""
        itemsize = getattr(torch, self.dtype).itemsize
        return len(self.vllm_layer_ids) * self.hidden_size() * itemsize

    def job(self, folder: Path) -> dict[str, Any]:
        """Give what `driver.start_engine` reads."""
        return {
            "model": self.target.path,
            "revision": self.target.revision,
            "dtype": self.dtype,
            "max_model_len": self.max_row_tokens,
            "vllm_layer_ids": self.vllm_layer_ids,
            "folder": str(folder),
            "settings": self.settings,
        }

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
    shape = (0, len(engine.vllm_layer_ids), engine.hidden_size())
    nothing = torch.zeros(shape, dtype=getattr(torch, engine.dtype))
    max_waiting_tokens = engine.max_waiting_bytes // engine.token_bytes()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    asked = (AskedRow.of(ids, engine, folder) for ids in rows)
    waiting: deque[AskedRow] = deque()
    with VllmProcess(engine.python, folder, engine.job(folder)) as process:
        upcoming = next(asked, None)
        while upcoming is not None or waiting:
            while upcoming is not None and _has_room(waiting, upcoming, max_waiting_tokens):
                if upcoming.fed and not upcoming.path.exists():
                    process.send(upcoming.path, upcoming.fed)
                waiting.append(upcoming)
                upcoming = next(asked, None)
            row = waiting.popleft()
            states = take_states(row, process) if row.fed else nothing
            yield row_features(states, engine)
    shutil.rmtree(folder)


@dataclass(kw_only=True)
class AskedRow:
    """One row on its way: all tokens but the last, and the file that vLLM answers with."""

    fed: list[int]
    path: Path

    @classmethod
    def of(cls, ids: list[int], engine: VllmEngine, folder: Path) -> "AskedRow":
        """Name the file of a row in a folder.

        Raises:
            ValueError: The row is empty, or longer than the engine takes.
        """
        require(
            0 < len(ids) <= engine.max_row_tokens,
            f"max_row_tokens (={engine.max_row_tokens}) must be at least the longest row's "
            f"{len(ids)} tokens, and no row may be empty. Raise it, or drop the row.",
        )
        identity = [engine.target.path, engine.target.label, engine.dtype, engine.vllm_layer_ids]
        digest = hashlib.sha256(json.dumps([identity, ids[:-1]]).encode()).hexdigest()
        return cls(fed=ids[:-1], path=folder / f"{digest[:32]}.safetensors")


def row_features(states: Tensor, engine: VllmEngine) -> Tensor:
    """Lay vLLM's states `[N - 1, L, E]` out as features `[N, L*E]`; the last row is zeros."""
    return functional.pad(states[:, engine.columns].flatten(1), (0, 0, 0, 1))


def _has_room(waiting: "deque[AskedRow]", row: AskedRow, max_waiting_tokens: int) -> bool:
    """Whether a row may be sent now; equal rows share a file, so one waits for the other."""
    num_tokens = sum(len(sent.fed) for sent in waiting) + len(row.fed)
    is_new = all(sent.path != row.path for sent in waiting)
    return not waiting or (num_tokens <= max_waiting_tokens and is_new)


def take_states(row: AskedRow, process: VllmProcess) -> Tensor:
    """Wait for a row's file, `[N, L, E]` of the tokens fed, and remove it."""
    process.wait_for(row.path)
    tensors = load_file(row.path)
    if tensors["token_ids"].tolist() != row.fed:
        raise RuntimeError(f"{row.path} holds the states of other tokens than were asked for.")
    row.path.unlink()
    return tensors["hidden_states"]
