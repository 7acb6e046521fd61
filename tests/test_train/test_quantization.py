import pytest
import torch

from dflash_train.features.quantization import dequantize, quantize

TAPS, WIDTH = 3, 60


def features(num_tokens: int = 63) -> torch.Tensor:
    """Features like a target's: taps of different magnitude, a few outlier channels."""
    generator = torch.Generator().manual_seed(0)
    taps = torch.randn(num_tokens, TAPS, WIDTH, generator=generator)
    taps *= torch.tensor([0.01, 1.0, 300.0])[:, None]
    taps[..., 7] *= 50
    return taps.flatten(1)


def test_a_value_comes_back_within_a_sixteenth_of_itself():
    original = features()
    read = dequantize(quantize(original, TAPS), torch.float32)
    taps = original.view(-1, TAPS, WIDTH)
    largest = taps.abs().amax(-1, keepdim=True)
    error = (read.view_as(taps) - taps).abs()
    is_normal = taps.abs() >= largest / 448 * 2**-6
    assert is_normal.float().mean() > 0.9
    assert bool((error <= taps.abs() / 16)[is_normal].all())
    assert bool((error <= largest / 448 * 2**-10).logical_or(is_normal).all())


def test_each_token_and_tap_has_a_scale_of_its_own():
    original = features()
    louder = original.view(-1, TAPS, WIDTH).clone()
    louder[5, 2] *= 1024
    quantized, changed = quantize(original, TAPS), quantize(louder.flatten(1), TAPS)
    assert quantized.scales.shape == (63, TAPS)
    assert torch.equal(changed.values.view(torch.uint8), quantized.values.view(torch.uint8))
    factors = (changed.scales / quantized.scales).flatten()
    assert factors.sort().values.unique().tolist() == [1.0, 1024.0]
    assert int((factors == 1024).sum()) == 1


def test_the_fast_way_back_is_torchs_own_conversion():
    every_byte = torch.arange(256, dtype=torch.uint8)
    every_byte = every_byte[(every_byte & 127) != 127].view(torch.float8_e4m3fn)  # but not-a-number
    quantized = quantize(every_byte.float()[None], 1)
    quantized.scales.fill_(0.5)
    quantized.values = every_byte[None]
    assert torch.equal(dequantize(quantized, torch.float32), every_byte.float()[None] * 0.5)
    assert dequantize(quantized, torch.bfloat16).dtype is torch.bfloat16


def test_zeros_stay_zeros_and_the_largest_value_is_met():
    rows = torch.zeros(2, TAPS * WIDTH)
    rows[1, 0] = -1e30
    read = dequantize(quantize(rows, TAPS), torch.float32)
    assert not read[0].any()
    assert read[1, 0].item() == pytest.approx(-1e30, rel=1e-6)
    assert not read[1, 1:].any()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_refused(bad: float):
    rows = features()
    rows[3, 4] = bad
    with pytest.raises(ValueError, match=r"data\.features_dtype \(=float8_e4m3fn\)"):
        quantize(rows, TAPS)
