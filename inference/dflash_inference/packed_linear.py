"""Linear layers that keep their weight in the layout oneDNN multiplies with.

At a few rows a CPU waits for weights, not for products. A plain linear layer hands its weight to a
library that lays it out anew, or reads it in an order that wastes memory; with the layout fixed
once, eight rows cost hardly more than one. Compiled code calls the product as one opaque operation
whose weight is found by number, so all decoder layers share one compiled graph.
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from dflash_train.drafter.fused import GatedDown
from dflash_train.features.frozen_head import FrozenHead

_ROWS_EXPECTED = 8
"""Rows the layout is chosen for; other numbers work, too."""

_packed: list[tuple[Tensor, Tensor | None]] = []
"""Weight in oneDNN's layout, and bias, of each packed layer of this process."""


class PackedLinear(nn.Module):
    """The product of a linear layer, its weight packed."""

    number: Tensor
    """int64 scalar: place in the list of packed weights. A tensor, so that compiled code takes it
    as an input."""

    def __init__(self, linear: nn.Linear) -> None:
        """Pack the weight of a linear layer on the CPU."""
        super().__init__()
        self.out_features = linear.out_features
        self.register_buffer("number", torch.tensor(pack_weight(linear.weight, linear.bias)))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        return packed_product(x, self.number, self.out_features)


class PackedGatedDown(PackedLinear):
    """`down(silu(gate) * up)` of a drafter layer, its weight packed."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] it joins two inputs
        """Map `[..., F]` and `[..., F]` to `[..., E]`."""
        return packed_product(functional.silu(gate) * up, self.number, self.out_features)


PACKED = {nn.Linear: PackedLinear, GatedDown: PackedGatedDown}
"""Packed form of each kind of linear layer; other kinds stay as they are."""


class PackedHead(FrozenHead):
    """The target's head as the drafter borrows it, its LM head packed."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Multiply `[..., E]` hidden states with the head: `[..., V]`, or `[..., Vd]`."""
        return packed_product(hidden, self.number, len(self.lm_head_weight))

    @functools.cached_property
    def number(self) -> Tensor:
        """int64 scalar: place in the list of packed weights."""
        return torch.tensor(pack_weight(self.lm_head_weight))


def pack_weight(weight: Tensor, bias: Tensor | None = None) -> int:
    """Pack a weight `[out, in]` on the CPU; give its number."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    _packed.append((torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_EXPECTED), bias))
    return len(_packed) - 1


@torch.library.custom_op("dflash_inference::packed_product", mutates_args=())
def packed_product(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    """Multiply `[..., in]` with packed weight `number`, bias added: `[..., out]`."""
    weight, bias = _packed[int(number)]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@packed_product.register_fake
def _(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def pack_linears(module: nn.Module) -> None:
    """Replace every linear layer below a module by its packed form, in place."""
    for name, child in list(module.named_children()):
        if type(child) in PACKED:
            module.register_module(name, PACKED[type(child)](child))
        else:
            pack_linears(child)


def can_pack(device: torch.device) -> bool:
    """Say whether weights on this device can be packed."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available()
