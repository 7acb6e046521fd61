import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dflash_train.drafter import block_attention as module
from dflash_train.drafter.block_attention import Blocks, ContextKV, block_attention
from dflash_train.drafter.config import Visibility
from dflash_train.testing import VISIBILITIES, assert_close
from dflash_train.training.blocks import visibility_mask

Inputs = dict[str, Tensor]


def packed_blocks(*, narrow: bool) -> Blocks:
    """Four documents, T = 63; the second has no block; anchors in no order."""
    anchors = torch.tensor([1, 20, 7, 3, 11, 0, 17])
    return Blocks(
        context_offsets=[0, 20, 26, 46, 63],
        block_offsets=[0, 3, 3, 5, 7],
        anchor_positions=anchors,
        widths=torch.tensor([7, 2, 1, 7, 3, 6, 7]) if narrow else None,
    )


def random_inputs(
    num_blocks: int, num_slots: int, num_context: int, *, heads: int = 6, kv_heads: int = 2
) -> Inputs:
    torch.manual_seed(0)
    head_dim = 60
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


def by_blocks(inputs: Inputs, blocks: Blocks, visibility: Visibility) -> Tensor:
    context = ContextKV(inputs["context_k"], inputs["context_v"])
    return block_attention(
        inputs["q"],
        context,
        inputs["block_k"],
        inputs["block_v"],
        blocks=blocks,
        visibility=visibility,
    )


def by_dense_mask(inputs: Inputs, blocks: Blocks, visibility: Visibility) -> Tensor:
    num_slots = inputs["q"].shape[1]
    q = inputs["q"].flatten(0, 1).transpose(0, 1)  # [H, A*K, D]
    k = torch.cat([inputs["context_k"], inputs["block_k"].flatten(0, 1)]).transpose(0, 1)
    v = torch.cat([inputs["context_v"], inputs["block_v"].flatten(0, 1)]).transpose(0, 1)
    mask = visibility_mask(blocks, num_slots, visibility=visibility)
    out = functional.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, enable_gqa=True
    )
    return out[0].transpose(0, 1).unflatten(0, (-1, num_slots))


@pytest.mark.parametrize("scores_at_once", [1, 2500, 1 << 17])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("visibility", VISIBILITIES.values(), ids=VISIBILITIES.keys())
def test_block_attention_equals_attention_under_the_dense_mask(
    visibility: Visibility, narrow: bool, scores_at_once: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(module.SCORES_AT_ONCE, "cpu", scores_at_once)
    blocks = packed_blocks(narrow=narrow)
    inputs = random_inputs(7, 7, 63)
    # A softmax over one key has no gradient but that of the value.
    compare_with_dense_mask(
        inputs, blocks, visibility, ["block_v"] if visibility.window == 1 else list(inputs)
    )


def compare_with_dense_mask(
    inputs: Inputs, blocks: Blocks, visibility: Visibility, names: list[str]
) -> None:
    """Compare the outputs, and the gradients of the named inputs."""
    direction = torch.randn(inputs["q"].shape, dtype=torch.float64)
    results = {}
    for name, attend in (("blocks", by_blocks), ("dense", by_dense_mask)):
        out = attend(inputs, blocks, visibility)
        gradients = torch.autograd.grad((out * direction).sum(), list(inputs.values()))
        results[name] = (out.detach(), dict(zip(inputs, gradients, strict=True)))
    assert_close("output", results["blocks"][0], results["dense"][0], 1e-10)
    for name in names:
        assert_close(f"d {name}", results["blocks"][1][name], results["dense"][1][name], 1e-10)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (1, 1)])
def test_heads_may_share_no_key_or_all_share_one(heads: int, kv_heads: int):
    inputs = random_inputs(7, 7, 63, heads=heads, kv_heads=kv_heads)
    compare_with_dense_mask(inputs, packed_blocks(narrow=True), Visibility(), list(inputs))


@pytest.mark.parametrize("loud", ["context_k", "block_k"])
@pytest.mark.parametrize("visibility", [Visibility(), Visibility(window=3, is_causal=True)])
def test_the_merge_holds_where_one_part_takes_all_the_weight(visibility: Visibility, loud: str):
    inputs = random_inputs(7, 7, 63)
    inputs[loud] = (200 * inputs[loud].detach()).requires_grad_()
    compare_with_dense_mask(inputs, packed_blocks(narrow=False), visibility, list(inputs))


@pytest.mark.parametrize("visibility", VISIBILITIES.values(), ids=VISIBILITIES.keys())
def test_what_a_block_must_not_see_leaves_its_output_bit_identical(visibility: Visibility):
    blocks = packed_blocks(narrow=False)
    inputs = {name: tensor.detach() for name, tensor in random_inputs(7, 7, 63).items()}
    before = by_blocks(inputs, blocks, visibility)[2]  # document 0, anchor 7
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    for name in ("context_k", "context_v"):
        changed[name][7:] += 3.0
        if visibility.window is not None:
            changed[name][: max(0, 8 - visibility.window)] += 3.0
    for name in ("q", "block_k", "block_v"):
        changed[name][torch.arange(7) != 2] -= 2.0
    assert torch.equal(by_blocks(changed, blocks, visibility)[2], before)
    changed["context_v"][6] += 1e-3
    assert torch.equal(by_blocks(changed, blocks, visibility)[2], before) == (
        visibility.window == 1
    )


def test_nothing_of_the_size_of_all_scores_is_kept_for_the_backward_pass():
    num_blocks, num_slots, num_context = 50, 4, 400
    inputs = random_inputs(num_blocks, num_slots, num_context)
    blocks = Blocks(
        context_offsets=[0, num_context],
        block_offsets=[0, num_blocks],
        anchor_positions=torch.arange(num_blocks) * 8,
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        by_blocks(inputs, blocks, Visibility())
    two_per_query = 2 * inputs["q"][..., 0].numel()  # log-sum-exp, and the context's share of it
    assert sum(kept) == sum(tensor.numel() for tensor in inputs.values()) + two_per_query


def test_low_precision_is_summed_in_float32():
    blocks = packed_blocks(narrow=False)
    inputs = {name: tensor.detach() for name, tensor in random_inputs(7, 7, 63).items()}
    low = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    exact = {name: tensor.double() for name, tensor in low.items()}
    for visibility in (Visibility(), Visibility(window=9, is_causal=True)):
        assert_close(
            "output",
            by_blocks(low, blocks, visibility),
            by_blocks(exact, blocks, visibility).bfloat16(),
            5e-3,
        )


def test_a_block_at_position_zero_sees_only_itself():
    blocks = Blocks(
        context_offsets=[0, 0], block_offsets=[0, 1], anchor_positions=torch.tensor([0])
    )
    inputs = random_inputs(1, 3, 0)
    for visibility in VISIBILITIES.values():
        assert_close(
            "output",
            by_blocks(inputs, blocks, visibility),
            by_dense_mask(inputs, blocks, visibility),
            1e-10,
        )
