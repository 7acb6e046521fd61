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
from dflash_train.testing import assert_close, tiny_drafter

NUM_SLOTS = 5


@pytest.fixture
def rows(target64: Target, answer_rows) -> list[FeatureRow]:
    return answer_rows(target64, [6, 9], max_new_tokens=14)


@pytest.fixture
def drafter(target64: Target) -> Drafter:
    return tiny_drafter(target64, block_size=NUM_SLOTS, dtype=torch.float64)


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


def run(drafter: Drafter, target: Target, inputs: tuple[Tensor, Blocks, Tensor]) -> Tensor:
    features, blocks, ids = inputs
    embeddings = block_embeddings(target.head, ids, num_slots=NUM_SLOTS, config=drafter.config)
    with torch.no_grad():
        return drafter(embeddings, features, blocks)


def test_training_forward_equals_the_cached_decode_steps(
    drafter: Drafter, target64: Target, rows: list[FeatureRow]
):
    anchors = [[1, 2, 6, 11, 19], [9, 10, 15]]
    trained = run(drafter, target64, packed(rows, anchors))
    served = []
    for row, at in zip(rows, anchors, strict=True):
        cache = drafter.new_cache()
        for position in at:
            embeddings = block_embeddings(
                target64.head, row.input_ids[[position]], num_slots=NUM_SLOTS, config=drafter.config
            )
            with torch.no_grad():
                fresh = row.features[cache.length : position]
                served.append(drafter.draft_step(embeddings[0], fresh, cache))
            assert cache.length == position
    assert_close("hidden", trained, torch.stack(served), 1e-10)
    assert_close(
        "logits",
        drafter.logits(trained, target64.head),
        drafter.logits(torch.stack(served), target64.head),
        1e-10,
    )


def test_only_features_before_the_anchor_and_in_its_document_matter(
    drafter: Drafter, target64: Target, rows: list[FeatureRow]
):
    anchor = 12
    features, blocks, ids = packed(rows, [[anchor, 15], [11]])
    before = run(drafter, target64, (features, blocks, ids))[0]

    changed = features.clone()
    changed[anchor:] *= -2.0  # the rest of the document, and the other document
    assert torch.equal(run(drafter, target64, (changed, blocks, ids))[0], before)
    other_ids = ids.clone()
    other_ids[1:] = 77
    assert torch.equal(run(drafter, target64, (features, blocks, other_ids))[0], before)

    changed = features.clone()
    changed[anchor - 1] += 0.1
    after = run(drafter, target64, (changed, blocks, ids))[0]
    assert (after != before).all(dim=-1).all(), "every slot must see the row before the anchor"


def test_a_narrow_block_is_the_forward_pass_of_that_width(
    drafter: Drafter, target64: Target, rows: list[FeatureRow]
):
    features, blocks, ids = packed(rows[:1], [[8]])
    blocks.widths = torch.tensor([3])
    narrow = run(drafter, target64, (features, blocks, ids))[0, :3]
    embeddings = block_embeddings(target64.head, ids, num_slots=3, config=drafter.config)
    with torch.no_grad():
        served = drafter.draft_step(embeddings[0], features[:8], drafter.new_cache())
    assert_close("hidden", narrow, served, 1e-10)


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
