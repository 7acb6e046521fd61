import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dflash_train.config import LaunchConfig, Precision
from dflash_train.testing import assert_close
from dflash_train.training.accelerator import build_accelerator, cpu_products, threads_per_process

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="describes the CPU path")

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import torch
from dflash_train.config import LaunchConfig
from dflash_train.training.accelerator import build_accelerator
accelerator = build_accelerator(LaunchConfig())
print(torch.get_num_threads())
"""


def test_threads_come_from_the_recipe_or_are_shared_among_local_processes(
    monkeypatch: pytest.MonkeyPatch,
):
    assert threads_per_process(LaunchConfig(num_threads=7)) == 7
    alone = threads_per_process(LaunchConfig())
    assert alone >= 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert threads_per_process(LaunchConfig()) == max(1, alone // 2)


def test_the_environment_of_accelerate_launch_does_not_change_the_threads():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert int(result.stdout) == threads_per_process(LaunchConfig())


def test_bf16_on_a_cpu_keeps_float32_tensors_and_ends_with_the_block():
    launch = LaunchConfig(num_threads=1, mixed_precision=Precision.bf16)
    assert build_accelerator(launch).mixed_precision == "no"
    before = torch.get_float32_matmul_precision()
    left, right = torch.randn(64, 300), torch.randn(300, 80)
    with cpu_products(launch):
        assert torch.get_float32_matmul_precision() == "medium"
        product = left @ right
    assert torch.get_float32_matmul_precision() == before
    assert product.dtype == torch.float32
    assert_close("product", product, left @ right, 5e-3)
    with cpu_products(LaunchConfig()):
        assert torch.get_float32_matmul_precision() == before
