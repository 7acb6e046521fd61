"""Planned rows through a vLLM process: the reader of `data.collect_engine=vllm`.

    dflash-train collect recipe=smollm2 data.collect_engine=vllm data.vllm_python=VENV/bin/python

vLLM gets the rows of all unwritten shards in the order of the plan and batches them itself, so it
starts once and never waits for a shard to be written. Here the target is not loaded at all: its
tokenizer plans, and vLLM loads the weights.
"""

import contextlib
import dataclasses
from collections.abc import Generator
from itertools import islice
from pathlib import Path

from dflash_data.collect.forward import PlannedBatch, encode_answers, stored_dtype
from dflash_data.collect.vllm_capture.capture import VllmEngine, capture_features
from dflash_data.collect.vllm_capture.vllm_process import vllm_version
from dflash_train.config import CollectEngine, DataConfig, RecipeConfig, VllmSettings, require
from dflash_train.features.shard import EncodedRows, bytes_per_token
from dflash_train.features.target import ReadAnswer
from dflash_train.features.target_text import WrittenTarget
from dflash_train.features.target_weights import locate_target


class VllmReader:
    """A vLLM process that is started by the first row without features."""

    def __init__(self, config: RecipeConfig, target: WrittenTarget, *, folder: Path) -> None:
        """Ask the other Python for its vLLM, and start nothing yet.

        Args:
            config: The recipe.
            target: The recipe's target; its weights are not needed here.
            folder: For vLLM's log and for features on their way; removed when all are read.

        Raises:
            ValueError: `data.vllm_python` is not an interpreter, or a tap layer is out of range.
            UnavailableError: It has no vLLM, or a release that was never tried.
        """
        self.target = target
        self._data = config.data
        self._folder = folder
        self._engine = vllm_engine(
            config,
            target_layer_ids=target.describe()["target_layer_ids"],
            max_row_tokens=1,  # `read` knows the longest row
        )
        self._hidden_size = self._engine.hidden_size()
        vllm_version(self._engine.python)

    @property
    def token_bytes(self) -> int:
        """Stored bytes of one token."""
        num_taps = len(self._engine.target_layer_ids)
        return bytes_per_token(
            num_taps * self._hidden_size,
            dtype=stored_dtype(self._data),
            num_taps=num_taps,
            teacher_top_k=0,
        )

    def scratch_bytes(self, num_tokens: int) -> int:
        """Give the most that the files hold which vLLM has written and nobody has read yet."""
        return min(self._engine.max_waiting_bytes, num_tokens * self._engine.token_bytes())

    def read(self, batches: list[PlannedBatch]) -> Generator[EncodedRows]:
        """Feed all rows and yield them batch by batch.

        Raises:
            UnavailableError: vLLM stopped.
        """
        engine = dataclasses.replace(self._engine, max_row_tokens=_longest(batches))
        fed = (row.input_ids for batch in batches for row in batch.rows())
        with contextlib.closing(
            capture_features(fed, engine=engine, folder=self._folder)
        ) as captured:
            for batch in batches:
                rows = batch.rows()
                answers = [ReadAnswer(features=each) for each in islice(captured, len(rows))]
                num_taps = len(engine.target_layer_ids)
                yield encode_answers(rows, answers, data=self._data, num_taps=num_taps)
            for _ in captured:  # at its end vLLM is let go and the folder removed
                raise RuntimeError("vLLM gave more rows than were planned.")


def vllm_engine(
    config: RecipeConfig, *, target_layer_ids: list[int], max_row_tokens: int
) -> VllmEngine:
    """Say which vLLM reads the recipe's target; nothing is started.

    Args:
        config: The recipe.
        target_layer_ids: Tap layers, in the order of the feature columns.
        max_row_tokens: Longest row, in tokens.

    Raises:
        ValueError: `data.vllm_python` is not an interpreter.
    """
    return VllmEngine(
        python=vllm_python(config.data),
        target=locate_target(config.target),
        dtype=config.target.dtype.value,
        target_layer_ids=target_layer_ids,
        max_row_tokens=max_row_tokens,
        settings=_chosen(config.data.vllm_settings),
    )


def vllm_python(data: DataConfig) -> Path:
    """Give the interpreter that runs vLLM."""
    assert data.vllm_python is not None, "DataConfig has checked it"
    return Path(data.vllm_python).expanduser()


def engine_versions(data: DataConfig) -> dict[str, str]:
    """Check what runs the target in `collect`, and give its version for the manifest.

    Returns:
        By package; nothing for an engine of this Python, whose packages every manifest lists.

    Raises:
        ValueError: `data.vllm_python` is not an interpreter.
        UnavailableError: It has no vLLM, or a release that was never tried.
    """
    if data.collect_engine is not CollectEngine.vllm:
        return {}
    return {"vllm": vllm_version(vllm_python(data))}


def require_one_feeder(data: DataConfig, *, num_processes: int) -> None:
    """Raise ValueError where several processes would each start a vLLM."""
    require(
        data.collect_engine is not CollectEngine.vllm or num_processes == 1,
        f"data.collect_engine (=vllm) is fed by one process, and {num_processes} were launched. "
        "Start it with `dflash-train`, without accelerate, or set data.collect_engine to "
        "transformers.",
    )


def _chosen(settings: VllmSettings) -> dict[str, int | float]:
    """Give the settings that the recipe sets, by vLLM's names."""
    return {name: value for name, value in vars(settings).items() if value is not None}


def _longest(batches: list[PlannedBatch]) -> int:
    """Give the tokens of the longest row, which is the last of its batch."""
    lasts = (batch.plan.read_rows(batch.places[-1:]) for batch in batches)
    return max(len(row.input_ids) for rows in lasts for row in rows)
