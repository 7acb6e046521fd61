"""Target features in 8 bits: float8_e4m3fn with one scale per token and tap layer.

The largest value of each token and tap lands on 448, the format's largest. Layers differ in
magnitude by orders, and the first token of a text often towers over all others, so neither can
share a scale; the format's own exponent covers the outlier channels within one vector. A value
comes back within 1/16 of itself, unless it is 30,000 times smaller than its vector's largest.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_train.config import require

SCALE_BYTES = 4
"""Stored bytes of one scale, a float32."""
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(kw_only=True)
class QuantizedFeatures:
    """Features of N tokens in 8 bits; L taps of width E."""

    values: Tensor
    """`[N, L*E]` float8_e4m3fn."""
    scales: Tensor
    """`[N, L]` float32: a feature is its value times its token's and tap's scale."""


def quantize(features: Tensor, num_taps: int) -> QuantizedFeatures:
    """Give 8-bit features with one scale per token and tap.

    Args:
        features: `[N, L*E]`, any float dtype.
        num_taps: L.

    Raises:
        ValueError: A feature is infinite or not a number, which 8 bits cannot hold.
    """
    taps = features.float().unflatten(-1, (num_taps, -1))  # [N, L, E]
    largest = taps.abs().amax(-1)  # [N, L]
    require(
        bool(largest.isfinite().all()),
        "data.features_dtype (=float8_e4m3fn) needs finite features, and the target gave infinite "
        "ones. Run it with target.dtype=float32.",
    )
    scales = torch.where(largest > 0, largest / _LARGEST, 1.0)  # a row of zeros stays one
    values = (taps / scales[..., None]).clamp(-_LARGEST, _LARGEST)
    return QuantizedFeatures(values=values.flatten(-2).to(torch.float8_e4m3fn), scales=scales)


def dequantize(quantized: QuantizedFeatures, dtype: torch.dtype) -> Tensor:
    """Give `[N, L*E]` in `dtype`, on the CPU."""
    # Looking a byte up is four times as fast as torch's own conversion on a CPU.
    codes = quantized.values.view(torch.uint8).flatten().int()
    values = _values_of_bytes().index_select(0, codes).view(quantized.values.shape)
    values.unflatten(-1, (quantized.scales.shape[-1], -1)).mul_(quantized.scales[..., None])
    return values.to(dtype)


@functools.cache
def _values_of_bytes() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
