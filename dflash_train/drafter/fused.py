"""Modules whose backward pass is written by hand: it keeps less and passes over the rows less.

Each equals the plain module that it replaces, gradients included, and has the same parameters. A
weight is read only inside the forward pass of the module that owns it and reaches the autograd
function as an argument: so sharded training (ZeRO-3, FSDP2) gathers it in time, forward and
backward, as it does for a plain `nn.Linear`. That is why `silu(gate) * up` is joined with the down
projection, whose input it is: the whole MLP as one function would read the weights of three
modules from outside. Legend: E hidden size, F MLP width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class RMSNorm(nn.RMSNorm):
    """`x / rms(x) * weight` over the last dimension; keeps `x` and one number per row."""

    def forward(self, x: Tensor) -> Tensor:
        """Norm `[..., E]` in float32 at least; the result has the input's dtype."""
        return _RootMeanSquareNorm.apply(x, self.weight, self.eps)


class LentNorm(RMSNorm):
    """An RMSNorm that can lend its weight to an operation that norms for many layers at once.

    Sharded training frees the weight when the forward pass of its module ends; what that pass
    gives stays.
    """

    def forward(self, x: Tensor | None) -> Tensor:
        """Norm `[..., E]`, or for None give a copy of the weight, `[E]`, with its graph."""
        return self.weight.clone() if x is None else super().forward(x)


def rms_norm(x: Tensor, weight_E: Tensor, *, eps: float) -> Tensor:
    """Norm `[..., E]` as `RMSNorm` does, by a weight that is at hand."""
    return _RootMeanSquareNorm.apply(x, weight_E, eps)


class GatedDown(nn.Linear):
    """`down(silu(gate) * up)`; keeps gate and up alone, the products are computed again."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] it joins two inputs
        """Map `[..., F]` and `[..., F]` to `[..., E]`."""
        return _GatedDown.apply(gate, up, self.weight.to(gate.dtype))


class _RootMeanSquareNorm(torch.autograd.Function):
    """With scale = 1 / rms(x): `x * scale * weight`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Give the normed rows, shaped like `x`."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] the decorator hides names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Give d_x and d_weight.

        With d the gradient, w the weight and n = x * scale: d_weight sums d * n over the rows, and
        d_x = scale * (d * w - n * mean(d * w * n)).
        """
        x, weight, scale = ctx.saved_tensors
        d_out, wide, weight_E = (tensor.to(scale.dtype) for tensor in (grads[0], x, weight))
        product = d_out * wide
        d_weight = scale.flatten() @ product.flatten(0, -2)
        slope = (product @ weight_E)[..., None].mul_(scale.pow(3)).div_(x.shape[-1])
        d_x = (d_out * weight_E).mul_(scale).addcmul_(wide, slope, value=-1)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None


class _GatedDown(torch.autograd.Function):
    """`linear(silu(gate) * up, weight)`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        """Give `[..., E]`."""
        ctx.save_for_backward(gate, up, weight)
        return functional.linear(functional.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] the decorator hides names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, ...]:
        """Give d_gate, d_up and d_weight."""
        gate, up, weight = ctx.saved_tensors
        d_out = grads[0].flatten(0, -2)
        opened = functional.silu(gate)
        d_weight = d_out.T @ (opened * up).flatten(0, -2)
        d_product = (d_out @ weight).view_as(gate)
        d_up = opened.mul_(d_product)
        d_gate = torch.ops.aten.silu_backward(d_product.mul_(up), gate)
        return d_gate, d_up, d_weight
