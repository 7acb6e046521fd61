"""Our side of the capture and the driver, with a stand-in where vLLM's engine would be.

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

from dflash_data.collect.vllm_capture.capture import VllmEngine, capture_features
from dflash_data.collect.vllm_capture.vllm_process import DRIVER, LOG_NAME
from dflash_train.config import UnavailableError
from dflash_train.features.target_weights import TargetLocation
from dflash_train.testing import save_tiny_target
from tests.test_data.vllm_stand_in import HIDDEN_SIZE, python_with_stand_in, stand_in_features

ROWS = [[5, 6, 7, 8], [9, 10, 11], [5, 6, 7, 8], [12], [13, 14, 15, 16, 17]]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetLocation:
    folder = save_tiny_target(tmp_path_factory.mktemp("target"))
    return TargetLocation(path=str(folder), revision=None, label="tiny")


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return python_with_stand_in(tmp_path, monkeypatch)


def an_engine(python: Path, target: TargetLocation, **changes: object) -> VllmEngine:
    settings = {"target_layer_ids": [3, 1], "max_row_tokens": 8, "dtype": "float32"} | changes
    return VllmEngine(python=python, target=target, **settings)  # pyright: ignore[reportArgumentType]


def want(row: list[int]) -> Tensor:
    return stand_in_features(row, [3, 1])


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
    with pytest.raises(UnavailableError, match=r"MemoryError: no page is left(.|\n)*Its log is"):
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
