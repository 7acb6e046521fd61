"""Our side of the capture and the driver, with a stand-in where vLLM's engine would be.

The stand-in gives states that are a formula of token and layer, and finishes the newest row first.
The real engine is compared with the target in tests/end_to_end/test_vllm_features.py.
"""

import ast
import importlib.util
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dflash_data.collect.vllm_capture.capture import DRIVER, LOG_NAME, VllmEngine, capture_features
from dflash_train.config import UnavailableError
from dflash_train.features.target_weights import TargetLocation
from dflash_train.testing import save_tiny_target

HIDDEN_SIZE = 32
ROWS = [[5, 6, 7, 8], [9, 10, 11], [5, 6, 7, 8], [12], [13, 14, 15, 16, 17]]
STAND_IN = """
import os
import numpy
from safetensors.numpy import save_file

__version__ = "0.32.0"


class SamplingParams:
    def __init__(self, *, extra_args, **_):
        self.path = extra_args["kv_transfer_params"]["hidden_states_path"]


class LLM:
    def __init__(self, *, speculative_config, **_):
        extra = speculative_config["draft_model_config"]["hf_config"]
        self.layers = numpy.array(extra["eagle_aux_hidden_state_layer_ids"], numpy.float32)
        self.llm_engine = self.engine_core = self.scheduler = self
        self.rows = []

    def add_request(self, _name, prompt, parameters):
        if 666 in prompt["prompt_token_ids"]:
            raise MemoryError("no page is left")
        self.rows.append((prompt["prompt_token_ids"], parameters.path))

    def has_requests(self):
        return bool(self.rows)

    def step(self):
        if self.rows:
            ids, path = self.rows.pop()
            with open(os.environ["STAND_IN_LOG"], "a") as log:
                log.write(f"{ids[0]}\\n")
            states = numpy.array(ids, numpy.float32)[:, None, None] + self.layers[:, None] / 100
            states = numpy.broadcast_to(states, (len(ids), len(self.layers), 32)).copy()
            save_file({"hidden_states": states, "token_ids": numpy.array(ids)}, path + ".partial")
            os.replace(path + ".partial", path)
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetLocation:
    folder = save_tiny_target(tmp_path_factory.mktemp("target"))
    return TargetLocation(path=str(folder), revision=None, label="tiny")


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter that finds the stand-in under vLLM's name."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "vllm.py").write_text(STAND_IN)
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "run.txt"))
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def an_engine(python: Path, target: TargetLocation, **changes: object) -> VllmEngine:
    settings = {"target_layer_ids": [3, 1], "max_row_tokens": 8, "dtype": "float32"} | changes
    return VllmEngine(python=python, target=target, **settings)  # pyright: ignore[reportArgumentType]


def want(row: list[int]) -> Tensor:
    """Features by the stand-in's formula, for taps 3 and 1, which vLLM calls 4 and 2."""
    states = torch.tensor(row[:-1], dtype=torch.float32)[:, None] + torch.tensor([0.04, 0.02])
    return torch.nn.functional.pad(states.repeat_interleave(HIDDEN_SIZE, dim=1), (0, 0, 0, 1))


@pytest.mark.parametrize("name", ["driver.py", "hidden_state_files.py"])
def test_what_runs_inside_vllm_imports_nothing_of_ours(name: str) -> None:
    tree = ast.parse(DRIVER.with_name(name).read_text())
    names = {
        source
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for source in (
            [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    allowed = {*sys.stdlib_module_names, "torch", "safetensors", "vllm"}
    assert {source.split(".")[0] for source in names} <= allowed


def test_features_come_in_the_order_asked_with_the_columns_of_the_taps(
    python: Path, target: TargetLocation, tmp_path: Path
) -> None:
    folder = tmp_path / "capture"
    found = list(capture_features(iter(ROWS), engine=an_engine(python, target), folder=folder))
    assert len(found) == len(ROWS)
    for got, row in zip(found, ROWS, strict=True):
        torch.testing.assert_close(got, want(row))
    assert not folder.exists()


def test_files_that_nobody_read_stay_within_the_limit(
    python: Path, target: TargetLocation, tmp_path: Path
) -> None:
    folder, two_rows = tmp_path / "capture", 2 * 3 * 2 * HIDDEN_SIZE * 4
    engine = an_engine(python, target, max_waiting_bytes=two_rows)
    rows = [[number, 1, 1, 0] for number in range(20, 40)]
    for index, got in enumerate(capture_features(rows, engine=engine, folder=folder)):
        torch.testing.assert_close(got, want(rows[index]))
        assert len(list(folder.glob("*.safetensors*"))) <= 2


def test_a_row_above_the_limit_still_passes(
    python: Path, target: TargetLocation, tmp_path: Path
) -> None:
    engine = an_engine(python, target, max_waiting_bytes=1)
    assert len(list(capture_features(ROWS, engine=engine, folder=tmp_path / "capture"))) == 5


def test_a_second_try_runs_only_rows_without_a_file(
    python: Path, target: TargetLocation, tmp_path: Path
) -> None:
    folder, rows = tmp_path / "capture", [[number, 1, 0] for number in range(20, 30)]
    engine = an_engine(python, target)
    first = capture_features(rows, engine=engine, folder=folder)
    read = [next(first) for _ in range(3)]
    while len(list(folder.glob("*.safetensors"))) < 7:
        assert "capture: " not in (folder / LOG_NAME).read_text()
    first.close()
    read += capture_features(rows[3:], engine=engine, folder=folder)
    for got, row in zip(read, rows, strict=True):
        torch.testing.assert_close(got, want(row))
    ran = (tmp_path / "run.txt").read_text().split()
    assert sorted(ran) == sorted(str(row[0]) for row in rows)


def test_files_of_other_taps_are_not_taken(
    python: Path, target: TargetLocation, tmp_path: Path
) -> None:
    folder = tmp_path / "capture"
    other = capture_features(
        ROWS[:2], engine=an_engine(python, target, target_layer_ids=[0, 2]), folder=folder
    )
    next(other)
    other.close()
    (got,) = islice(capture_features(ROWS[1:2], engine=an_engine(python, target), folder=folder), 1)
    torch.testing.assert_close(got, want(ROWS[1]))


def test_the_driver_finishes_and_ends_when_its_input_ends(python: Path, tmp_path: Path) -> None:
    job = {"model": "m", "revision": None, "dtype": "float32", "max_model_len": 8, "settings": {}}
    job |= {"vllm_layer_ids": [2], "folder": str(tmp_path)}
    (tmp_path / "job.json").write_text(json.dumps(job))
    lines = [{"path": str(tmp_path / f"{k}.safetensors"), "token_ids": [k, 9]} for k in range(5)]
    subprocess.run(
        [python, DRIVER, tmp_path / "job.json"],
        input="".join(json.dumps(line) + "\n" for line in lines),
        text=True,
        check=True,
        timeout=60,
    )
    assert all(Path(line["path"]).exists() for line in lines)


def test_an_engine_that_stops_is_reported_with_its_reason(
    python: Path, target: TargetLocation, tmp_path: Path
) -> None:
    folder, engine = tmp_path / "capture", an_engine(python, target)
    with pytest.raises(UnavailableError, match=r"MemoryError: no page is left.* Its log is"):
        list(capture_features([*ROWS, [666, 1, 2]], engine=engine, folder=folder))
    assert (folder / LOG_NAME).exists()


def test_another_release_of_vllm_is_refused(
    python: Path, target: TargetLocation, tmp_path: Path
) -> None:
    (tmp_path / "site" / "vllm.py").write_text('__version__ = "0.9.1"')
    with pytest.raises(UnavailableError, match=r"vLLM 0\.9\.1, not 0\.32"):
        list(capture_features(ROWS, engine=an_engine(python, target), folder=tmp_path / "capture"))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="this Python has vLLM")
def test_a_python_without_vllm_is_named(target: TargetLocation, tmp_path: Path) -> None:
    engine = an_engine(Path(sys.executable), target)
    with pytest.raises(UnavailableError, match=rf"{sys.executable} .*has no vLLM.*Install"):
        list(capture_features(ROWS, engine=engine, folder=tmp_path / "capture"))


def test_a_path_that_is_no_interpreter_is_refused(target: TargetLocation, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.vllm_python .* is not an interpreter"):
        an_engine(tmp_path / "none", target)


@pytest.mark.parametrize("layers", [[5], [-1], [1, 6]])
def test_a_tap_layer_out_of_range_is_refused(
    layers: list[int], python: Path, target: TargetLocation, tmp_path: Path
) -> None:
    engine = an_engine(python, target, target_layer_ids=layers)
    with pytest.raises(ValueError, match=r"drafter\.target_layer_ids .* must lie in 0\.\.4"):
        list(capture_features(ROWS, engine=engine, folder=tmp_path / "capture"))


@pytest.mark.parametrize("row", [[], [1] * 9])
def test_an_empty_or_too_long_row_is_refused(
    row: list[int], python: Path, target: TargetLocation, tmp_path: Path
) -> None:
    engine = an_engine(python, target)
    with pytest.raises(ValueError, match=r"max_row_tokens \(=8\)"):
        list(capture_features([row], engine=engine, folder=tmp_path / "capture"))
