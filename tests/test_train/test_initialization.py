import pytest
import torch
from transformers import AutoModelForCausalLM

from dflash_train.config import DrafterSettings
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.initialization import initialize_from_target
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target
from dflash_train.testing import (
    MASK_TOKEN_ID,
    assert_close,
    tiny_drafter,
    tiny_llama_config,
    tiny_target,
)


@pytest.fixture
def target() -> Target:
    """A tiny target whose last tap feeds the first copied layer, with norms that are not ones."""
    target = tiny_target(dtype=torch.float64)
    target.target_layer_ids = [1, 3]
    for name, weight in target.model.named_parameters():
        if "layernorm" in name or name.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return target


def new_drafter(target: Target, *, intermediate_size: int | None = None) -> Drafter:
    settings = DrafterSettings(
        num_hidden_layers=2,
        target_layer_ids=target.target_layer_ids,
        mask_token_id=MASK_TOKEN_ID,
        intermediate_size=intermediate_size,
    )
    return Drafter(DrafterConfig.for_target(settings, target.model.config)).double()


def test_context_values_start_as_the_targets_own(target: Target) -> None:
    drafter = new_drafter(target)
    initialize_from_target(drafter, target.model)
    drafter.fc.weight.data[:, : drafter.config.hidden_size] = 0  # leave the last tap alone
    drafter.fc.weight.data[:, drafter.config.hidden_size :] = torch.eye(32)
    ids = list(range(10, 30))
    features = target.features_of([ids])[0][:-1]
    source = target.model.get_decoder().get_submodule("layers.4")
    normed = source.get_submodule("input_layernorm")(features[:, 32:])
    want = source.get_submodule("self_attn.v_proj")(normed).unflatten(-1, (-1, 8))
    got = drafter.project_context(features, torch.arange(19))[0].v
    assert_close("values", got, want, 1e-5)  # the target's norms compute in float32


def test_layers_and_final_norm_are_copies_and_other_taps_are_small(target: Target) -> None:
    drafter = new_drafter(target)
    initialize_from_target(drafter, target.model)
    weights = dict(target.model.get_decoder().named_parameters())
    for number, source in enumerate((4, 5)):
        for name in ("mlp.down_proj.weight", "self_attn.o_proj.weight"):
            own = drafter.get_parameter(f"layers.{number}.{name}")
            assert torch.equal(own, weights[f"layers.{source}.{name}"])
    assert torch.equal(drafter.norm.weight, weights["norm.weight"])
    first_tap, last_tap = drafter.fc.weight.split(32, dim=1)
    assert 0 < first_tap.abs().mean() < 0.01
    assert_close("last tap", last_tap, torch.eye(32), 0.05)


def test_query_norms_keep_the_size_of_the_targets_queries(target: Target) -> None:
    drafter = new_drafter(target)
    initialize_from_target(drafter, target.model)
    rows = torch.randn(4000, 32, dtype=torch.float64)
    attention = drafter.get_submodule("layers.0.self_attn")
    size = attention.get_submodule("q_proj")(rows).square().mean().sqrt()
    weight = attention.get_parameter("q_norm.weight")
    assert_close("size", weight, size.expand_as(weight), 0.05)


def test_biases_are_copied_where_the_target_has_them() -> None:
    target = tiny_target()
    target_config = tiny_llama_config()
    target_config.attention_bias = True
    target.model = AutoModelForCausalLM.from_config(target_config)
    source = target.model.get_decoder().get_submodule("layers.4.self_attn")
    for head in ("q", "k", "v", "o"):
        torch.nn.init.normal_(source.get_parameter(f"{head}_proj.bias"))
    drafter = tiny_drafter(target, attention_bias=True)
    initialize_from_target(drafter, target.model)
    for head in ("q", "k", "v", "o"):
        own = drafter.get_parameter(f"layers.0.self_attn.{head}_proj.bias")
        assert torch.equal(own, source.get_parameter(f"{head}_proj.bias"))


def test_biases_without_a_place_are_refused_with_the_way_out() -> None:
    target = tiny_target()
    target_config = tiny_llama_config()
    target_config.attention_bias = True
    target.model = AutoModelForCausalLM.from_config(target_config)
    with pytest.raises(ValueError, match=r"k_proj\.bias.*drafter\.attention_bias=true"):
        initialize_from_target(tiny_drafter(target), target.model)


def test_layers_of_another_kind_are_refused() -> None:
    target = tiny_target(family="gemma3")
    with pytest.raises(ValueError, match=r"hidden_act.*drafter\.init=random"):
        initialize_from_target(tiny_drafter(target), target.model)


def test_another_width_is_refused_with_the_way_out(target: Target) -> None:
    with pytest.raises(ValueError, match=r"mlp\.gate_proj.*drafter\.init=random"):
        initialize_from_target(new_drafter(target, intermediate_size=48), target.model)
