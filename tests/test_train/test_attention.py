import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dflash_train.drafter.attention import Blocks, ContextKV, block_attention
from dflash_train.testing import assert_close
from dflash_train.training.blocks import visibility_mask

Inputs = dict[str, Tensor]


def packed_blocks(*, narrow: bool) -> Blocks:
    """Four documents, T = 63; the second has no block."""
    anchors = torch.tensor([1, 7, 20, 3, 11, 2, 17])
    return Blocks(
        context_offsets=[0, 20, 26, 46, 63],
        block_offsets=[0, 3, 3, 5, 7],
        anchor_positions=anchors,
        widths=torch.tensor([7, 2, 1, 7, 3, 6, 7]) if narrow else None,
    )


def random_inputs(num_blocks: int, num_slots: int, num_context: int) -> Inputs:
    torch.manual_seed(0)
    heads, kv_heads, head_dim = 6, 2, 60
    shapes = {
        "q": (num_blocks, num_slots, heads, head_dim),
        "context_k": (num_context, kv_heads, head_dim),
        "context_v": (num_context, kv_heads, head_dim),
        "block_k": (num_blocks, num_slots, kv_heads, head_dim),
        "block_v": (num_blocks, num_slots, kv_heads, head_dim),
    }
    return {
        name: torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for name, shape in shapes.items()
    }


def by_blocks(inputs: Inputs, blocks: Blocks) -> Tensor:
    context = ContextKV(inputs["context_k"], inputs["context_v"])
    return block_attention(
        inputs["q"], context, inputs["block_k"], inputs["block_v"], blocks=blocks
    )


def by_dense_mask(inputs: Inputs, blocks: Blocks) -> Tensor:
    num_slots = inputs["q"].shape[1]
    q = inputs["q"].flatten(0, 1).transpose(0, 1)  # [H, A*K, D]
    k = torch.cat([inputs["context_k"], inputs["block_k"].flatten(0, 1)]).transpose(0, 1)
    v = torch.cat([inputs["context_v"], inputs["block_v"].flatten(0, 1)]).transpose(0, 1)
    out = functional.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=visibility_mask(blocks, num_slots), enable_gqa=True
    )
    return out[0].transpose(0, 1).unflatten(0, (-1, num_slots))


@pytest.mark.parametrize("narrow", [False, True])
def test_block_attention_equals_attention_under_the_dense_mask(narrow: bool):
    blocks = packed_blocks(narrow=narrow)
    inputs = random_inputs(7, 7, 63)
    direction = torch.randn(inputs["q"].shape, dtype=torch.float64)
    results = {}
    for name, attend in (("blocks", by_blocks), ("dense", by_dense_mask)):
        out = attend(inputs, blocks)
        gradients = torch.autograd.grad((out * direction).sum(), list(inputs.values()))
        results[name] = (out.detach(), dict(zip(inputs, gradients, strict=True)))
    assert_close("output", results["blocks"][0], results["dense"][0], 1e-10)
    for name in inputs:
        assert_close(f"d {name}", results["blocks"][1][name], results["dense"][1][name], 1e-10)


def test_what_a_block_must_not_see_leaves_its_output_bit_identical():
    blocks = packed_blocks(narrow=False)
    inputs = {name: tensor.detach() for name, tensor in random_inputs(7, 7, 63).items()}
    before = by_blocks(inputs, blocks)[1]  # document 0, anchor 7
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    for name in ("context_k", "context_v"):
        changed[name][7:] += 3.0
    for name in ("q", "block_k", "block_v"):
        changed[name][torch.arange(7) != 1] -= 2.0
    assert torch.equal(by_blocks(changed, blocks)[1], before)
    changed["context_v"][6] += 1e-3
    assert not torch.equal(by_blocks(changed, blocks)[1], before)


def test_a_block_at_position_zero_sees_only_itself():
    blocks = Blocks(
        context_offsets=[0, 0], block_offsets=[0, 1], anchor_positions=torch.tensor([0])
    )
    inputs = random_inputs(1, 3, 0)
    assert_close("output", by_blocks(inputs, blocks), by_dense_mask(inputs, blocks), 1e-10)
