import os
import subprocess
import sys

import pytest

from dflash_kernels._launch import Arch
from dflash_kernels.block_cross_entropy import kernels_to_compile, work


def test_no_product_with_the_head_is_done_twice():
    counted = work()
    flops, bound = (sum(getattr(w, name) for w in counted) for name in ("flops", "bound_flops"))
    assert bound == 2 * 2 * 7680 * 151936 * 4096
    assert flops <= 1.55 * bound
    assert flops == bound


def test_bytes_follow_the_chunks():
    head, logits = 2 * 1000 * 16, 40 * 1000 * 4
    few, many = (
        {
            each.name.split()[1]: each.num_bytes
            for each in work(num_slots=40, vocabulary=1000, width=16, max_logit_bytes=budget)
        }
        for budget in (64 * 6000, 8 * 6000)
    )
    assert few["logits"] == head + logits + 2 * 40 * 16
    assert many["logits"] == few["logits"] + 4 * head  # five chunks of eight slots
    assert many["hidden"] == few["hidden"] + 4 * head
    assert many["sum_rows"] == few["sum_rows"]
    assert few["sum_rows"] >= logits
    assert few["write_gradients"] >= logits * 3 // 2


@pytest.mark.parametrize("arch", [arch for arch in Arch if arch is not Arch.interpreter])
def test_what_is_compiled_has_all_arguments_of_its_kernel(arch: Arch):
    for specimen in kernels_to_compile(arch):
        names = [*specimen.signature, *specimen.constexprs, *specimen.config.tiles]
        assert sorted(names) == sorted(specimen.kernel.arg_names)


ON_A_GPU = """
import torch
from dflash_kernels.block_cross_entropy import CrossEntropySettings, block_cross_entropy
from dflash_train.config import LossConfig
from dflash_train.testing import assert_close
from dflash_train.training.head_sweep import sweep_head
from dflash_train.training.head_tiles import HeadSettings, SlotTargets

torch.manual_seed(0)
slots, vocabulary, width, k = 300, 10007, 257, 9
weights = {"ce": 0.3, "kl": 0.5, "tv": 1.8, "lk_alpha": 0.2, "lk_lambda": 0.7}
for dtype, limit, grad_limit in ((torch.float32, 1e-5, 1e-4), (torch.bfloat16, 5e-3, 2e-2)):
    hidden = (torch.randn(slots, width) * 2 / width**0.5).to(dtype)
    weight, labels = torch.randn(vocabulary, width).to(dtype), torch.arange(slots)
    p, ids = (3 * torch.randn(slots, vocabulary)).softmax(-1).topk(k)
    shape = {"multiplier": 0.9, "cap": 20.0, "num_candidates": 16}
    wide = hidden.double().requires_grad_()
    want = sweep_head(
        wide, SlotTargets(labels=labels, teacher_ids=ids, teacher_p=p.double()),
        HeadSettings(weight=weight.double(), loss=LossConfig(**weights), **shape),
    )
    low = hidden.cuda().requires_grad_()
    got = block_cross_entropy(
        low, weight_VE=weight.cuda(), labels_S=labels.cuda(), teacher_ids_Sk=ids.cuda(),
        teacher_p_Sk=p.cuda(),
        settings=CrossEntropySettings(**weights, **shape, max_logit_bytes=128 * vocabulary * 6),
    )
    assert_close("loss", got.loss.detach().cpu(), want.loss.detach(), limit)
    assert_close("overlap", got.overlap.cpu(), want.overlap, limit)
    (grad,) = torch.autograd.grad(got.loss.sum(), low)
    (want_grad,) = torch.autograd.grad(want.loss.sum(), wide)
    assert_close("d hidden", grad.cpu(), want_grad, grad_limit)
    logits = hidden.double() @ weight.double().T
    chosen, best = (logits.gather(1, x.candidates.cpu()) for x in (got, want))
    assert_close("candidates", chosen, best, 1e-5)
"""


@pytest.mark.gpu
def test_a_gpu_gives_the_definition():
    # In a process of its own: this one interprets kernels.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", ON_A_GPU], check=True, env=environment)
