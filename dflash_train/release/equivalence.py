"""Train/serve equivalence on real weights: one block, computed as in training and as in serving.

In training all blocks of a sequence stand in one pass over all of its features; in serving a
block stands alone after a cache that grew from step to step. The two must give the same numbers in
every slot: what was trained is what is served (drafter invariant 1). Random tokens do, since the
features are the target's own.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_train.drafter.attention import Blocks
from dflash_train.drafter.checkpoint import load_checkpoint
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.target import Target
from dflash_train.release.evidence import with_taps
from dflash_train.release.finding import Finding, Patient, demand, ok

NUM_TOKENS = (96, 512)
"""Length of the random sequence, in tokens: a window and a block more where that is below the
second number."""
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative RMS difference allowed, by the dtype of the computation."""
MOST_FLOAT64 = 1 << 28
"""Drafter parameters and head entries that are computed in float64 (2 GB); more takes float32."""


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """How far the two ways lie apart: RMS difference over RMS value, all anchors and slots."""

    anchors: list[int]
    dtype: torch.dtype
    hidden_error: float
    logits_error: float
    same_drafts: bool
    """Both ways draft the same tokens."""

    @property
    def holds(self) -> bool:
        """Tell whether the difference is rounding."""
        limit = LIMITS[self.dtype]
        return self.hidden_error <= limit and self.logits_error <= limit and self.same_drafts


def check_equivalence(patient: Patient) -> Finding:
    """Check that the training forward equals the cached decode step on the target's features."""
    target = patient.target
    assert target is not None
    drafter = load_checkpoint(patient.folder).to(target.device)  # its own: its dtype changes
    found = measure_equivalence(drafter, target)
    text = (
        f"at anchors {found.anchors}, {str(found.dtype).removeprefix('torch.')}: hidden states "
        f"differ by {found.hidden_error:.0e}, logits by {found.logits_error:.0e}"
    )
    demand(
        found.holds,
        f"training forward and cached decode step part {text}, drafts "
        f"{'equal' if found.same_drafts else 'differ'}.",
        remedy="Do not serve it: report this with the checkpoint's config.json.",
    )
    return ok(f"{text}, drafts equal.")


@torch.no_grad()
def measure_equivalence(drafter: Drafter, target: Target) -> Equivalence:
    """Compute blocks after the first token, in the middle and at the end in both ways.

    Args:
        drafter: In float32; it is cast to float64 where that is cheap.
        target: Any taps; the drafter's are used.
    """
    config = drafter.config
    head = drafter.output_head(target.head)
    size = sum(weight.numel() for weight in drafter.parameters()) + head.lm_head_weight.numel()
    dtype = torch.float64 if size <= MOST_FLOAT64 else torch.float32
    drafter, head = drafter.to(dtype), _cast(head, dtype)

    generator = torch.Generator().manual_seed(0)
    length = min(
        max(NUM_TOKENS[0], (config.sliding_window or 0) + config.block_size), NUM_TOKENS[1]
    )
    input_ids = torch.randint(config.vocab_size, (length,), generator=generator).to(target.device)
    anchors = torch.tensor([1, length // 2, length - 1], device=target.device)
    features = _features(target, config.target_layer_ids, input_ids).to(dtype)
    embeddings = block_embeddings(
        target.head, input_ids[anchors], num_slots=config.block_size, config=config
    ).to(dtype)

    trained = drafter(embeddings, features, _blocks(anchors, length))
    served = _serve(drafter, embeddings, features, anchors.tolist())
    return Equivalence(
        anchors=anchors.tolist(),
        dtype=dtype,
        hidden_error=_relative_error(trained, served),
        logits_error=_relative_error(drafter.logits(trained, head), drafter.logits(served, head)),
        same_drafts=all(
            torch.equal(drafter.draft(one, anchor_id, head), drafter.draft(other, anchor_id, head))
            for one, other, anchor_id in zip(trained, served, input_ids[anchors], strict=True)
        ),
    )


def _features(target: Target, target_layer_ids: list[int], input_ids: Tensor) -> Tensor:
    """Give `[T, L*E]` of the drafter's taps, from one pass of the target."""
    tapped = with_taps(target, target_layer_ids)
    return tapped.forward(input_ids[None], last_logits_only=True).features[0]


def _blocks(anchors: Tensor, num_tokens: int) -> Blocks:
    return Blocks(
        context_offsets=[0, num_tokens],
        block_offsets=[0, len(anchors)],
        anchor_positions=anchors,
    )


def _serve(drafter: Drafter, embeddings: Tensor, features: Tensor, anchors: list[int]) -> Tensor:
    """Draft at each anchor after the last, `[A, K, E]`; the cache takes the features between."""
    cache = drafter.new_cache()
    blocks = []
    for block, anchor in zip(embeddings, anchors, strict=True):
        blocks.append(drafter.draft_step(block, features[cache.length : anchor], cache))
    return torch.stack(blocks)


def _cast(head: FrozenHead, dtype: torch.dtype) -> FrozenHead:
    return dataclasses.replace(head, lm_head_weight=head.lm_head_weight.to(dtype))


def _relative_error(got: Tensor, want: Tensor) -> float:
    """Give RMS error over RMS value; infinity where a number is not finite."""
    error = (got - want).double().square().mean().sqrt() / want.double().square().mean().sqrt()
    return float(error) if torch.isfinite(error) else float("inf")
