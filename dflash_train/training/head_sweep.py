"""The LM head and the loss of single slots, in sweeps over tiles of the vocabulary.

Q*V logits would be the largest tensor of the run. Here a few slots meet the frozen head tile by
tile, as queries meet keys in flash attention: the running maximum, the sum of exponentials and
their sum times the head's rows are all that stays, so a tile of logits never leaves the cache. The
last sum is the gradient of the log partition with respect to the hidden state; the few ids that a
loss treats apart (the label, the teacher's top k) add single rows to it. The gradient is that of
each slot's unweighted loss: D-PACE weights, which need the cross entropy of a whole block, and the
denominator multiply its rows afterwards.

A DSpark drafter also trains a table `[V, r]` that adds to the logits. Its gradient sums over slots
and needs their weights first, so there a second sweep in the backward pass forms each tile of
logits again and gives all gradients (`BiasedSweep`). Its products cost (3 E + 4 r) / 2 E times
those of the plain sweep: 2.4 at E = 576, r = 256.

Legend: S slots, C candidates, E hidden size, r rank, V rows of the head.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dflash_train.training.head_tiles import (
    ChunkSums,
    HeadSettings,
    SlotTargets,
    add_product,
    cut_head,
    cut_slots,
    logit_gradient,
    sum_dtype,
    tile_buffer,
)


@dataclass(kw_only=True)
class SlotTerms:
    """What the sweep gives for each slot; only `loss` has a gradient."""

    loss: Tensor
    """`[S]`, the weighted sum of cross entropy and soft terms, float32 or wider."""
    ce: Tensor
    """`[S]`, cross entropy with the label, in nats."""
    is_correct: Tensor
    """`[S]` bool, the argmax is the label (log weights apart, as when drafting)."""
    overlap: Tensor
    """`[S]`, sum min(p, q); without a teacher it means nothing."""
    candidates: Tensor
    """`[S, C]` int64, rows of the head with the best logits (log weights apart), best first."""


def sweep_head(hidden_SE: Tensor, targets: SlotTargets, head: HeadSettings) -> SlotTerms:
    """Give each slot's loss, with the gradient of its hidden state ready for the backward pass."""
    return _terms(HeadSweep.apply(hidden_SE, targets, head))


def sweep_with_bias(
    hidden_SE: Tensor, latents_Sr: Tensor, table_Vr: Tensor, *, targets: SlotTargets,
    head: HeadSettings,
) -> SlotTerms:  # fmt: skip
    """Give the same for logits with a trained low-rank bias, `shaped(W h) + table @ latent`.

    Gradients flow to the hidden states, the latents and the table.

    Args:
        hidden_SE: `[S, E]`.
        latents_Sr: `[S, r]`.
        table_Vr: `[V, r]`, one row for each of the head's.
        targets: Labels and teacher.
        head: As for `sweep_head`.
    """
    return _terms(BiasedSweep.apply(hidden_SE, latents_Sr, table_Vr, targets, head))


def _terms(columns: tuple[Tensor, ...]) -> SlotTerms:
    loss, ce, is_correct, overlap, candidates = columns
    return SlotTerms(
        loss=loss, ce=ce, is_correct=is_correct, overlap=overlap, candidates=candidates
    )


class HeadSweep(torch.autograd.Function):
    """Head, logit shaping and loss; the gradient per slot comes out of the same sweep."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SE: Tensor, targets: SlotTargets, head: HeadSettings
    ) -> tuple[Tensor, ...]:
        """Give the fields of `SlotTerms` and keep d loss / d hidden, unweighted, `[S, E]`."""
        wants_grad = ctx.needs_input_grad[0]
        tiles, buffer = cut_head(head), tile_buffer(hidden_SE, head)
        swept = []
        for chunk in cut_slots(hidden_SE, targets, head):
            sums = ChunkSums(chunk, head, wants_grad=wants_grad)
            for tile in tiles:
                sums.add_tile(tile, buffer)
            terms, slopes = sums.finish()
            swept.append((*terms, sums.hidden_gradient(slopes)))
        *terms, grad_SE = (torch.cat(column) for column in zip(*swept, strict=True))
        ctx.mark_non_differentiable(*terms[1:])
        if wants_grad:
            ctx.save_for_backward(grad_SE.to(hidden_SE.dtype))
        return tuple(terms)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] the decorator hides names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        """Scale each slot's gradient by what the caller makes of its loss."""
        (grad_SE,) = ctx.saved_tensors
        return grad_SE * grads[0][:, None].to(grad_SE.dtype), None, None


class BiasedSweep(torch.autograd.Function):
    """The same with a trained bias: one sweep for the terms, a second one for the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SE: Tensor,
        latents_Sr: Tensor,
        table_Vr: Tensor,
        targets: SlotTargets,
        head: HeadSettings,
    ) -> tuple[Tensor, ...]:
        """Give the fields of `SlotTerms` and keep a few numbers of each slot."""
        tiles, buffer = cut_head(head, table_Vr), tile_buffer(hidden_SE, head)
        swept, ctx.slopes = [], []
        for chunk in cut_slots(hidden_SE, targets, head, latents_Sr):
            sums = ChunkSums(chunk, head, wants_grad=False)
            for tile in tiles:
                sums.add_tile(tile, buffer)
            terms, slopes = sums.finish()
            swept.append(terms)
            ctx.slopes.append(slopes)
        columns = [torch.cat(column) for column in zip(*swept, strict=True)]
        ctx.mark_non_differentiable(*columns[1:])
        ctx.save_for_backward(hidden_SE, latents_Sr, table_Vr)
        ctx.targets, ctx.head = targets, head
        return tuple(columns)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] the decorator hides names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Form each tile of logits again and give d hidden, d latents and d table."""
        hidden_SE, latents_Sr, table_Vr = ctx.saved_tensors
        head, dtype = ctx.head, sum_dtype(ctx.head.weight)
        totals = [torch.zeros_like(x, dtype=dtype) for x in ctx.saved_tensors]
        tiles, buffer = cut_head(head, table_Vr), tile_buffer(hidden_SE, head)
        chunks = cut_slots(hidden_SE, ctx.targets, head, latents_Sr)
        parts = (x.split(head.chunk) for x in (*totals[:2], grads[0].to(dtype)))
        for chunk, slopes, grad_hidden, grad_latents, scale in zip(
            chunks, ctx.slopes, *parts, strict=True
        ):
            for tile in tiles:
                weights, cap_slope = logit_gradient(chunk, tile, head, slopes, scale, buffer)
                add_product(grad_latents, weights, tile.table)
                add_product(totals[2][tile.ids], weights.T, chunk.latents)
                if cap_slope is not None:
                    weights *= cap_slope
                add_product(grad_hidden, weights, tile.rows)
        totals[0] *= head.multiplier
        grad_SE, grad_Sr, grad_Vr = (
            total.to(like.dtype) for total, like in zip(totals, ctx.saved_tensors, strict=True)
        )
        return grad_SE, grad_Sr, grad_Vr, None, None
