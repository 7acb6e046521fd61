import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from dflash_train.drafter.fused import GatedDown, RMSNorm
from dflash_train.testing import LIMITS, assert_close

SHAPES = [(63, 60), (5, 7, 12), (3, 4, 2, 8)]


def random_norm(width: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(width, eps=1e-3).to(dtype)
    norm.weight.data = torch.randn(width, dtype=dtype)
    return norm


def random_down(dtype: torch.dtype) -> GatedDown:
    torch.manual_seed(0)
    return GatedDown(60, 12, bias=False).to(dtype)


def gate_and_up(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    gate, up = (3 * torch.randn(2, 7, 9, 60, dtype=dtype)).unbind()
    return gate.requires_grad_(), up.requires_grad_()


def compare(got: Tensor, want: Tensor, inputs: dict[str, Tensor]) -> None:
    """Compare two results of the same float64 inputs, and all their gradients."""
    assert_close("output", got, want, 1e-10)
    direction = torch.randn_like(want)
    ours = torch.autograd.grad((got * direction).sum(), list(inputs.values()))
    plain = torch.autograd.grad((want * direction).sum(), list(inputs.values()))
    for name, our_grad, plain_grad in zip(inputs, ours, plain, strict=True):
        assert_close(f"d {name}", our_grad, plain_grad, 1e-10)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_norm_and_its_gradients_equal_the_formula(shape: tuple[int, ...], size: float):
    torch.manual_seed(0)
    norm = random_norm(shape[-1], torch.float64)
    x = (size * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    compare(norm(x), plain_norm(x, norm.weight), {"x": x, "weight": norm.weight})


def test_norm_takes_rows_in_any_layout_and_a_row_of_zeros():
    norm = random_norm(8, torch.float64)
    rows = torch.randn(8, 5, 6, dtype=torch.float64)
    rows[:, 2, 3] = 0.0
    x = rows.requires_grad_().permute(2, 1, 0)
    compare(norm(x), plain_norm(x, norm.weight), {"x": x, "weight": norm.weight})
    assert norm(torch.empty(0, 8, dtype=torch.float64)).shape == (0, 8)


@pytest.mark.parametrize("dtype", LIMITS)
def test_norm_is_that_of_qwen3_in_every_number_format(dtype: torch.dtype):
    torch.manual_seed(0)
    norm = random_norm(60, dtype)
    qwen3 = Qwen3RMSNorm(60, eps=1e-3).to(dtype)
    qwen3.weight.data = norm.weight.data.clone()
    x = torch.randn(9, 60, dtype=dtype)
    assert norm(x).dtype == dtype
    # Qwen3 computes in float32 whatever the format.
    assert_close("output", norm(x), qwen3(x), max(LIMITS[dtype][0], 1e-6))


def test_low_precision_rows_are_normed_in_float32():
    norm = random_norm(600, torch.bfloat16)
    x = torch.randn(9, 600).bfloat16().requires_grad_()
    exact = plain_norm(x.double(), norm.weight.double())
    assert_close("output", norm(x), exact.bfloat16(), 5e-3)
    direction = torch.randn(9, 600).bfloat16()
    ours = torch.autograd.grad((norm(x) * direction).sum(), [x, norm.weight])
    plain = torch.autograd.grad((exact * direction.double()).sum(), [x, norm.weight])
    for name, our_grad, plain_grad in zip(("x", "weight"), ours, plain, strict=True):
        assert our_grad.dtype == torch.bfloat16
        assert_close(f"d {name}", our_grad, plain_grad, 2e-2)


def test_gated_down_and_its_gradients_equal_the_plain_modules():
    down = random_down(torch.float64)
    gate, up = gate_and_up(torch.float64)
    plain = functional.linear(functional.silu(gate) * up, down.weight)
    compare(down(gate, up), plain, {"gate": gate, "up": up, "weight": down.weight})


def test_gated_down_keeps_no_product():
    down = random_down(torch.float32)
    gate, up = gate_and_up(torch.float32)
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.add(tensor.data_ptr()) or tensor, lambda tensor: tensor
    ):
        down(gate, up)
    assert kept == {gate.data_ptr(), up.data_ptr(), down.weight.data_ptr()}


def test_under_autocast_products_are_low_precision_and_gradients_are_the_weights():
    norm, down = random_norm(60, torch.float32), random_down(torch.float32)
    opening = nn.Linear(60, 120, bias=False)
    x = torch.randn(9, 60, requires_grad=True)

    def run() -> list[Tensor]:
        gate, up = opening(norm(x)).chunk(2, dim=-1)
        out = down(gate, up)
        leaves = [x, norm.weight, opening.weight, down.weight]
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    exact = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run()
    assert low[0].dtype == torch.bfloat16
    for got, want in zip(low[1:], exact[1:], strict=True):
        assert got.dtype == torch.float32
        assert_close("gradient", got, want, 2e-2)


def test_parameters_have_the_names_of_the_plain_modules():
    assert list(RMSNorm(4).state_dict()) == ["weight"]
    assert list(GatedDown(4, 2, bias=False).state_dict()) == ["weight"]
