"""The kernels compiled, where the other tests interpret them: a process of its own on a GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from dflash_train.drafter.config import Visibility

if TYPE_CHECKING:
    from test_block_attention import Case

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.gpu
def test_a_gpu_gives_what_torch_gives_and_gives_it_again() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    search_path = os.pathsep.join(str(ROOT / each) for each in ("", "kernels"))
    result = subprocess.run(
        [sys.executable, __file__],
        env=environment | {"PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal") == 10


def main() -> None:
    """Compare at shapes of real drafters with the tiles of the device."""
    from test_block_attention import Case, compare  # beside this file

    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    places = torch.randperm(700, generator=torch.Generator().manual_seed(1))[:40].tolist()
    case = Case(
        lengths=(700, 50, 300), anchors=(tuple(places), (), (0, 300, 12, 77)), num_slots=16,
        kv_heads=2, share=4, head_dim=128, configs=None, device="cuda",
    )  # fmt: skip
    shapes = ({}, {"head_dim": 256}, {"head_dim": 60, "num_slots": 7}, {"share": 5})
    for dtype, tried_shapes in ((torch.float32, shapes[:1]), (torch.bfloat16, shapes)):
        for visibility in (Visibility(), Visibility(window=100, is_causal=True)):
            for shape in tried_shapes:
                tried = replace(case, dtype=dtype, visibility=visibility, **shape)
                compare(tried)
                assert gradients_repeat(tried)
                print(dtype, visibility, shape, "equal")


def gradients_repeat(case: "Case") -> bool:
    """Tell whether two runs give the same bits."""
    from test_block_attention import NAMES, by_kernels  # beside this file

    runs = []
    for _ in range(2):
        inputs = {name: each.requires_grad_() for name, each in case.inputs().items()}
        out = by_kernels(case, inputs)
        grads = torch.autograd.grad(out, [inputs[name] for name in NAMES], inputs["d_out"])
        runs.append([out, *grads])
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


if __name__ == "__main__":
    main()
