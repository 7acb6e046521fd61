"""What DFlash 2 puts around a sublayer: a short convolution over the slots of each block.

Definition: z-lab `dflash` 0.1.0. A slot's kernel is a learned one plus a part that the slot's own
normed input chooses, one number per group of channels. The convolution looks left only and starts
anew in every block, so slot 0 mixes with nothing and a block never sees its neighbour. Context
rows do not pass through it. Legend: A blocks, K slots, E hidden size, n kernel size, g channels of
a group.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from dflash_train.drafter.config import DrafterConfig

Sublayer = Callable[[Tensor], Tensor]


class Unmixed(nn.Module):
    """Plain DFlash: the sublayer alone."""

    def __init__(self, config: DrafterConfig) -> None:
        """Build nothing."""
        super().__init__()

    def forward(self, x_AKE: Tensor, sublayer: Sublayer) -> Tensor:
        """Map normed rows `[A, K, E]` by the sublayer."""
        return sublayer(x_AKE)


class BlockConvolution(nn.Module):
    """Grouped dynamic convolution of a sublayer's input (side 0) and output (side 1)."""

    def __init__(self, config: DrafterConfig) -> None:
        """Build the identity: of the learned kernels only the slot itself counts."""
        super().__init__()
        size, group = config.conv_kernel_size, config.conv_group_size
        assert size is not None
        assert group is not None
        width = config.hidden_size
        self.kernel_shape = (2, size, width // group)
        self.base_kernel = nn.Parameter(torch.zeros(2, size, width))
        self.kernel_projection = nn.Linear(width, 2 * size * (width // group), bias=False)
        self.start_as_identity()

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Make the drafter compute what it would compute without the convolution."""
        self.base_kernel.zero_()
        self.base_kernel[:, 0] = 1.0
        self.kernel_projection.weight.zero_()

    def forward(self, x_AKE: Tensor, sublayer: Sublayer) -> Tensor:
        """Convolve normed rows `[A, K, E]`, apply the sublayer, convolve what it gives.

        Both dynamic kernels come from the normed rows.
        """
        dynamic = self.kernel_projection(x_AKE).unflatten(-1, self.kernel_shape)
        before, after = dynamic.unbind(dim=-3)  # [A, K, n, E/g] each
        out_AKE = sublayer(convolve_slots(x_AKE, before, self.base_kernel[0]))
        return convolve_slots(out_AKE, after, self.base_kernel[1])


def convolve_slots(x_AKE: Tensor, dynamic: Tensor, base: Tensor) -> Tensor:
    """Give `out[k, c] = sum_o (base[o, c] + dynamic[k, o, c // g]) * x[k - o, c]`, zeros before 0.

    Args:
        x_AKE: `[A, K, E]`.
        dynamic: `[A, K, n, E/g]`, each slot's own part of the kernel.
        base: `[n, E]`, the part that all slots share.
    """
    num_slots = x_AKE.shape[1]
    groups = dynamic.shape[-1]
    out_AKE = torch.zeros_like(x_AKE)
    for offset in range(min(len(base), num_slots)):
        left_AKE = functional.pad(x_AKE[:, : num_slots - offset], (0, 0, offset, 0))
        chosen = dynamic[:, :, offset, :, None] * left_AKE.unflatten(-1, (groups, -1))
        out_AKE = out_AKE + (base[offset] * left_AKE + chosen.flatten(-2))
    return out_AKE
