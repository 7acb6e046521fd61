from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash_kernels._launch import Config
from dflash_kernels.context_kv import append_context, context_keys
from dflash_train.drafter.context import RawContext, context_kv
from dflash_train.testing import LIMITS, assert_close

pytestmark = pytest.mark.usefixtures("_poisoned_memory")
EPS = 1e-6


def tiles_of(rows: int) -> Config:
    return Config(num_warps=1, num_stages=1, tiles={"ROWS": rows})


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one comparison."""

    num_layers: int = 2
    num_tokens: int = 63
    num_heads: int = 3
    head_dim: int = 60
    rows: int = 32
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32


def raw_context(case: Case) -> RawContext:
    """Draw projections and weights in the case's number formats."""
    shape = (case.num_tokens, case.num_heads, case.head_dim)
    angles = 30 * torch.randn(case.num_tokens, case.head_dim // 2).repeat(1, 2)
    return RawContext(
        keys=[torch.randn(shape, dtype=case.dtype) * 3 for _ in range(case.num_layers)],
        values=[torch.randn(shape, dtype=case.dtype) for _ in range(case.num_layers)],
        weights=[
            torch.randn(case.head_dim, dtype=case.weight_dtype) for _ in range(case.num_layers)
        ],
        eps=EPS,
        cos=angles.cos().to(case.dtype),
        sin=angles.sin().to(case.dtype),
    )


def widened(raw: RawContext) -> RawContext:
    """Give the same numbers in float64."""
    return replace(
        raw,
        keys=[each.double() for each in raw.keys],
        values=[each.double() for each in raw.values],
        weights=[each.double() for each in raw.weights],
        cos=raw.cos.double(),
        sin=raw.sin.double(),
    )


def gradients_of(keys: list[Tensor], raw: RawContext, upstream: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(keys, [*raw.keys, *raw.weights], upstream))


def assert_same(case: Case) -> None:
    """Compare keys and all gradients with the definition's in float64."""
    raw = raw_context(case)
    wide = widened(raw)
    for each in (*raw.keys, *raw.weights, *wide.keys, *wide.weights):
        each.requires_grad_()
    got = context_keys(
        raw.keys, raw.weights, cos_TD=raw.cos, sin_TD=raw.sin, eps=EPS, config=tiles_of(case.rows)
    )
    want = [layer.k for layer in context_kv(wide)]
    for layer, (key, wanted) in enumerate(zip(got, want, strict=True)):
        assert key.dtype == case.dtype
        assert_close(f"{case}: key {layer}", key.detach(), wanted.detach(), LIMITS[case.dtype][0])
    upstream = [torch.randn_like(key) for key in got]
    found = gradients_of(got, raw, upstream)
    wanted = gradients_of(want, wide, [each.double() for each in upstream])
    for place, (grad, want_grad) in enumerate(zip(found, wanted, strict=True)):
        limit = LIMITS[grad.dtype][1]  # that of the weights' own number format for theirs
        assert_close(f"{case}: gradient {place}", grad, want_grad, limit)


CASES = st.builds(
    Case,
    num_layers=st.integers(1, 2),
    num_tokens=st.integers(1, 6),
    num_heads=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 8, 16, 60]),
    rows=st.sampled_from([16, 64]),  # few programs: each is a slow walk of the interpreter
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    weight_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)


@settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(CASES)
def test_keys_and_gradients_are_those_of_the_definition(case: Case):
    assert_same(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [60, 128])
def test_so_are_those_of_odd_shapes(dtype: torch.dtype, head_dim: int):
    assert_same(Case(dtype=dtype, head_dim=head_dim))


def test_a_weight_gathers_more_tiles_than_there_are_programs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dflash_kernels.context_kv.PROGRAMS", 3)
    assert_same(Case(num_tokens=23, head_dim=8, rows=4))


def test_no_rows_give_no_keys_and_no_gradient():
    raw = raw_context(Case(num_tokens=0))
    for weight in raw.weights:
        weight.requires_grad_()
    keys = context_keys(raw.keys, raw.weights, cos_TD=raw.cos, sin_TD=raw.sin, eps=EPS)
    assert [key.shape for key in keys] == [key.shape for key in raw.keys]
    found = torch.autograd.grad(keys, raw.weights, keys)
    assert all(torch.equal(grad, torch.zeros(60)) for grad in found)


def test_projections_that_are_views_of_one_matrix_are_read_where_they_stand():
    case = Case(num_tokens=9, head_dim=8)
    raw = raw_context(case)
    joined = torch.cat([each.flatten(1) for each in raw.keys], dim=1)
    views = [each.unflatten(1, (case.num_heads, -1)) for each in joined.chunk(2, dim=1)]
    got, want = (
        context_keys(keys, raw.weights, cos_TD=raw.cos, sin_TD=raw.sin, eps=EPS)
        for keys in (views, raw.keys)
    )
    assert not views[1].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_new_rows_go_behind_the_old_ones_and_touch_nothing_else(dtype: torch.dtype):
    case = Case(num_tokens=5, head_dim=12, dtype=dtype)
    raw = raw_context(case)
    buffer = torch.full((2, case.num_layers, 20, case.num_heads, case.head_dim), 7.0).to(dtype)
    append_context(
        raw.keys, raw.values, raw.weights, cos_nD=raw.cos, sin_nD=raw.sin, eps=EPS,
        out_k_NnGD=buffer[0, :, 6:11], out_v_NnGD=buffer[1, :, 6:11], config=tiles_of(4),
    )  # fmt: skip
    for layer, want in enumerate(context_kv(widened(raw))):
        assert_close(f"key {layer}", buffer[0, layer, 6:11], want.k, LIMITS[dtype][0])
        assert torch.equal(buffer[1, layer, 6:11], raw.values[layer])
    assert (buffer[:, :, :6] == 7).all()
    assert (buffer[:, :, 11:] == 7).all()


def test_a_cache_whose_rows_are_not_neighbours_is_refused():
    raw = raw_context(Case(num_tokens=5, head_dim=12))
    heads_first = torch.zeros(2, 3, 5, 12).transpose(1, 2)
    with pytest.raises(ValueError, match="out_k_NnGD: each layer's rows must be contiguous"):
        append_context(
            raw.keys, raw.values, raw.weights, cos_nD=raw.cos, sin_nD=raw.sin, eps=EPS,
            out_k_NnGD=heads_first, out_v_NnGD=heads_first,
        )  # fmt: skip


def test_two_runs_give_the_same_bits():
    raw = raw_context(Case(head_dim=16))
    for each in (*raw.keys, *raw.weights):
        each.requires_grad_()
    runs = []
    for _ in range(2):
        keys = context_keys(raw.keys, raw.weights, cos_TD=raw.cos, sin_TD=raw.sin, eps=EPS)
        runs.append(gradients_of(keys, raw, [key.detach() for key in keys]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
