"""The golden forward: what a drafter gives for a fixed random input, stored beside its weights.

Names and shapes of tensors say nothing about RoPE, the causal flag, the window, the order of the
taps or the factors around the head. Whoever loads the drafter can compute the same numbers again,
and where they differ, the drafter is read in another way than it was trained. The input is a
function of the drafter's own settings: rows of a tap depend on its layer id and mask rows on the
mask id, so that two swapped ids show too. It is uniform noise, whose bits do not depend on the
processor. Legend: A blocks, K slots, T context rows, L taps, E hidden size, S slots, C candidates.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dflash_train.drafter.attention import Blocks
from dflash_train.drafter.model import Drafter

SEED = 20_260
NUM_NUMBERS = 32
"""Outputs kept per part, at random places."""
NUM_CONTEXT = 96
"""Context rows of a drafter without a window; with one, two blocks more than the window."""
NUM_CANDIDATES = 16
"""Columns that stand in for logits, at most."""
LOGIT_SCALE = 30.0
"""Makes the stand-in logits as large as a soft cap."""
TOLERANCE = 1e-4
"""Relative error that float32 on another machine may show; a wrong setting shows 1e-2 or more."""
DIGITS = 7
"""Significant digits kept: a float32 has no more."""

_TAPS, _ANCHORS, _MASK, _IDS, _PLACES = 0, 1_000_000, 2_000_000, 12_000_000, 13_000_000
"""Offsets of the seeds of independent streams, far apart since an id is added to them."""


@dataclass(frozen=True, kw_only=True)
class Digest:
    """A large tensor in short."""

    shape: list[int]
    rms: float
    """Root mean square of the whole."""
    numbers: list[float]
    """Entries at fixed random places."""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Digest":
        """Build it from plain values; JSON has null for what is no number."""
        values = [math.nan if each is None else each for each in content["numbers"]]
        rms = math.nan if content["rms"] is None else content["rms"]
        return cls(shape=content["shape"], rms=rms, numbers=values)


@dataclass(frozen=True, kw_only=True)
class GoldenForward:
    """The stored result, and what it takes to compute it again."""

    seed: int
    num_context: int
    """T, in tokens."""
    anchors: list[int]
    """Positions of the blocks: the first possible one, one in the middle, two past any window."""
    dtype: str
    """Number format of the computation, on a CPU."""
    tolerance: float
    """Largest relative error between two machines."""
    parts: dict[str, Digest]
    """By name: `hidden`, `logits`, and what the drafter's variant adds."""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "GoldenForward":
        """Build it from what `dataclasses.asdict` gave."""
        fields = dict(content)
        parts = fields.pop("parts")
        return cls(parts={name: Digest.from_json(part) for name, part in parts.items()}, **fields)


def golden_forward(drafter: Drafter) -> GoldenForward:
    """Compute the digest of a drafter's outputs, in float32 on the CPU.

    Args:
        drafter: On any device, of any dtype; it is not changed.
    """
    config = drafter.config
    length = max(NUM_CONTEXT, (config.sliding_window or 0) + 2 * config.block_size)
    anchors = [1, length // 2, length - config.block_size, length]
    return _compute(drafter, seed=SEED, num_context=length, anchors=anchors)


def check_golden(drafter: Drafter, golden: GoldenForward) -> float:
    """Compute the stored forward again and give its relative error; infinity for other shapes.

    The error is the largest over all parts, of their numbers (RMS difference over RMS value) and
    of their RMS. Above `golden.tolerance` the drafter is not the one that was saved.
    """
    found = _compute(
        drafter, seed=golden.seed, num_context=golden.num_context, anchors=golden.anchors
    )
    if found.parts.keys() != golden.parts.keys():
        return float("inf")
    return max(_difference(part, golden.parts[name]) for name, part in found.parts.items())


def _difference(found: Digest, stored: Digest) -> float:
    if found.shape != stored.shape:
        return float("inf")
    got, want = (torch.tensor([each.rms, *each.numbers]) for each in (found, stored))
    errors = torch.stack([(got - want)[1:].square().mean().sqrt(), (got - want)[0].abs()])
    scale = torch.maximum(want[1:].square().mean().sqrt(), want[0])
    worst = float(errors.max() / scale.clamp(min=torch.finfo(want.dtype).tiny))
    return worst if math.isfinite(worst) else math.inf  # NaN compares with nothing


@torch.no_grad()
def _compute(drafter: Drafter, *, seed: int, num_context: int, anchors: list[int]) -> GoldenForward:
    drafter = _on_cpu(drafter)
    config = drafter.config
    width, num_blocks = config.hidden_size, len(anchors)
    taps = [_noise(seed + _TAPS + i, (num_context, width)) for i in config.target_layer_ids]
    rows_AKE = _noise(seed + _MASK + config.mask_token_id, (1, 1, width)).repeat(
        num_blocks, config.block_size, 1
    )
    rows_AKE[:, 0] = _noise(seed + _ANCHORS, (num_blocks, width))
    blocks = Blocks(
        context_offsets=[0, num_context],
        block_offsets=[0, num_blocks],
        anchor_positions=torch.tensor(anchors),
    )
    features = torch.cat(taps, dim=-1)  # [T, L*E]
    hidden_AKE = drafter(rows_AKE * config.input_embedding_scale, features, blocks)
    parts = {"hidden": hidden_AKE} | _head_parts(drafter, hidden_AKE.flatten(0, 1), seed)
    return GoldenForward(
        seed=seed,
        num_context=num_context,
        anchors=anchors,
        dtype="float32",
        tolerance=TOLERANCE,
        parts={name: _digest(part, seed) for name, part in parts.items()},
    )


def _head_parts(drafter: Drafter, hidden_SE: Tensor, seed: int) -> dict[str, Tensor]:
    """Give what follows the hidden states; some of their columns stand in for logits."""
    config = drafter.config
    logits_SC = drafter.shape_logits(LOGIT_SCALE * hidden_SE[:, :NUM_CANDIDATES])
    parts = {"logits": logits_SC}
    generator = torch.Generator().manual_seed(seed + _IDS)
    previous_S = torch.randint(config.vocab_size, hidden_SE.shape[:1], generator=generator)
    if drafter.candidate_selector is not None:
        ids_SC = torch.randint(config.vocab_size, logits_SC.shape, generator=generator)
        parts["candidates"] = drafter.candidate_selector(
            hidden_SE, previous_S, logits_SC=torch.zeros_like(logits_SC), ids_SC=ids_SC
        )
    if drafter.markov_head is not None:
        parts["markov"] = drafter.markov_head(hidden_SE, previous_S)
    if drafter.confidence_head is not None:
        parts["confidence"] = drafter.confidence_logits(hidden_SE, previous_S)
    if drafter.draft_token_ids is not None:
        parts["draft_token_ids"] = drafter.draft_token_ids.float()
    return parts


def _on_cpu(drafter: Drafter) -> Drafter:
    """Give the drafter as it is where that is float32 on the CPU, else a copy that is."""
    weight = drafter.fc.weight
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return drafter
    return copy.deepcopy(drafter).cpu().float()


def _noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Give uniform float32 noise of mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.rand(shape, generator=generator) - 1.0) * 3.0**0.5


def _digest(values: Tensor, seed: int) -> Digest:
    flat = values.flatten()
    generator = torch.Generator().manual_seed(seed + _PLACES)
    places = torch.randint(len(flat), (NUM_NUMBERS,), generator=generator)
    return Digest(
        shape=list(values.shape),
        rms=_rounded(float(flat.double().square().mean().sqrt())),
        numbers=[_rounded(number) for number in flat[places].tolist()],
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
