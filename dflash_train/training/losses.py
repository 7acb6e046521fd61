"""The loss of a micro-batch: a weighted sum of terms over labelled slots.

`loss = sum(m * w * l) / Z` with m the label mask, l a slot's terms (`LossConfig`) and, over the
whole optimiser step, Z = sum(m * w) for exponential weights (arXiv 2602.06036, Eq. 4) and sum(m)
for D-PACE (arXiv 2605.18810) and none. Slots without a label never meet the head. What the drafter
has beside its trunk is trained along: the candidate selector (DFlash 2) by cross entropy over its
candidates, the Markov table inside the logits, the confidence head by binary cross entropy (DSpark,
arXiv 2607.05147). Legend: A blocks, K slots, S labelled slots, C candidates, k ids of a teacher,
E hidden size, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dflash_train.config import LossConfig, Weighting
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.model import Drafter
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.training.batching import TrainingBatch
from dflash_train.training.head_sweep import SlotTerms, sweep_with_bias
from dflash_train.training.head_tiles import HeadSettings, SlotTargets
from dflash_train.training.metrics import TrainingCounts
from dflash_train.training.variant_losses import confidence_loss, selector_terms


def default_gamma(num_drafts: int) -> float:
    """Give the decay for blocks of this many drafts: 4 for 7, 5 for 9, 7 for 15.

    These are the published values for K = 8, 10 and 16 (DSpark's 7 drafts: 4); the lines between
    them go on beyond both ends.
    """
    return min((num_drafts + 1) / 2, 5 + (num_drafts - 9) / 3)


def position_weights(block_size: int, gamma: float | None, *, first_slot: int = 1) -> Tensor:
    """Give `[K]` float64 weights of slots: 0 before the first one that predicts.

    Args:
        block_size: K.
        gamma: From `first_slot` on exp(-(k - first_slot) / gamma); None weighs all alike.
        first_slot: 1, or 0 where labels are shifted.
    """
    steps_K = torch.arange(block_size, dtype=torch.float64) - first_slot
    weights_K = torch.ones_like(steps_K) if gamma is None else torch.exp(-steps_K / gamma)
    return torch.where(steps_K < 0, 0.0, weights_K)


def fixed_weights(loss: LossConfig, drafter: DrafterConfig) -> Tensor:
    """Give `[K]` float64, the weights that are known before the forward and make up Z."""
    gamma = None
    if loss.weighting is Weighting.decay:
        gamma = loss.decay_gamma or default_gamma(drafter.num_drafts)
    return position_weights(drafter.block_size, gamma, first_slot=drafter.first_slot)


def dpace_weights(ce_AK: Tensor, mask_AK: Tensor, *, alpha: float) -> Tensor:
    """Give D-PACE's weights (arXiv 2605.18810), `[A, K]`, without gradient.

    u_k = (1 - alpha) q_k + alpha with q_k = exp(-ce), 1 where the mask is False; P_k the product of
    u up to k; w_k = m_k times the sum of m_i P_i over i >= k. That is the number of drafts from k
    on that the drafter may expect to be accepted.

    Args:
        ce_AK: Cross entropy of each slot, any value where the mask is False.
        mask_AK: The label mask.
        alpha: Floor of a slot's assumed acceptance.
    """
    q_AK = torch.exp(-ce_AK.detach())
    survival_AK = torch.where(mask_AK, (1 - alpha) * q_AK + alpha, 1.0).cumprod(dim=1) * mask_AK
    return survival_AK.flip(1).cumsum(dim=1).flip(1) * mask_AK


@dataclass(kw_only=True)
class LossTerms:
    """What one micro-batch adds to the loss and to the books."""

    loss_sum: Tensor
    """Scalar sum(m * w * l) with its graph; the caller divides by the step's Z."""
    counts: TrainingCounts


@dataclass(kw_only=True)
class LossSettings:
    """How hidden states become a loss; the same for all micro-batches of an optimiser step."""

    loss: LossConfig
    slot_weights: Tensor
    """`[K]` from `fixed_weights`."""
    chunk: int
    """Slots whose logits exist at once."""
    log_weights: Tensor | None = None
    """`[rows of the head]`, log of how many ids each row stands for; None where all stand for
    one."""


def block_loss(
    hidden_AKE: Tensor,
    batch: TrainingBatch,
    head: FrozenHead,
    *,
    drafter: Drafter,
    settings: LossSettings,
) -> LossTerms:
    """Sum the weighted terms of a micro-batch and count its correct slots.

    Args:
        hidden_AKE: `[A, K, E]` from the drafter.
        batch: Labels and their mask, on the same device.
        head: Rows that the softmax runs over: `drafter.output_head(...)`, or a sample of it. A
            slot is counted as correct among these rows.
        drafter: Shapes the logits; its heads are trained along.
        settings: Terms and weights.
    """
    mask_AK = batch.label_mask
    hidden_SE = hidden_AKE.flatten(0, 1)[mask_AK.flatten()]
    slots = _slot_terms(hidden_SE, batch, head, drafter=drafter, settings=settings)
    weights_AK = settings.slot_weights.to(slots.ce).expand_as(mask_AK)
    if settings.loss.weighting is Weighting.dpace:
        ce_AK = torch.zeros_like(weights_AK).masked_scatter(mask_AK, slots.ce)
        weights_AK = dpace_weights(ce_AK, mask_AK, alpha=settings.loss.dpace_alpha)
    loss_sum = (weights_AK[mask_AK] * slots.loss).sum()
    first_slot = drafter.config.first_slot
    counts = _count(batch, slots, loss_sum, first_slot=first_slot, weights_K=settings.slot_weights)
    return LossTerms(loss_sum=loss_sum, counts=counts)


def head_rows(head: FrozenHead, ids: Tensor) -> Tensor:
    """Turn ids of the target's vocabulary into rows of the head, -1 where it has none."""
    known = head.draft_token_ids
    if known is None:
        return ids
    rows = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
    return torch.where(known[rows] == ids, rows, -1)


def _slot_terms(
    hidden_SE: Tensor,
    batch: TrainingBatch,
    head: FrozenHead,
    *,
    drafter: Drafter,
    settings: LossSettings,
) -> SlotTerms:
    """Give all terms of the labelled slots, those of the drafter's heads included."""
    loss, previous_S = settings.loss, batch.previous_ids[batch.label_mask]
    targets = _slot_targets(batch, head)
    slots = _sweep(hidden_SE, previous_S, targets, head, drafter=drafter, settings=settings)
    if drafter.candidate_selector is not None:
        selector = selector_terms(
            drafter,
            head,
            hidden_SE,
            previous_S=previous_S,
            labels_S=targets.labels,
            candidates_SC=slots.candidates,
        )
        total = slots.loss + loss.selector * selector.loss
        slots = replace(slots, loss=total, is_correct=selector.is_correct)
    if drafter.confidence_head is not None:
        # Without a teacher a draft counts as accepted where it is the token that was written.
        accepted_S = slots.is_correct if batch.teacher is None else slots.overlap
        confidence = confidence_loss(
            drafter, hidden_SE, previous_S=previous_S, accepted_S=accepted_S
        )
        slots = replace(slots, loss=slots.loss + loss.confidence * confidence)
    return slots


def _slot_targets(batch: TrainingBatch, head: FrozenHead) -> SlotTargets:
    """Give labels and teacher in rows of the head; mass on ids that it lacks goes to the rest."""
    labels_S = head_rows(head, batch.labels[batch.label_mask])
    if batch.teacher is None:
        ids_Sk = labels_S.new_zeros((len(labels_S), 0))
        return SlotTargets(labels=labels_S, teacher_ids=ids_Sk, teacher_p=ids_Sk.float())
    ids_Sk = head_rows(head, batch.teacher.ids[batch.label_mask].long())
    p_Sk = batch.teacher.probabilities[batch.label_mask] * (ids_Sk >= 0)
    return SlotTargets(labels=labels_S, teacher_ids=ids_Sk, teacher_p=p_Sk)


def _sweep(
    hidden_SE: Tensor,
    previous_S: Tensor,
    targets: SlotTargets,
    head: FrozenHead,
    *,
    drafter: Drafter,
    settings: LossSettings,
) -> SlotTerms:
    sweep = HeadSettings(
        weight=head.lm_head_weight,
        loss=settings.loss,
        multiplier=drafter.config.output_multiplier,
        cap=drafter.config.final_logit_softcapping,
        log_weights=settings.log_weights,
        num_candidates=drafter.config.selector_top_k or 0,
        chunk=settings.chunk,
    )
    if drafter.markov_head is None:
        return drafter.ops(hidden_SE).sweep_head(hidden_SE, targets, sweep)
    latents_Sr = drafter.markov_head.latents(hidden_SE, previous_S)
    table_Vr = drafter.markov_head.markov_w2.weight
    if head.draft_token_ids is not None and drafter.config.draft_vocab_size is None:
        # A sample of the head; a reduced drafter's table has the rows of its head already.
        table_Vr = table_Vr.index_select(0, head.draft_token_ids)
    return sweep_with_bias(hidden_SE, latents_Sr, table_Vr, targets=targets, head=sweep)


def _count(
    batch: TrainingBatch, slots: SlotTerms, loss_sum: Tensor, *, first_slot: int, weights_K: Tensor
) -> TrainingCounts:
    mask_AK = batch.label_mask
    correct_AK = torch.zeros_like(mask_AK).masked_scatter(mask_AK, slots.is_correct)
    correct_AD, mask_AD = correct_AK[:, first_slot:], mask_AK[:, first_slot:]
    return TrainingCounts(
        loss_sum=loss_sum.item(),
        weight_sum=batch.weight_sum(weights_K).item(),
        ce_sum=slots.ce.sum().item(),
        num_tokens=batch.num_tokens,
        num_blocks=len(mask_AK),
        slot_labels=mask_AD.sum(0).tolist(),
        slot_correct=correct_AD.sum(0).tolist(),
        slot_joint=correct_AD.cumprod(dim=1).sum(0).tolist(),
    )
