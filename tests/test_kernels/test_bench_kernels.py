import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import bench_kernels, kernel_cases
from benchmarks.bench_kernels import Timing, check_numbers, chip_of, table
from benchmarks.kernel_cases import CASES, FLEX, OURS, TWIN, CaseOf, Sizes

ROOT = Path(__file__).resolve().parents[2]
TINY = Sizes(
    num_blocks=5, num_slots=4, num_tokens=37, num_heads=4, num_kv_heads=2, head_dim=16,
    hidden_size=24, vocab_size=67, num_layers=2,
)  # fmt: skip
CPU = torch.device("cpu")


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    search_path = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "inference"))
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_kernels", *arguments],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_all_contenders_compute_the_same_before_anything_is_timed(build: CaseOf):
    found = check_numbers(build, TINY, device=CPU, dtype=torch.float32)
    contenders = {each.contender for each in found}
    assert {OURS, TWIN} <= contenders
    assert (FLEX in contenders) == (build is kernel_cases.attention_case)
    assert all(each.gradient is not None for each in found if each.contender != FLEX)


def test_a_contender_with_other_numbers_ends_the_bench(monkeypatch: pytest.MonkeyPatch):
    def flex(inputs: list[Tensor], mask: object) -> list[Tensor]:
        return [inputs[0].detach()]

    monkeypatch.setattr(kernel_cases, "_flex", flex)
    with pytest.raises(RuntimeError, match=r"block_attention, FlexAttention: RMS error .* of out"):
        check_numbers(kernel_cases.attention_case, TINY, device=CPU, dtype=torch.float32)


def test_the_table_sets_times_beside_roofline_and_twin():
    chip = chip_of("NVIDIA H200")
    assert chip is not None
    rooflines = bench_kernels._rooflines("block_attention", chip)
    timings = [
        Timing(op="block_attention", stage="forward", contender=name, ms=ms,
               roofline_ms=rooflines["forward"])
        for name, ms in ((OURS, 2 * rooflines["forward"]), (TWIN, 8 * rooflines["forward"]))
    ]  # fmt: skip
    ours, twin = table(timings).splitlines()[2:]
    assert ours.endswith("| 50% | 0.25 |")
    assert twin.endswith("| 12% | 1.00 |")


def test_every_op_has_a_roofline_and_an_unknown_chip_has_none():
    chip = chip_of("NVIDIA H100 80GB HBM3")
    assert chip is not None
    for op in ("block_attention", "block_cross_entropy", "context_kv"):
        assert all(ms > 0 for ms in bench_kernels._rooflines(op, chip).values())
    assert chip_of("GeForce") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would time")
def test_a_machine_without_a_gpu_says_so():
    done = run_bench()
    assert done.returncode == 0, done.stderr
    *_, said, line = done.stdout.splitlines()
    assert "no CUDA or ROCm device here" in said
    found = json.loads(line)
    assert (found["benchmark"], found["device"], found["timings"]) == ("kernels", None, [])


@pytest.mark.gpu
def test_a_gpu_is_timed():
    done = run_bench("--blocks", "16", "--tokens", "256", "--vocabulary", "1000")
    assert done.returncode == 0, done.stderr
    timings = json.loads(done.stdout.splitlines()[-1])["timings"]
    assert {each["op"] for each in timings} == {
        "block_attention", "block_cross_entropy", "context_kv"
    }  # fmt: skip
    assert all(each["ms"] > 0 for each in timings)
