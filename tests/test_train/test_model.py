from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

from dflash_train.drafter.attention import Blocks
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.store import FeatureRow
from dflash_train.features.target import Target
from dflash_train.testing import (
    FAMILIES,
    MASK_TOKEN_ID,
    VARIANTS,
    assert_close,
    tiny_config,
    tiny_drafter,
    tiny_target,
)

NUM_SLOTS = 5


def packed(rows: list[FeatureRow], anchors: list[list[int]]) -> tuple[Tensor, Blocks, Tensor]:
    """Lay rows end to end: features, blocks and anchor ids."""
    lengths = torch.tensor([0] + [len(row.input_ids) for row in rows]).cumsum(0).tolist()
    counts = torch.tensor([0] + [len(at) for at in anchors]).cumsum(0).tolist()
    blocks = Blocks(
        context_offsets=lengths,
        block_offsets=counts,
        anchor_positions=torch.tensor([position for at in anchors for position in at]),
    )
    ids = torch.cat([row.input_ids[at] for row, at in zip(rows, anchors, strict=True)])
    return torch.cat([row.features for row in rows]), blocks, ids


def test_forward_and_gradients_equal_an_implementation_of_qwen3_modules(
    target32: Target, answer_rows
):
    (row,) = answer_rows(target32, [9], max_new_tokens=14)
    drafter = tiny_drafter(target32, block_size=NUM_SLOTS)
    anchor = 13
    features, blocks, ids = packed([row], [[anchor]])
    x = block_embeddings(target32.head, ids, num_slots=NUM_SLOTS, config=drafter.config)
    weights = {name: w.detach().clone().requires_grad_() for name, w in drafter.named_parameters()}

    ours = drafter(x, features, blocks)[0]
    plain = qwen3_block(drafter, weights, x[0], features[:anchor])
    assert_close("hidden", ours, plain, 1e-5)
    direction = torch.randn_like(ours)
    (ours * direction).sum().backward()
    (plain * direction).sum().backward()
    for name, parameter in drafter.named_parameters():
        ours_grad, plain_grad = parameter.grad, weights[name].grad
        assert ours_grad is not None
        assert plain_grad is not None
        assert_close(f"d {name}", ours_grad, plain_grad, 1e-4)


def qwen3_block(
    drafter: Drafter, weights: dict[str, Tensor], x: Tensor, features: Tensor
) -> Tensor:
    """One block over its context, written with Transformers' modules and one request's shapes."""
    config = drafter.config.to_qwen3()

    def norm(name: str, value: Tensor) -> Tensor:
        module = Qwen3RMSNorm(value.shape[-1], eps=config.rms_norm_eps)
        return torch.func.functional_call(module, {"weight": weights[f"{name}.weight"]}, (value,))

    def linear(name: str, value: Tensor) -> Tensor:
        return functional.linear(value, weights[f"{name}.weight"])

    def heads(name: str, value: Tensor) -> Tensor:
        return linear(name, value).unflatten(-1, (-1, config.head_dim))

    context = norm("hidden_norm", linear("fc", features))
    num_context, num_slots = len(features), len(x)
    positions = torch.arange(num_context + num_slots)[None]
    cos, sin = Qwen3RotaryEmbedding(config)(x, positions)
    for number in range(config.num_hidden_layers):
        layer = f"layers.{number}"
        y = norm(f"{layer}.input_layernorm", x)
        both = torch.cat([context, y])
        q = norm(f"{layer}.self_attn.q_norm", heads(f"{layer}.self_attn.q_proj", y))
        k = norm(f"{layer}.self_attn.k_norm", heads(f"{layer}.self_attn.k_proj", both))
        v = heads(f"{layer}.self_attn.v_proj", both)
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        q, _ = apply_rotary_pos_emb(q, q, cos[:, num_context:], sin[:, num_context:])
        k, _ = apply_rotary_pos_emb(k, k, cos, sin)
        groups = q.shape[1] // k.shape[1]
        scores = q @ repeat_kv(k, groups).transpose(2, 3) * config.head_dim**-0.5
        out = (scores.softmax(-1) @ repeat_kv(v, groups))[0].transpose(0, 1).flatten(1)
        x = x + linear(f"{layer}.self_attn.o_proj", out)
        mlp_weights = {
            f"{part}.weight": weights[f"{layer}.mlp.{part}.weight"]
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        normed = norm(f"{layer}.post_attention_layernorm", x)
        x = x + torch.func.functional_call(Qwen3MLP(config), mlp_weights, (normed,))
    return norm("norm", x)


def test_embedding_scale_of_gemma_is_what_its_own_module_multiplies():
    target = tiny_target(family="gemma3")
    config = tiny_drafter(target, block_size=3).config
    ids = torch.tensor([7, 90])
    rows = block_embeddings(target.head, ids, num_slots=3, config=config)
    own = target.model.get_input_embeddings()(
        torch.tensor([[7, MASK_TOKEN_ID, MASK_TOKEN_ID], [90, MASK_TOKEN_ID, MASK_TOKEN_ID]])
    )
    assert_close("rows", rows, own, 1e-5)
    for family in FAMILIES.keys() - {"gemma3"}:
        assert tiny_drafter(tiny_target(family=family)).config.input_embedding_scale == 1.0
    assert tiny_drafter(target, input_embedding_scale=1.0).config.input_embedding_scale == 1.0


def test_rope_of_a_target_with_one_per_layer_type_is_that_of_its_full_layers():
    target_config = tiny_config("gemma3")
    theta = target_config.rope_parameters["full_attention"]["rope_theta"]
    assert theta != target_config.rope_parameters["sliding_attention"]["rope_theta"]
    config = tiny_drafter(tiny_target(family="gemma3")).config
    assert config.rope_parameters == target_config.rope_parameters["full_attention"]


def test_soft_cap_is_the_targets_unless_the_recipe_says_otherwise():
    target = tiny_target(family="gemma3")
    assert tiny_drafter(target).config.final_logit_softcapping is None
    target.model.config.final_logit_softcapping = 30.0
    assert tiny_drafter(target).config.final_logit_softcapping == 30.0
    for wanted, got in ((5.0, 5.0), (0.0, None)):
        drafter = tiny_drafter(target, final_logit_softcapping=wanted)
        assert drafter.config.final_logit_softcapping == got


def test_logits_are_multiplied_and_then_capped(target32: Target):
    drafter = tiny_drafter(target32, output_multiplier=0.5, final_logit_softcapping=2.0)
    hidden = torch.randn(3, 32)
    raw = hidden @ target32.head.lm_head_weight.T
    want = 2.0 * torch.tanh(raw * 0.5 / 2.0)
    assert_close("logits", drafter.logits(hidden, target32.head), want, 1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_types": ["sliding_attention"], "sliding_window": 4}, "layer_types"),
        ({"layer_types": ["full_attention", "chunked"]}, "layer_types"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"sliding_window \(=None\)"),
        ({"sliding_window": 4}, r"sliding_window \(=4\)"),
        (VARIANTS["sliding_causal"] | {"sliding_window": 0}, r"sliding_window \(=0\)"),
        ({"conv_kernel_size": 2}, "selector_rank"),
        (VARIANTS["dflash2"] | {"conv_group_size": 7}, "conv_group_size"),
        (VARIANTS["dflash2"] | {"selector_top_k": 999}, "selector_top_k"),
        (VARIANTS["dflash2"] | {"markov_rank": 4}, "markov_rank"),
        (VARIANTS["dflash2"] | {"draft_vocab_size": 9}, "draft_vocab_size"),
        ({"markov_gated": True}, "markov_gated"),
        ({"has_confidence_head": True}, "has_confidence_head"),
        ({"draft_vocab_size": 260}, "draft_vocab_size"),
    ],
)
def test_settings_that_make_no_drafter_are_refused(
    target32: Target, settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        tiny_drafter(target32, **settings)


@pytest.mark.parametrize("ids", [[1, 2], [3, 2, 1], [1, 1, 2], [-1, 0, 1], [5, 6, 260]])
def test_a_draft_vocabulary_must_ascend_inside_the_targets(target32: Target, ids: list[int]):
    drafter = tiny_drafter(target32, draft_vocab_size=3)
    with pytest.raises(ValueError, match="draft_vocab_size"):
        drafter.set_draft_vocabulary(torch.tensor(ids))


def test_a_reduced_vocabulary_drafts_the_best_of_its_own_ids(target32: Target):
    drafter = tiny_drafter(target32, draft_vocab_size=3)
    ids = torch.tensor([5, 77, 259])
    drafter.set_draft_vocabulary(ids)
    head = drafter.output_head(target32.head)
    hidden = torch.randn(40, 32)
    want = ids[(hidden @ target32.head.lm_head_weight.T)[:, ids].argmax(-1)]
    assert torch.equal(drafter.choose(hidden, torch.zeros(40, dtype=torch.int64), head), want)
    assert len(want.unique()) == 3
    assert head.logits(hidden).shape == (40, 3)
    plain = tiny_drafter(target32)
    assert plain.output_head(target32.head) is target32.head


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotation_angles_are_positions_times_powers_of_the_targets_theta(theta: float):
    target = tiny_target()
    target.model.config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    drafter = tiny_drafter(target)
    positions, head_dim = torch.tensor([0, 1, 7, 63]), drafter.config.head_dim
    frequencies = theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    angles = (positions[:, None] * frequencies).repeat(1, 2)  # neox: both halves alike
    cos, sin = drafter.rotary_emb(torch.zeros(1), positions[None])
    assert_close("cos", cos[0], angles.cos(), 1e-5)
    assert_close("sin", sin[0], angles.sin(), 1e-5)


@pytest.mark.parametrize(
    ("is_causal", "full_is_causal", "sliding_is_causal"),
    [(None, False, True), (True, True, True), (False, False, False)],
)
def test_causality_follows_the_layer_type_unless_it_is_set(
    target32: Target, is_causal: bool | None, full_is_causal: bool, sliding_is_causal: bool
):
    config = tiny_drafter(target32, **VARIANTS["mixed"], is_causal=is_causal).config
    full, sliding = config.layer_visibility()
    assert (full.window, full.is_causal) == (None, full_is_causal)
    assert (sliding.window, sliding.is_causal) == (
        VARIANTS["mixed"]["sliding_window"],
        sliding_is_causal,
    )
