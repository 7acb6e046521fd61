"""Every launch file on two real GPUs against one process; needs a machine that has them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dflash_train.testing import assert_close, tiny_target
from tests.test_train.launched_runs import GPU_RUNS, by_accelerate, launch_runs, losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

LAUNCHES = ["ddp", "fsdp2", "zero2", "zero3"]
RESHARDED = ["ddp", "fsdp2"]
FLOAT32, BFLOAT16 = 1e-4, 2e-2
"""Relative difference of losses over 20 steps: sums in another order; products of 8 bits."""


@pytest.fixture(scope="module")
def rows(answer_rows) -> list:
    return answer_rows(tiny_target(), [5, 9, 7, 12, 6, 8, 10])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, rows: list, write_split) -> Path:
    """All runs on one GPU, with twice the accumulation."""
    folder = tmp_path_factory.mktemp("alone")
    write_split(folder / "uneven", rows)
    launch_runs(by_accelerate("single", 1), folder, [f"{name} alone" for name in GPU_RUNS])
    return folder


@pytest.fixture(scope="module", params=LAUNCHES)
def together(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, rows: list,
    write_split,
) -> Path:  # fmt: skip
    """All runs on two GPUs."""
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed", reason="pip install 'dflash-train[deepspeed]'")
    folder = tmp_path_factory.mktemp(request.param)
    write_split(folder / "uneven", rows)
    launch_runs(by_accelerate(request.param, 2), folder, GPU_RUNS)
    return folder


@pytest.mark.parametrize("name", GPU_RUNS)
def test_two_gpus_give_the_losses_of_one(together: Path, alone: Path, name: str):
    limit = BFLOAT16 if name.endswith("bf16") else FLOAT32
    got, want = losses(together, name), losses(alone, f"{name} alone")
    assert len(want) == 20
    assert got == pytest.approx(want, rel=limit)
    ranks = [load_file(together / f"{name}-rank-{r}" / "model.safetensors") for r in range(2)]
    for key, tensor in ranks[0].items():
        assert tensor.dtype in (torch.float32, torch.int64), "masters, also under bf16"
        assert torch.equal(tensor, ranks[1][key]), key


@pytest.mark.parametrize("launch_file", RESHARDED)
def test_a_state_of_two_gpus_goes_on_on_one(
    tmp_path: Path, alone: Path, rows: list, write_split, launch_file: str
):
    write_split(tmp_path / "uneven", rows)
    launch_runs(by_accelerate(launch_file, 2), tmp_path, ["gpu-cut"])
    said = launch_runs(by_accelerate(launch_file, 1), tmp_path, ["gpu-goes-on"])
    assert "a step still takes 2 packs, 2 per process" in said
    got = load_file(tmp_path / "gpu-goes-on-rank-0" / "model.safetensors")
    want = load_file(alone / "gpu-plain-no alone-rank-0" / "model.safetensors")
    for key, tensor in want.items():
        assert_close(key, got[key], tensor, 1e-3)  # 20 steps of AdamW on sums of another order
