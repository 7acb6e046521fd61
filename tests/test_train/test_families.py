"""Targets of several architectures: taps, cached features, and drafters that fit them.

The models are tiny and random, of the real classes, built from their configs. What is not true of
every target is here: mixtures of experts, sliding layers whose cache must be cropped, a scaled
embedding, a soft cap, norms that are stored as a difference from 1, attention sinks, YaRN, layers
that differ in heads, and layers with a running state.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dflash_train.config import DrafterSettings
from dflash_train.drafter.attention import Blocks
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.initialization import initialize_from_target
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.target import Target
from dflash_train.testing import MASK_TOKEN_ID, STOP_TOKEN_ID, assert_close, tiny_tokenizer

WINDOW = 8
"""Window of sliding target layers, in tokens; test rows are longer."""
SCALED_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 128,
}
_SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": 260, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": STOP_TOKEN_ID, "pad_token_id": 0,
}  # fmt: skip
_HEADS_OF_FULL_LAYERS: dict[str, Any] = {"num_global_key_value_heads": 1, "global_head_dim": 16}

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE, intermediate_size=64),
    "qwen3": Qwen3Config(**_SHAPE, intermediate_size=64),
    "qwen3_moe": Qwen3MoeConfig(
        **_SHAPE,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    "gemma3": Gemma3TextConfig(
        **_SHAPE,
        intermediate_size=64,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        final_logit_softcapping=30.0,
    ),
    "gemma4": Gemma4TextConfig(
        **_SHAPE,
        intermediate_size=64,
        **_HEADS_OF_FULL_LAYERS,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        final_logit_softcapping=30.0,
    ),
    "gpt_oss": GptOssConfig(
        **_SHAPE,
        intermediate_size=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        rope_parameters=SCALED_ROPE,
    ),
}


def family_target(family: str, *, dtype: torch.dtype) -> Target:
    """Build a random target of a family, with norms that are not ones, and taps 1 and 3."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        FAMILIES[family],
        dtype=dtype,
        experts_implementation="eager",  # the grouped product of experts knows no float64
    )
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return Target(model, tiny_tokenizer(), [1, 3], name=family, revision="seed-0")


def fitting_config(target: Target, *, block_size: int = 5) -> DrafterConfig:
    """Give the shape that training would choose for a target, with 2 layers."""
    settings = DrafterSettings(
        block_size=block_size,
        num_hidden_layers=2,
        target_layer_ids=target.target_layer_ids,
        mask_token_id=MASK_TOKEN_ID,
    )
    return DrafterConfig.for_target(settings, target.model.config)


DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}
NUM_TOKENS = 30


@pytest.fixture(scope="module", params=FAMILIES)
def target(request: pytest.FixtureRequest) -> Target:
    return family_target(request.param, dtype=torch.float64)


@pytest.fixture(scope="module")
def input_ids() -> Tensor:
    return torch.randint(4, 260, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))


def rope_of_full_layers(target: Target) -> dict[str, object]:
    rope = target.model.config.rope_parameters
    rope = rope.get("full_attention", rope)
    if rope["rope_type"] == "proportional":  # turns a part of the head; a drafter turns all of it
        return {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return rope


def test_taps_are_the_outputs_of_their_layers(target: Target, input_ids: Tensor):
    hidden_states = target.model(input_ids=input_ids, output_hidden_states=True).hidden_states
    want = torch.cat([hidden_states[layer + 1] for layer in target.target_layer_ids], dim=-1)
    assert torch.equal(target.forward(input_ids).features, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_features_equal_those_of_one_pass_step_by_step(
    family: str, dtype: torch.dtype, input_ids: Tensor
):
    target = family_target(family, dtype=dtype)
    whole = target.forward(input_ids)
    cache = target.new_cache()
    steps = [target.forward(input_ids[:, :11], cache=cache)]
    steps += [target.forward(input_ids[:, [t]], cache=cache) for t in range(11, NUM_TOKENS)]
    for name in ("features", "logits"):
        stepwise = torch.cat([getattr(step, name) for step in steps], dim=1)
        assert_close(name, stepwise, getattr(whole, name), DTYPES[dtype])


def test_a_cropped_cache_forgets_what_was_rejected(target: Target, input_ids: Tensor):
    whole = target.forward(input_ids)
    cache = target.new_cache()
    target.forward(input_ids[:, : WINDOW - 3], cache=cache)
    for start in range(WINDOW - 3, NUM_TOKENS - 1, 2):  # across the edge of sliding windows
        kept = input_ids[:, start : start + 2]
        rejected = torch.full((1, 4), 99)
        step = target.forward(torch.cat([kept, rejected], dim=1), cache=cache)
        cache.crop(-4)
        for name in ("features", "logits"):
            want = getattr(whole, name)[:, start : start + 2]
            assert_close(name, getattr(step, name)[:, :2], want, 1e-10)


def test_features_of_generated_answers_equal_those_of_the_finished_rows(target: Target):
    prompts = [[10, 20, 30], [*range(40, 60)], [11, 12, 13, 14, 15]]  # padded on the left
    answers = target.generate_batch(prompts, max_new_tokens=12)
    rows = [[*prompt, *row.output_ids] for prompt, row in zip(prompts, answers, strict=True)]
    for answer, forced in zip(answers, target.features_of(rows), strict=True):
        assert_close("features", answer.features, forced, 1e-10)


def test_a_drafter_of_the_targets_shapes_fits(target: Target):
    config = fitting_config(target)
    assert (config.hidden_size, config.vocab_size) == target.head.embedding_weight.shape[::-1]
    assert config.rope_parameters == rope_of_full_layers(target)
    assert config.final_logit_softcapping == (30.0 if target.name.startswith("gemma") else None)


def test_the_block_sees_its_anchor_as_the_target_embeds_it(target: Target, input_ids: Tensor):
    config = fitting_config(target)
    ids = input_ids[0]
    rows = block_embeddings(target.head, ids, num_slots=2, config=config)
    embed = target.model.get_input_embeddings()
    # gemma3 keeps its factor, the root of the width, in float32.
    assert_close("anchors", rows[:, 0], embed(ids), 1e-7)
    assert_close("masks", rows[:, 1], embed(torch.full_like(ids, MASK_TOKEN_ID)), 1e-7)


def test_logits_pass_the_targets_own_soft_cap(target: Target, input_ids: Tensor):
    drafter = Drafter(fitting_config(target)).double()
    output = target.model.get_decoder()(input_ids=input_ids)
    got = drafter.logits(output.last_hidden_state, target.head)
    assert_close("logits", got, target.forward(input_ids).logits, 1e-10)


def test_the_training_forward_equals_the_cached_draft_step(target: Target, input_ids: Tensor):
    torch.manual_seed(0)
    drafter = Drafter(fitting_config(target)).double().eval()
    features = target.forward(input_ids).features[0]
    anchors = torch.tensor([1, 7, 16, NUM_TOKENS - 1])
    embeddings = block_embeddings(
        target.head, input_ids[0, anchors], num_slots=5, config=drafter.config
    )
    blocks = Blocks(
        context_offsets=[0, NUM_TOKENS],
        block_offsets=[0, len(anchors)],
        anchor_positions=anchors,
    )
    target_cache, cache = target.new_cache(), drafter.new_cache()
    with torch.no_grad():
        trained = drafter(embeddings, features, blocks)
        for block, anchor, want in zip(embeddings, anchors.tolist(), trained, strict=True):
            fed = target.forward(input_ids[:, cache.length : anchor], cache=target_cache)
            served = drafter.draft_step(block, fed.features[0], cache)
            assert_close("hidden", served, want, 1e-10)
            got, expected = (drafter.logits(hidden, target.head) for hidden in (served, want))
            assert_close("logits", got, expected, 1e-10)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_drafter_starts_from_layers_of_its_own_kind(family: str):
    target = family_target(family, dtype=torch.float64)
    drafter = Drafter(fitting_config(target)).double()
    initialize_from_target(drafter, target.model)
    source = target.model.get_decoder().get_submodule("layers.5.mlp.down_proj")
    assert torch.equal(
        drafter.get_parameter("layers.1.mlp.down_proj.weight"), source.get_parameter("weight")
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gemma3", "gemma4"])
def test_layers_of_another_kind_are_refused_with_the_way_out(family: str):
    target = family_target(family, dtype=torch.float64)
    drafter = Drafter(fitting_config(target)).double()
    with pytest.raises(ValueError, match=r"drafter\.init=random"):
        initialize_from_target(drafter, target.model)


RECURRENT = Qwen3_5TextConfig(
    **_SHAPE,
    intermediate_size=64,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
)


def test_a_running_state_neither_sees_padding_nor_rows_that_have_left_the_batch():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(RECURRENT, dtype=torch.float32)
    target = Target(model, tiny_tokenizer(), [1, 3], name="recurrent", revision="seed-0")
    prompts = [[10, 20, 30], [*range(40, 60)], [11, 12, 13, 14, 15]]  # padded on the left
    second = target.generate_batch(prompts[:1], max_new_tokens=2)[0].output_ids[-1]
    target.stop_token_ids = frozenset({second})  # the first row leaves early
    answers = target.generate_batch(prompts, max_new_tokens=12)
    assert len(answers[0].output_ids) < max(len(row.output_ids) for row in answers)
    rows = [[*prompt, *row.output_ids] for prompt, row in zip(prompts, answers, strict=True)]
    for answer, forced in zip(answers, target.features_of(rows), strict=True):
        assert_close("features", answer.features, forced, 1e-5)


def test_a_drafter_of_a_recurrent_target_is_plain():
    config = DrafterConfig.for_target(
        DrafterSettings(mask_token_id=MASK_TOKEN_ID, num_taps=3), RECURRENT
    )
    assert config.target_layer_ids == [1, 2, 3]
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
