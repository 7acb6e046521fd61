"""A vLLM that stays up while the drafter learns: `data.features=online` with its engine.

    dflash-train run recipe=smollm2 data.features=online data.collect_engine=vllm \\
        data.vllm_python=VENV/bin/python

The process and the files on the way are those of `vllm_capture`; here rows come a few at a time, in
the order in which training asks, and no file outlives the row that it is read for. vLLM groups rows
by when they arrive, so a repeated run has the same features within rounding only.
"""

import shutil
from pathlib import Path
from types import TracebackType

from dflash_data.collect.vllm_capture.capture import (
    AskedRow,
    VllmEngine,
    row_features,
    take_states,
)
from dflash_data.collect.vllm_capture.vllm_process import VllmProcess
from dflash_train.features.target import ReadAnswer


class VllmStream:
    """Reads finished rows as `Target.read_answers` does, in a vLLM that the first one starts.

    A context manager: without an error, vLLM and its folder are gone afterwards.
    """

    def __init__(self, engine: VllmEngine, folder: Path) -> None:
        """Start nothing yet.

        Args:
            engine: Which vLLM, and of which target.
            folder: Scratch for vLLM's log and for features on their way.
        """
        self._engine = engine
        self._folder = folder.resolve()
        self._process = VllmProcess(engine.python, self._folder, engine.job(self._folder))

    def __enter__(self) -> "VllmStream":
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._process.__exit__(kind, error, trace)
        if kind is None:
            shutil.rmtree(self._folder)

    def read_answers(
        self, rows: list[list[int]], *, prompt_lengths: list[int], teacher_top_k: int
    ) -> list[ReadAnswer]:
        """Send rows together and wait for their features; vLLM gives no distributions.

        Raises:
            UnavailableError: vLLM stopped.
        """
        assert teacher_top_k == 0, "DataConfig refuses a teacher with this engine"
        asked = [AskedRow.of(ids, self._engine, self._folder) for ids in rows]
        files = {row.path: row for row in asked}  # equal rows share one
        for row in files.values():
            if not row.path.exists():
                self._process.send(row.path, row.fed)
        states = {path: take_states(row, self._process) for path, row in files.items()}
        return [ReadAnswer(features=row_features(states[row.path], self._engine)) for row in asked]
