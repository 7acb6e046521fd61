"""The loss: cross entropy of labelled slots with position decay, head and softmax in one sweep.

`loss = sum(m * w * ce) / Z` with m the label mask, w_k = exp(-(k - 1) / gamma) and Z = sum(m * w)
over the whole optimiser step (arXiv 2602.06036, Eq. 4). Q*V logits would be the largest tensor of
the run, so the frozen head is applied to a few slots at a time, and their gradient is taken before
the logits are overwritten. Legend: A blocks, K slots, S labelled slots, E hidden size, V
vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dflash_train.drafter.config import DrafterConfig
from dflash_train.features.target import FrozenHead
from dflash_train.training.batching import TrainingBatch
from dflash_train.training.metrics import TrainingCounts


def position_weights(block_size: int, gamma: float) -> Tensor:
    """Give `[K]` float64 weights: 0 for the anchor's slot, exp(-(k - 1) / gamma) for slot k."""
    weights_K = torch.exp(-(torch.arange(block_size, dtype=torch.float64) - 1) / gamma)
    weights_K[0] = 0.0
    return weights_K


@dataclass(kw_only=True)
class HeadLoss:
    """Cross entropy of single slots."""

    ce: Tensor
    """`[S]` in nats, float32 or wider."""
    is_correct: Tensor
    """`[S]` bool, the argmax is the label."""


def head_cross_entropy(
    hidden_SE: Tensor, head: FrozenHead, labels_S: Tensor, *, config: DrafterConfig, chunk: int
) -> HeadLoss:
    """Give each slot's cross entropy without ever holding more than `chunk` slots' logits.

    Args:
        hidden_SE: `[S, E]` hidden states of labelled slots.
        head: The target's LM head, frozen.
        labels_S: `[S]` int64.
        config: Output multiplier and soft cap.
        chunk: Slots whose logits exist at once.
    """
    shape = (config.output_multiplier, config.final_logit_softcapping)
    ce, is_correct = HeadCrossEntropy.apply(hidden_SE, head.lm_head_weight, labels_S, shape, chunk)
    return HeadLoss(ce=ce, is_correct=is_correct)


class HeadCrossEntropy(torch.autograd.Function):
    """Head, logit shaping and cross entropy; the gradient per slot comes out of the same sweep."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SE: Tensor,
        lm_head_weight: Tensor,
        labels_S: Tensor,
        shape: tuple[float, float | None],
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        """Give `ce [S]` and `is_correct [S]` and keep d ce / d hidden, unweighted, `[S, E]`."""
        wants_grad = ctx.needs_input_grad[0]
        chunks = [
            _sweep_chunk(part, lm_head_weight, labels, shape=shape, wants_grad=wants_grad)
            for part, labels in zip(hidden_SE.split(chunk), labels_S.split(chunk), strict=True)
        ]
        is_correct = torch.cat([part.is_correct for part in chunks])
        ctx.mark_non_differentiable(is_correct)
        if wants_grad:
            ctx.save_for_backward(torch.cat([part.grad for part in chunks]).to(hidden_SE.dtype))
        return torch.cat([part.ce for part in chunks]), is_correct

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] the decorator hides names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        """Scale each slot's gradient by what the loss asks of it."""
        (grad_hidden_SE,) = ctx.saved_tensors
        weighted = grad_hidden_SE * grads[0][:, None].to(grad_hidden_SE.dtype)
        return weighted, None, None, None, None


@dataclass(kw_only=True)
class _SweptChunk:
    ce: Tensor
    is_correct: Tensor
    grad: Tensor


def _sweep_chunk(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shape: tuple[float, float | None],
    wants_grad: bool,
) -> _SweptChunk:
    multiplier, cap = shape
    logits = hidden.to(weight.dtype) @ weight.T  # [c, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if multiplier != 1.0:
        logits *= multiplier
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
    slope = 1 - (logits / cap).square() if cap is not None else None  # d capped / d uncapped

    label_logits = logits.gather(1, labels[:, None])
    top = logits.max(dim=1, keepdim=True)
    is_correct = top.indices.squeeze(1) == labels
    exponentials = logits.sub_(top.values).exp_()
    total = exponentials.sum(dim=1, keepdim=True)
    ce = (total.log() + top.values - label_logits).squeeze(1)
    if not wants_grad:
        return _SweptChunk(ce=ce, is_correct=is_correct, grad=hidden)

    # softmax - onehot, then the head: the division by `total` and the one-hot row are applied to
    # `[c, E]` rows afterwards, which spares two passes over `[c, V]`.
    label_rows = weight[labels].to(ce.dtype)
    if slope is not None:
        exponentials *= slope
        label_rows *= slope.gather(1, labels[:, None])
    expected_rows = (exponentials.to(weight.dtype) @ weight).to(ce.dtype) / total
    return _SweptChunk(ce=ce, is_correct=is_correct, grad=multiplier * (expected_rows - label_rows))


def head_cross_entropy_reference(
    hidden_SE: Tensor, head: FrozenHead, labels_S: Tensor, *, config: DrafterConfig
) -> HeadLoss:
    """Give the same with all logits at once and autograd: the definition, for tests."""
    logits_SV = head.logits(hidden_SE.to(head.lm_head_weight.dtype)) * config.output_multiplier
    logits_SV = logits_SV.to(torch.promote_types(logits_SV.dtype, torch.float32))
    cap = config.final_logit_softcapping
    if cap is not None:
        logits_SV = cap * torch.tanh(logits_SV / cap)
    return HeadLoss(
        ce=functional.cross_entropy(logits_SV, labels_S, reduction="none"),
        is_correct=logits_SV.argmax(dim=1) == labels_S,
    )


@dataclass(kw_only=True)
class LossTerms:
    """What one micro-batch adds to the loss and to the books."""

    loss_sum: Tensor
    """Scalar sum(m * w * ce) with its graph; the caller divides by the step's Z."""
    counts: TrainingCounts


def block_loss(
    hidden_AKE: Tensor,
    batch: TrainingBatch,
    head: FrozenHead,
    *,
    config: DrafterConfig,
    weights_K: Tensor,
    chunk: int,
) -> LossTerms:
    """Sum the weighted cross entropy of a micro-batch and count its correct slots.

    Args:
        hidden_AKE: `[A, K, E]` from the drafter.
        batch: Labels and their mask.
        head: The target's LM head, frozen.
        config: Output multiplier and soft cap.
        weights_K: `[K]` from `position_weights`, on the batch's device.
        chunk: Slots whose logits exist at once.
    """
    mask_AK = batch.label_mask
    labelled = mask_AK.flatten().nonzero().squeeze(1)
    slots = head_cross_entropy(
        hidden_AKE.flatten(0, 1).index_select(0, labelled),
        head,
        batch.labels[mask_AK],
        config=config,
        chunk=chunk,
    )
    weights_S = weights_K.to(slots.ce.dtype).expand_as(mask_AK)[mask_AK]
    loss_sum = (weights_S * slots.ce).sum()
    correct_AK = torch.zeros_like(mask_AK)
    correct_AK[mask_AK] = slots.is_correct
    joint_AK = (correct_AK[:, 1:].cumprod(dim=1)).bool()
    counts = TrainingCounts(
        loss_sum=loss_sum.item(),
        weight_sum=batch.weight_sum(weights_K).item(),
        num_tokens=batch.num_tokens,
        num_blocks=len(mask_AK),
        slot_labels=mask_AK.sum(0).tolist(),
        slot_correct=correct_AK.sum(0).tolist(),
        slot_joint=[0, *joint_AK.sum(0).tolist()],
    )
    return LossTerms(loss_sum=loss_sum, counts=counts)
