"""DeepSpeed's engines on one CPU process, by the launch files that GPUs use: `make engines`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dflash_train.testing import assert_close, tiny_target
from tests.test_train.launched_runs import ENGINES, by_accelerate, fit, launch_runs, losses

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed", reason="pip install 'dflash-train[deepspeed]'")

COMPARED = [name for name in ENGINES if name not in ("engine-cut", "engine-goes-on")]


@pytest.fixture(scope="module")
def rows(answer_rows) -> list:
    return answer_rows(tiny_target(), [5, 9, 7, 12, 6, 8, 10])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, rows: list, write_split) -> Path:
    """The same runs without DeepSpeed."""
    folder = tmp_path_factory.mktemp("plain")
    write_split(folder / "uneven", rows)
    for name in COMPARED:
        fit(folder, ENGINES[name], name)
    return folder


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, rows: list,
    write_split,
) -> Path:  # fmt: skip
    """All runs under an engine, in one launch."""
    folder = tmp_path_factory.mktemp(request.param)
    write_split(folder / "uneven", rows)
    launcher = by_accelerate(request.param, 1)
    launch_runs(launcher, folder, ENGINES, environment={"DS_ACCELERATOR": "cpu"})
    return folder


@pytest.mark.parametrize("name", COMPARED)
def test_an_engine_gives_the_losses_and_weights_of_the_plain_run(
    engine: Path, plain: Path, name: str
):
    got, want = losses(engine, name), losses(plain, name)
    assert len(want) == 20
    assert got == pytest.approx(want, rel=1e-4)
    weights = load_file(engine / f"{name}-rank-0" / "model.safetensors")
    for key, tensor in load_file(plain / f"{name}-rank-0" / "model.safetensors").items():
        assert weights[key].dtype == torch.float32
        # 20 steps of AdamW on gradients that differ in their last bit.
        assert_close(f"{name}: {key}", weights[key], tensor, 1e-3)


def test_a_run_under_an_engine_resumes_to_the_same_weights(engine: Path):
    fit_losses = losses(engine, "engine")
    assert len(fit_losses) == 20
    resumed = load_file(engine / "engine-goes-on-rank-0" / "model.safetensors")
    assert (engine / "engine-cut-stopped-0").exists()
    for key, tensor in load_file(engine / "engine-whole-rank-0" / "model.safetensors").items():
        assert torch.equal(resumed[key], tensor), key
