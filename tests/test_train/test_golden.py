from dataclasses import replace
from typing import Any

import pytest
import torch

from dflash_train.drafter.golden import GoldenForward, check_golden, golden_forward
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target
from dflash_train.testing import VARIANTS, tiny_drafter

SEEN = 10
"""A wrong setting must show this many times the tolerance."""


def _read_as(drafter: Drafter, **settings: Any) -> Drafter:
    """Give the same weights under another config, as a reader that takes a key wrongly has them."""
    other = Drafter(replace(drafter.config, **settings))
    other.load_state_dict(drafter.state_dict())
    return other.eval()


def _is_noticed(drafter: Drafter, golden: GoldenForward) -> bool:
    return check_golden(drafter, golden) > SEEN * golden.tolerance


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_drafter_gives_its_golden_forward_again(variant: str, target32: Target):
    drafter = tiny_drafter(target32, **VARIANTS[variant])
    assert check_golden(drafter, golden_forward(drafter)) == 0.0


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
        {"is_causal": True},
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
        {"target_layer_ids": [3, 1]},
        {"target_layer_ids": [2, 4]},
        {"mask_token_id": 4},
        {"block_size": 5},
        {"input_embedding_scale": 5.6},
        {"output_multiplier": 0.9},
        {"final_logit_softcapping": 30.0},
    ],
    ids=str,
)
def test_what_no_shape_reveals_is_noticed(target32: Target, settings: dict[str, Any]):
    drafter = tiny_drafter(target32)
    assert _is_noticed(_read_as(drafter, **settings), golden_forward(drafter))


@pytest.mark.parametrize(
    "settings",
    [
        {"is_causal": False},
        {"sliding_window": 7},
        {"layer_types": None, "sliding_window": None, "is_causal": True},
    ],
    ids=str,
)
def test_a_window_read_wrongly_is_noticed(target32: Target, settings: dict[str, Any]):
    drafter = tiny_drafter(target32, **VARIANTS["sliding_causal"])
    assert _is_noticed(_read_as(drafter, **settings), golden_forward(drafter))


def test_the_blocks_stand_past_a_wide_window(target32: Target):
    config = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 300}
    drafter = tiny_drafter(target32, **config)
    golden = golden_forward(drafter)
    assert golden.anchors[-1] > 300
    assert check_golden(_read_as(drafter, sliding_window=400), golden) > golden.tolerance


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("dflash2", "candidate_selector.hidden_projection.weight"),
        ("dflash2", "layers.1.mlp_conv.base_kernel"),
        ("dspark", "markov_head.markov_w2.weight"),
        ("dspark", "confidence_head.proj.bias"),
        ("dspark_gated", "markov_head.gate_proj.weight"),
        ("reduced", "d2t"),
    ],
)
@torch.no_grad()
def test_a_changed_tensor_of_a_variant_is_noticed(variant: str, name: str, target32: Target):
    drafter = tiny_drafter(target32, **VARIANTS[variant])
    golden = golden_forward(drafter)
    tensor = drafter.state_dict()[name]
    tensor += torch.ones_like(tensor)
    assert _is_noticed(drafter, golden)


def test_weights_that_are_no_numbers_are_noticed(target32: Target):
    drafter = tiny_drafter(target32)
    golden = golden_forward(drafter)
    drafter.norm.weight.data[0] = torch.nan
    assert check_golden(drafter, golden) == float("inf")


def test_low_precision_weights_are_computed_in_float32_and_stay(target32: Target):
    drafter = tiny_drafter(target32).to(torch.bfloat16)
    golden = golden_forward(drafter)
    assert drafter.fc.weight.dtype == torch.bfloat16
    assert check_golden(drafter.float(), golden) == 0.0


def test_the_random_numbers_of_a_run_are_left_alone(target32: Target):
    drafter = tiny_drafter(target32)
    before = torch.random.get_rng_state()
    golden_forward(drafter)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_drafter_of_another_kind_is_infinitely_far(target32: Target):
    golden = golden_forward(tiny_drafter(target32, **VARIANTS["dspark"]))
    assert check_golden(tiny_drafter(target32), golden) == float("inf")


def test_every_drafter_of_one_shape_gets_the_same_input(target32: Target):
    one = golden_forward(tiny_drafter(target32, seed=0))
    other = golden_forward(tiny_drafter(target32, seed=1))
    assert (one.seed, one.num_context, one.anchors) == (
        other.seed,
        other.num_context,
        other.anchors,
    )
    assert one.parts["hidden"].numbers != other.parts["hidden"].numbers
