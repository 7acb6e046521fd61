import pytest
import torch
from torch import Tensor

from dflash_train.drafter.attention import Blocks
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.mixers import BlockConvolution, convolve_slots
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.target import Target
from dflash_train.testing import VARIANTS, assert_close, tiny_drafter


def by_the_formula(x: Tensor, dynamic: Tensor, base: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    num_blocks, num_slots, width = x.shape
    per_group = width // dynamic.shape[-1]
    for a in range(num_blocks):
        for k in range(num_slots):
            for o in range(min(len(base), k + 1)):
                chosen = dynamic[a, k, o].repeat_interleave(per_group)
                out[a, k] += (base[o] + chosen) * x[a, k - o]
    return out


@pytest.mark.parametrize(("num_slots", "kernel_size"), [(5, 2), (7, 3), (2, 4), (1, 2)])
def test_convolution_equals_its_formula_with_all_gradients(num_slots: int, kernel_size: int):
    torch.manual_seed(0)
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, num_slots, 12), (3, num_slots, kernel_size, 4), (kernel_size, 12))
    ]
    ours, plain = convolve_slots(*inputs), by_the_formula(*inputs)
    assert_close("output", ours, plain, 1e-10)
    direction = torch.randn_like(ours)
    for got, want in zip(
        torch.autograd.grad((ours * direction).sum(), inputs),
        torch.autograd.grad((plain * direction).sum(), inputs),
        strict=True,
    ):
        assert_close("gradient", got, want, 1e-10)


@pytest.fixture
def config(target64: Target) -> DrafterConfig:
    return tiny_drafter(target64, block_size=5, **VARIANTS["dflash2"]).config


def test_a_slot_mixes_with_its_left_neighbour_only_and_slot_zero_with_nothing(
    config: DrafterConfig,
):
    torch.manual_seed(0)
    convolution = BlockConvolution(config).double()
    torch.nn.init.normal_(convolution.base_kernel)
    torch.nn.init.normal_(convolution.kernel_projection.weight)
    x = torch.randn(2, 5, 32, dtype=torch.float64)

    def mixed(x: Tensor) -> Tensor:
        return convolution(x, torch.tanh)

    before = mixed(x)
    assert_close("slot 0", mixed(x[:, :1]), before[:, :1], 1e-10)
    changed = x.clone()
    changed[0, 1] += 1.0
    touched = (mixed(changed) != before).any(dim=-1)
    assert touched.tolist() == [[False, True, True, True, False], [False] * 5]


def test_the_identity_at_the_start_is_plain_dflash_bit_for_bit(
    target32: Target, config: DrafterConfig
):
    plain = tiny_drafter(target32, block_size=5)
    mixing = Drafter(config).eval()
    assert not mixing.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    features = torch.randn(12, 64)
    blocks = Blocks(
        context_offsets=[0, 12], block_offsets=[0, 3], anchor_positions=torch.tensor([1, 5, 12])
    )
    x = block_embeddings(target32.head, torch.tensor([9, 10, 11]), num_slots=5, config=config)
    with torch.no_grad():
        assert torch.equal(mixing(x, features, blocks), plain(x, features, blocks))


def test_the_convolution_learns_from_the_identity_on(config: DrafterConfig):
    convolution = BlockConvolution(config)
    convolution(torch.randn(2, 5, 32), torch.tanh).square().sum().backward()
    for parameter in (convolution.base_kernel, convolution.kernel_projection.weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().min() > 0
