"""Where the losses of the contenders agree, and the rules that explain where they do not.

Every contender's cross entropy per slot is compared with the twin's; then each one's own rule
(which slots count, what divides the sum) is applied to the twin's slots. If that gives the
contender's own loss, the rule is the whole difference.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.bench_case import Case, decay_weights
from benchmarks.bench_twin import prefix_mask

REASONS = {
    "twin": "the paper: slots up to the first unsupervised token, over the sum of their weights",
    "ours": "the paper, as the twin",
    "speculators": "counts slots behind a gap too, and those in the next document where its prompt "
    "is shorter than a block; divides by their number, not by their weights; its label is the "
    "argmax of the target's head, here the token itself; its own draw would put no anchor among "
    "the last K tokens of a packed row",
    "specforge": "counts slots behind a gap too, up to the document's end",
}


@dataclass(kw_only=True)
class LossComparison:
    """One contender's loss beside the twin's."""

    loss: float
    """Its own loss of the first step."""
    explained: float
    """Its rule applied to the twin's slots: equal to `loss` if the rule is all that differs."""
    paper_loss: float
    """The paper's rule applied to its own slots."""
    slot_difference: float
    """Largest difference of a slot's cross entropy from the twin's, in nats."""
    counted_slots: int
    """Slots that its rule counts."""


def compare_losses(
    case: Case, *, losses: dict[str, float], slots: dict[str, Tensor]
) -> dict[str, LossComparison]:
    """Compare every contender with the twin.

    Args:
        case: What all were run on.
        losses: Loss of the first step by contender.
        slots: `[A, K]` cross entropies by contender; `twin` must be there.
    """
    counted = {"specforge": _specforge_slots(case), "speculators": _speculators_slots(case)}
    weights_K = decay_weights(case.shapes.block_size)
    paper_AK = prefix_mask(case)
    found: dict[str, LossComparison] = {}
    for name, own_AK in slots.items():
        mask_AK = counted.get(name, paper_AK)
        total = (mask_AK * weights_K * slots["twin"]).sum()
        size = mask_AK.sum() + 1e-5 if name == "speculators" else (mask_AK * weights_K).sum()
        found[name] = LossComparison(
            loss=losses[name],
            explained=float(total / size),
            paper_loss=float((paper_AK * weights_K * own_AK).sum() / (paper_AK * weights_K).sum()),
            slot_difference=float((own_AK - slots["twin"])[paper_AK].abs().max()),
            counted_slots=int(mask_AK.sum()),
        )
    return found


def loss_table(found: dict[str, LossComparison]) -> str:
    """Give the comparison as lines of text."""
    lines = ["contender     own loss  explained  paper's loss  largest slot difference  slots"]
    for name, row in found.items():
        lines.append(
            f"{name:12} {row.loss:9.5f}  {row.explained:9.5f}  {row.paper_loss:12.5f}"
            f"  {row.slot_difference:23.1e}  {row.counted_slots:5}"
        )
    lines += [f"{name}: {REASONS[name]}" for name in found]
    return "\n".join(lines)


def _specforge_slots(case: Case) -> Tensor:
    """Mark `[A, K]` supervised slots inside the document, gaps or not."""
    positions_AK = _slot_positions(case)
    size = case.shapes.document_tokens
    is_inside = positions_AK // size == positions_AK[:, :1] // size
    return _speculators_slots(case) & is_inside


def _speculators_slots(case: Case) -> Tensor:
    """Mark `[A, K]` supervised slots inside the packed row, documents and gaps ignored."""
    positions_AK = _slot_positions(case)
    num_tokens = case.shapes.num_tokens
    mask_AK = case.loss_mask[positions_AK % num_tokens] & (positions_AK < num_tokens)
    mask_AK[:, 0] = False
    return mask_AK


def _slot_positions(case: Case) -> Tensor:
    return case.packed_anchors[:, None] + torch.arange(case.shapes.block_size)
