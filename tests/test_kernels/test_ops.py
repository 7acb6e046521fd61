import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dflash_train import ops
from dflash_train.config import KernelChoice, LaunchConfig, LossConfig, compose
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.target import Target
from dflash_train.ops import TORCH_OPS, TRITON_OPS, choose_ops
from dflash_train.testing import LIMITS, assert_close, tiny_drafter, tiny_target
from dflash_train.training.drafter_loss import DrafterLoss
from dflash_train.training.head_sweep import sweep_head
from dflash_train.training.head_tiles import HeadSettings, SlotTargets

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLOAT = torch.float32


@pytest.fixture(autouse=True)
def _unasked() -> Iterator[None]:
    """Forget what was chosen before, so that each test hears what is said."""
    for each in (ops._choose, ops._say):
        each.cache_clear()
    yield
    for each in (ops._choose, ops._say):
        each.cache_clear()


@pytest.fixture
def target() -> Target:
    return tiny_target()


@pytest.fixture
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_is_interpreted", lambda: False)


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch, not_interpreted: None) -> None:
    """Answer what torch would on a machine with this GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")


@pytest.mark.usefixtures("h200")
def test_a_gpu_gets_triton_and_one_line_says_so(capfd: pytest.CaptureFixture[str]):
    for _ in range(3):
        assert choose_ops(KernelChoice.auto, CUDA, FLOAT) is TRITON_OPS
    assert capfd.readouterr().err.splitlines() == [
        "kernels: Triton on NVIDIA H200; torch for the head of DSpark drafters"
    ]


@pytest.mark.usefixtures("not_interpreted")
def test_a_cpu_gets_torch_and_one_line_says_why(capfd: pytest.CaptureFixture[str]):
    for dtype in (FLOAT, torch.bfloat16, FLOAT):
        assert choose_ops(KernelChoice.auto, CPU, dtype) is TORCH_OPS
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("kernels: torch: a cpu runs Triton's kernels under TRITON_INTERPRET=1")


@pytest.mark.usefixtures("h200")
def test_torch_can_be_forced_on_a_gpu():
    assert choose_ops(KernelChoice.torch, CUDA, FLOAT) is TORCH_OPS


def test_triton_can_be_forced_on_a_cpu_that_interprets_and_is_never_taken_there_unasked():
    assert choose_ops(KernelChoice.triton, CPU, FLOAT) is TRITON_OPS
    assert choose_ops(KernelChoice.auto, CPU, FLOAT) is TORCH_OPS


@pytest.mark.usefixtures("not_interpreted")
def test_triton_forced_on_a_cpu_is_refused_before_any_work(target: Target):
    launch = LaunchConfig(kernels=KernelChoice.triton)
    with pytest.raises(ValueError, match=r"launch.kernels \(=triton\): a cpu .* Set it to auto"):
        DrafterLoss(tiny_drafter(target), target.head, launch=launch)


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("package", ["triton", "dflash_kernels"])
def test_without_its_packages_a_gpu_gets_torch(monkeypatch: pytest.MonkeyPatch, package: str):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    assert choose_ops(KernelChoice.auto, CUDA, FLOAT) is TORCH_OPS
    with pytest.raises(ValueError, match=rf"{package} is not installed \(pip install"):
        choose_ops(KernelChoice.triton, CUDA, FLOAT)


@pytest.mark.usefixtures("h200")
def test_old_gpus_and_float64_get_torch(monkeypatch: pytest.MonkeyPatch):
    assert choose_ops(KernelChoice.auto, CUDA, torch.float64) is TORCH_OPS
    ops._choose.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert choose_ops(KernelChoice.auto, CUDA, FLOAT) is TORCH_OPS
    with pytest.raises(ValueError, match=r"compute capability 7\.5 is older than 8\.0"):
        choose_ops(KernelChoice.triton, CUDA, FLOAT)


def test_the_key_is_a_recipe_key():
    config = compose(["recipe=smollm2", "launch.kernels=torch"])
    assert config.launch.kernels is KernelChoice.torch


def test_the_package_works_where_triton_cannot_be_imported(tmp_path: Path):
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')")
    code = """
import sys, torch
import dflash_train.cli, dflash_inference.decoder
from dflash_train.testing import tiny_drafter, tiny_target
target = tiny_target()
drafter = tiny_drafter(target)
drafter.draft_step(torch.zeros(4, 32), torch.zeros(3, 64), drafter.new_cache())
assert not {"triton", "dflash_kernels"} & {name.split(".")[0] for name in sys.modules}
"""
    folders = [tmp_path, *(ROOT / name for name in ("", "inference", "kernels"))]
    search_path = os.pathsep.join(map(str, folders))
    environment = os.environ | {"PYTHONPATH": search_path, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kernels: torch" in done.stderr


def served(drafter: Drafter, target: Target, features: torch.Tensor) -> torch.Tensor:
    """Draft behind three parts of a context, the later ones written into a cache that grows."""
    cache = drafter.new_cache()
    anchor = torch.tensor([5])
    block = block_embeddings(target.head, anchor, num_slots=4, config=drafter.config)[0]
    with torch.no_grad():
        return torch.stack(
            [drafter.draft_step(block, part, cache) for part in features.split([9, 1, 5])]
        )


def test_a_drafter_serves_the_same_states_by_either(target: Target):
    drafter, features = tiny_drafter(target), torch.randn(15, 64)
    drafter.kernels = KernelChoice.triton
    got = served(drafter, target, features)
    drafter.kernels = KernelChoice.torch
    assert_close("hidden", got, served(drafter, target, features), LIMITS[FLOAT][0])


def test_a_multiplier_that_turns_the_order_around_is_left_to_torch():
    hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
    labels = torch.arange(5)
    none = labels.new_zeros((5, 0))
    targets = SlotTargets(labels=labels, teacher_ids=none, teacher_p=none.float())
    head = HeadSettings(weight=weight, loss=LossConfig(), multiplier=-1.0)
    got, want = (sweep(hidden, targets, head) for sweep in (TRITON_OPS.sweep_head, sweep_head))
    assert torch.equal(got.loss, want.loss)
