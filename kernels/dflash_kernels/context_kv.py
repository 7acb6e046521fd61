"""Keys and values of the context for all drafter layers at once: k-norm, RoPE, cache layout.

The matrix products before it stay with the vendor's library; what follows them in plain torch is
ten passes over the keys of every layer, and here it is one. Training calls `context_keys`, which is
differentiable and leaves values where the projection wrote them; the decoder calls
`append_context`, which writes the keys and values of a few new rows behind those that a growing
buffer holds. One program takes some rows of keys and walks the layers, so that it reads the angles
of its rows once. A row's halves are two tiles, since RoPE (neox layout) pairs column j with
j + D / 2, and neither D nor D / 2 need be a power of two.

The gradient of a norm's weight sums over all rows: every program adds up some tiles in order and
writes one partial sum, and torch adds the partial sums. There are no atomics, so that a run resumed
gives the same bits.

Legend: N layers, T context rows, G kv heads, D head dim, R = T * G rows of keys.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dflash_kernels._launch import Arch, Config, Specimen, Work, arch_of, on_device_of
from dflash_kernels._numbers import rounded

SHAPES = {"num_layers": 5, "num_tokens": 4096, "num_kv_heads": 8, "head_dim": 128}
"""A drafter of 5 layers for Qwen3-8B over 4096 tokens of context: what the reports take."""
PROGRAMS = 512
"""Partial sums of a weight's gradient, at most; a function of nothing, so that bits are not of the
device."""


def config_for(arch: Arch) -> Config:
    """Give the configuration of all three kernels: rows of keys per tile.

    Args:
        arch: Memory-bound kernels differ in the width of a warp only.
    """
    num_warps = 2 if arch is Arch.gfx942 else 4
    return Config(num_warps=num_warps, num_stages=1, tiles={"ROWS": 32})


def context_keys(
    keys: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    cos_TD: Tensor,
    sin_TD: Tensor,
    eps: float,
    config: Config | None = None,
) -> list[Tensor]:
    """Norm and rotate each layer's projected keys; differentiable in keys and weights.

    Args:
        keys: N tensors `[T, G, D]`, as projected.
        weights: N tensors `[D]` of the layers' key norms, of any one dtype.
        cos_TD: `[T, D]` of the rows' positions.
        sin_TD: `[T, D]`.
        eps: Of the norms.
        config: None takes that of the device.

    Returns:
        N tensors `[T, G, D]` of the keys' dtype, neighbours in one buffer.
    """
    config = config or config_for(arch_of(cos_TD.device))
    return list(_ContextKeys.apply(cos_TD, sin_TD, eps, config, *keys, *weights))


@torch.no_grad()
def append_context(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    cos_nD: Tensor,
    sin_nD: Tensor,
    eps: float,
    out_k_NnGD: Tensor,
    out_v_NnGD: Tensor,
    config: Config | None = None,
) -> None:
    """Norm and rotate new keys, and write them and their values into a cache; no gradient.

    Args:
        keys: N tensors `[n, G, D]`, as projected.
        values: N tensors `[n, G, D]`.
        weights: N tensors `[D]`.
        cos_nD: `[n, D]` of the rows' positions.
        sin_nD: `[n, D]`.
        eps: Of the norms.
        out_k_NnGD: Where the keys go: rows of a larger buffer, each layer's without gaps.
        out_v_NnGD: Where the values go, likewise.
        config: None takes that of the device.

    Raises:
        ValueError: The rows of a layer are not neighbours in memory.
    """
    for name, out in (("out_k_NnGD", out_k_NnGD), ("out_v_NnGD", out_v_NnGD)):
        if not out[0].is_contiguous():
            raise ValueError(f"{name}: each layer's rows must be contiguous. Cut rows, not heads.")
    config = config or config_for(arch_of(cos_nD.device))
    _norm_rotate(
        keys, values, weights, (cos_nD, sin_nD, eps), (out_k_NnGD, out_v_NnGD), config=config
    )


class _ContextKeys(torch.autograd.Function):
    """Keeps the projected keys and no number per row: the backward pass norms again."""

    @staticmethod
    def forward(
        ctx: Any, cos_TD: Tensor, sin_TD: Tensor, eps: float, config: Config, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Give N tensors `[T, G, D]`."""
        ctx.num_layers = len(tensors) // 2
        keys = [each.contiguous() for each in tensors[: ctx.num_layers]]
        weights = tensors[ctx.num_layers :]
        out_NTGD = keys[0].new_empty(ctx.num_layers, *keys[0].shape)
        turn = cos_TD.contiguous(), sin_TD.contiguous(), eps
        _norm_rotate(keys, None, weights, turn, (out_NTGD, out_NTGD), config=config)
        ctx.save_for_backward(*turn[:2], *keys, *weights)
        ctx.eps, ctx.config = eps, config
        return out_NTGD.unbind(0)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] the decorator hides names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Give d_key and d_weight of every layer."""
        cos_TD, sin_TD, *tensors = ctx.saved_tensors
        keys, weights = tensors[: ctx.num_layers], tensors[ctx.num_layers :]
        d_out = tuple(each.contiguous() for each in grads)
        d_keys_NTGD = keys[0].new_empty(ctx.num_layers, *keys[0].shape)
        num_rows = _num_rows(keys[0])
        num_programs = _num_programs(num_rows, ctx.config)
        shape = num_programs, ctx.num_layers, cos_TD.shape[1]
        partial_pND = torch.empty(shape, dtype=torch.float32, device=cos_TD.device)
        with on_device_of(cos_TD):
            _backward_kernel[(num_programs,)](
                d_out, tuple(keys), tuple(weights), cos_TD, sin_TD, d_keys_NTGD, partial_pND,
                num_rows, num_programs, ctx.eps,
                **_constants(keys[0], ctx.num_layers), **ctx.config.arguments(),
            )  # fmt: skip
        d_weights_ND = partial_pND.sum(0).to(weights[0].dtype)
        return None, None, None, None, *d_keys_NTGD.unbind(0), *d_weights_ND.unbind(0)


def _norm_rotate(
    keys: Sequence[Tensor],
    values: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    turn: tuple[Tensor, Tensor, float],
    out: tuple[Tensor, Tensor],
    *,
    config: Config,
) -> None:
    """Launch the forward kernel; without values it writes the first of `out` only."""
    num_rows, (out_k, out_v) = _num_rows(keys[0]), out
    if num_rows == 0:  # no GPU takes an empty grid
        return
    keys = tuple(each.contiguous() for each in keys)
    copied = keys if values is None else tuple(each.contiguous() for each in values)
    cos, sin, eps = turn
    with on_device_of(cos):
        _forward_kernel[(_num_tiles(num_rows, config),)](
            keys, copied, tuple(weights), cos.contiguous(), sin.contiguous(), out_k, out_v,
            num_rows, out_k.stride(0), out_v.stride(0), eps,
            **_constants(keys[0], len(keys)), **{"COPIES_VALUES": values is not None},
            **config.arguments(),
        )  # fmt: skip


def _num_rows(keys_TGD: Tensor) -> int:
    return keys_TGD.shape[0] * keys_TGD.shape[1]


def _num_tiles(num_rows: int, config: Config) -> int:
    return -(-num_rows // config.tiles["ROWS"])


def _num_programs(num_rows: int, config: Config) -> int:
    """Give the programs of the backward pass: one at least, which then writes sums of nothing."""
    return max(1, min(PROGRAMS, _num_tiles(num_rows, config)))


def _constants(keys_TGD: Tensor, num_layers: int) -> dict[str, int]:
    num_heads, head_dim = keys_TGD.shape[1:]
    return _shape_constants(num_layers, num_heads, head_dim)


def _shape_constants(num_layers: int, num_heads: int, head_dim: int) -> dict[str, int]:
    half = head_dim // 2
    return {"LAYERS": num_layers, "HEADS": num_heads, "HALF": half,
            "COLUMNS": 1 << (half - 1).bit_length()}  # fmt: skip


@triton.jit
def _pairs(rows, columns, width: tl.constexpr):
    """Give the int64 places of the columns in rows of a width, the rows' lower halves."""
    return rows.to(tl.int64)[:, None] * width + columns[None, :]


@triton.jit
def _row_of_weight(weight, columns, is_column):
    """Give `[1, columns]` float32 of a norm's weight, 0 past its end."""
    return tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _loaded(pointer, places, mask):
    """Load as float32, the number format of all sums here; 0 outside of the mask."""
    return tl.load(pointer + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    keys, values, weights, cos, sin, out_k, out_v,
    num_rows, k_stride, v_stride, eps,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr,
    COPIES_VALUES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Norm and rotate `ROWS` rows of every layer.

    `keys`, `values` and `weights` are tuples of pointers, one per layer; `out_k` and `out_v` are
    one buffer each, with strides between layers.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    is_column = columns < HALF
    mask = (rows < num_rows)[:, None] & is_column[None, :]
    places = _pairs(rows, columns, 2 * HALF)
    angles = _pairs(rows // HEADS, columns, 2 * HALF)  # all heads of a token turn alike
    cos_low, cos_high = _loaded(cos, angles, mask), _loaded(cos, angles + HALF, mask)
    sin_low, sin_high = _loaded(sin, angles, mask), _loaded(sin, angles + HALF, mask)
    for layer in tl.static_range(LAYERS):
        low = _loaded(keys[layer], places, mask)
        high = _loaded(keys[layer], places + HALF, mask)
        mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF)
        scale = tl.rsqrt(mean + eps)[:, None]
        low = low * scale * _row_of_weight(weights[layer], columns, is_column)
        high = high * scale * _row_of_weight(weights[layer] + HALF, columns, is_column)
        # Rounded once, here: the norm's result stays float32 on its way through the rotation.
        turned_low = rounded(low * cos_low - high * sin_low, out_k.dtype.element_ty)
        turned_high = rounded(high * cos_high + low * sin_high, out_k.dtype.element_ty)
        k_row = out_k + k_stride.to(tl.int64) * layer
        tl.store(k_row + places, turned_low, mask)
        tl.store(k_row + places + HALF, turned_high, mask)
        if COPIES_VALUES:
            v_row = out_v + v_stride.to(tl.int64) * layer
            for half in tl.static_range(2):
                value = tl.load(values[layer] + places + half * HALF, mask=mask)
                tl.store(v_row + places + half * HALF, value, mask)


@triton.jit
def _backward_kernel(
    d_out, keys, weights, cos, sin, d_keys, partial,
    num_rows, num_programs, eps,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Give d_keys of every `num_programs`-th tile, and the tiles' part of the weights' gradients.

    With d the gradient of the normed row, turned back, w the weight, n = x * scale:
    d_w sums d * n over the rows, and d_x = scale * (d * w - n * mean(d * w * n)).
    """
    program = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    is_column = columns < HALF
    num_tiles = tl.cdiv(num_rows, ROWS)
    for layer in tl.static_range(LAYERS):
        weight_low = _row_of_weight(weights[layer], columns, is_column)
        weight_high = _row_of_weight(weights[layer] + HALF, columns, is_column)
        sum_low = tl.zeros((COLUMNS,), tl.float32)
        sum_high = tl.zeros((COLUMNS,), tl.float32)
        layer_row = num_rows.to(tl.int64) * (2 * HALF) * layer
        for tile in range(program, num_tiles, num_programs):
            rows = tile * ROWS + tl.arange(0, ROWS)
            mask = (rows < num_rows)[:, None] & is_column[None, :]
            places = _pairs(rows, columns, 2 * HALF)
            angles = _pairs(rows // HEADS, columns, 2 * HALF)
            d_low = _loaded(d_out[layer], places, mask)
            d_high = _loaded(d_out[layer], places + HALF, mask)
            turned_low = d_low * _loaded(cos, angles, mask)
            turned_low += d_high * _loaded(sin, angles + HALF, mask)
            turned_high = d_high * _loaded(cos, angles + HALF, mask)
            turned_high -= d_low * _loaded(sin, angles, mask)
            low = _loaded(keys[layer], places, mask)
            high = _loaded(keys[layer], places + HALF, mask)
            mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF)
            scale = tl.rsqrt(mean + eps)[:, None]
            low, high = low * scale, high * scale
            sum_low += tl.sum(turned_low * low, 0)
            sum_high += tl.sum(turned_high * high, 0)
            d_low, d_high = turned_low * weight_low, turned_high * weight_high
            slope = (tl.sum(d_low * low, 1) + tl.sum(d_high * high, 1)) / (2 * HALF)
            d_low = scale * (d_low - low * slope[:, None])
            d_high = scale * (d_high - high * slope[:, None])
            d_row = d_keys + layer_row
            tl.store(d_row + places, rounded(d_low, d_keys.dtype.element_ty), mask)
            tl.store(d_row + places + HALF, rounded(d_high, d_keys.dtype.element_ty), mask)
        sums = partial + (program.to(tl.int64) * LAYERS + layer) * (2 * HALF) + columns
        tl.store(sums, sum_low, is_column)
        tl.store(sums + HALF, sum_high, is_column)


def kernels_to_compile(arch: Arch) -> list[Specimen]:
    """Give the three launches in bf16 under autocast, whose weights are float32, and float32."""
    constants = _shape_constants(SHAPES["num_layers"], SHAPES["num_kv_heads"], SHAPES["head_dim"])
    return [
        Specimen(
            name=f"context_kv {stage}, {dtype}",
            kernel=_backward_kernel if stage == "backward" else _forward_kernel,
            signature=_signature(dtype, is_backward=stage == "backward"),
            constexprs=constants if stage == "backward" else {**constants, "COPIES_VALUES": copies},
            config=config_for(arch),
        )
        for dtype in ("bf16", "fp32")
        for stage, copies in (("forward", False), ("append", True), ("backward", False))
    ]


def _signature(dtype: str, *, is_backward: bool) -> dict[str, Any]:
    """Give the types of a launch; angles have the dtype of the keys."""
    num_layers, x = SHAPES["num_layers"], f"*{dtype}:16"
    per_layer, weights = (x,) * num_layers, ("*fp32:16",) * num_layers
    angles = {"cos": x, "sin": x}
    if is_backward:
        tensors = {"d_out": per_layer, "keys": per_layer, "weights": weights, **angles}
        numbers = {"num_rows": "i32:16", "num_programs": "i32:16", "eps": "fp32"}
        return {**tensors, "d_keys": x, "partial": "*fp32:16", **numbers}
    tensors = {"keys": per_layer, "values": per_layer, "weights": weights, **angles}
    numbers = {"num_rows": "i32:16", "k_stride": "i32:16", "v_stride": "i32:16", "eps": "fp32"}
    return {**tensors, "out_k": x, "out_v": x, **numbers}


def work(
    *,
    num_layers: int = SHAPES["num_layers"],
    num_tokens: int = SHAPES["num_tokens"],
    num_kv_heads: int = SHAPES["num_kv_heads"],
    head_dim: int = SHAPES["head_dim"],
    element_bytes: int = 2,
    config: Config | None = None,
) -> list[Work]:
    """Count the bytes of both passes; there is no matrix product.

    Args:
        num_layers: N.
        num_tokens: T.
        num_kv_heads: G.
        head_dim: D.
        element_bytes: Of a key, and of an angle.
        config: None takes that of an H100.
    """
    config = config or config_for(Arch.sm_90)
    num_rows = num_tokens * num_kv_heads
    num_tiles = _num_tiles(num_rows, config)
    num_programs = _num_programs(num_rows, config)
    keys = num_layers * num_rows * head_dim * element_bytes
    angles, weights = 2 * num_rows * head_dim * element_bytes, 4 * num_layers * head_dim
    once = angles // num_kv_heads + weights
    return [
        Work(
            name="context_kv forward",
            flops=0,
            bound_flops=0,
            num_bytes=2 * keys + angles + num_tiles * weights,
            bound_bytes=2 * keys + once,
        ),
        Work(
            name="context_kv backward",
            flops=0,
            bound_flops=0,
            # Angles are read for every layer, and partial sums of weights written and read back.
            num_bytes=3 * keys + num_layers * angles + 3 * num_programs * weights,
            bound_bytes=3 * keys + once + weights,
        ),
    ]
