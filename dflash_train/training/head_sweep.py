"""The LM head and the loss of single slots, in one sweep over the vocabulary.

Q*V logits would be the largest tensor of the run. Here a few slots meet the frozen head tile by
tile, as queries meet keys in flash attention: the running maximum, the sum of exponentials and
their sum times the head's rows are all that stays, so a tile of logits never leaves the cache. The
last sum is the gradient of the log partition with respect to the hidden state; the few ids that a
loss treats apart (the label, the teacher's top k) add single rows to it. The gradient is that of
each slot's unweighted loss: D-PACE weights, which need the cross entropy of a whole block, and the
denominator multiply its rows afterwards.

A DSpark drafter also trains a table `[V, r]` that adds to the logits. Its gradient needs the slots'
weights, so there the logits are formed again in the backward pass (`sweep_with_bias`).

Legend: S slots, c slots of a chunk, t ids of a tile, k ids of a teacher, C candidates, E hidden
size, r rank, V rows of the head.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dflash_train.config import LossConfig
from dflash_train.training.soft_losses import bucket_probabilities, soft_loss

CPU_TILE, GPU_TILE = 2048, 32768
"""Ids whose logits exist at once: 8 MB for 1024 slots in float32 stay in a CPU's last cache."""
_ABSENT = -1e30
"""Logit of an id that the head does not have; finite, so that 0 * it is 0."""
_TINY = 1e-30


@dataclass(kw_only=True)
class SlotTargets:
    """What the target said at each slot, in rows of the head."""

    labels: Tensor
    """`[S]` int64."""
    teacher_ids: Tensor
    """`[S, k]` int64, -1 where the head does not have the id; k = 0 without a teacher."""
    teacher_p: Tensor
    """`[S, k]`, the target's probabilities, 0 where the id is -1: their mass then is in the
    rest."""

    def split(self, chunk: int) -> "list[SlotTargets]":
        """Cut along S."""
        parts = (x.split(chunk) for x in (self.labels, self.teacher_ids, self.teacher_p))
        return [
            SlotTargets(labels=labels, teacher_ids=ids, teacher_p=p)
            for labels, ids, p in zip(*parts, strict=True)
        ]


@dataclass(kw_only=True)
class HeadSettings:
    """How the frozen head turns hidden states into logits, and what is asked of them."""

    weight: Tensor
    """`[V, E]`, frozen."""
    loss: LossConfig
    multiplier: float = 1.0
    """Factor on the logits."""
    cap: float | None = None
    """Soft cap, after the factor."""
    log_weights: Tensor | None = None
    """`[V]`, added to finished logits: how many ids each row stands for (`head_sample`)."""
    num_candidates: int = 0
    """C, best ids wanted of each slot; 0 for none."""
    chunk: int = 1024
    """Slots whose logits exist at once."""


@dataclass(kw_only=True)
class SlotTerms:
    """What the sweep gives for each slot; only `loss` has a gradient."""

    loss: Tensor
    """`[S]`, the weighted sum of cross entropy and soft terms, float32 or wider."""
    ce: Tensor
    """`[S]`, cross entropy with the label, in nats."""
    is_correct: Tensor
    """`[S]` bool, the argmax is the label."""
    overlap: Tensor
    """`[S]`, sum min(p, q); without a teacher it means nothing."""
    candidates: Tensor
    """`[S, C]` int64, rows of the head with the best logits, best first."""


def sweep_head(hidden_SE: Tensor, targets: SlotTargets, head: HeadSettings) -> SlotTerms:
    """Give each slot's loss, with the gradient of its hidden state ready for the backward pass."""
    loss, ce, is_correct, overlap, candidates = HeadSweep.apply(hidden_SE, targets, head)
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
        tile = CPU_TILE if hidden_SE.device.type == "cpu" else GPU_TILE
        widest = min(head.chunk, len(hidden_SE)) * min(tile, len(head.weight))
        buffer = head.weight.new_empty(widest)
        swept = []
        for hidden, wanted in zip(
            hidden_SE.split(head.chunk), targets.split(head.chunk), strict=True
        ):
            sums = _ChunkSums(hidden, wanted, head, wants_grad=wants_grad)
            for first in range(0, len(head.weight), tile):
                sums.add_tile(first, head.weight[first : first + tile], buffer)
            swept.append(sums.finish())
        columns = [torch.cat(column) for column in zip(*swept, strict=True)]
        *terms, grad_SE = columns
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


class _ChunkSums:
    """The running sums of one chunk of slots over the tiles of the vocabulary."""

    def __init__(
        self, hidden_cE: Tensor, targets: SlotTargets, head: HeadSettings, *, wants_grad: bool
    ) -> None:
        self.hidden, self.targets, self.head = hidden_cE.to(head.weight.dtype), targets, head
        self.wants_grad = wants_grad
        # Column 0 is the label, the others are the teacher's: logits wanted one by one.
        self.ids = torch.cat([targets.labels[:, None], targets.teacher_ids], dim=1)
        dtype = torch.promote_types(head.weight.dtype, torch.float32)
        zero = hidden_cE.new_zeros((len(hidden_cE), 1), dtype=dtype)
        self.kept = torch.full_like(self.ids, _ABSENT, dtype=dtype)
        self.kept_slope = torch.ones_like(self.kept)
        self.top, self.best = zero - torch.inf, self.ids[:, :1]
        self.rest = zero
        """Sum of exp(logit - top) over all ids but the teacher's."""
        self.pulled = zero.new_zeros(hidden_cE.shape if wants_grad else (len(hidden_cE), 0))
        """The same sum with each term times its row of the head."""
        self.candidates = self.ids[:, :0]
        self.candidate_logits = zero[:, :0]

    def add_tile(self, first: int, rows_tE: Tensor, buffer: Tensor) -> None:
        """Add the ids `first .. first + t - 1`; `buffer` is overwritten."""
        logits = buffer[: len(self.hidden) * len(rows_tE)].view(len(self.hidden), len(rows_tE))
        torch.mm(self.hidden, rows_tE.T, out=logits)
        logits = logits.to(self.rest.dtype)
        slope = _shape(logits, self.head, first)
        offsets = self.ids - first
        is_here = (offsets >= 0) & (offsets < len(rows_tE))
        offsets = offsets.clamp(0, len(rows_tE) - 1)
        self.kept = torch.where(is_here, logits.gather(1, offsets), self.kept)
        if slope is not None:
            self.kept_slope = torch.where(is_here, slope.gather(1, offsets), self.kept_slope)
        if self.head.num_candidates:
            self._keep_candidates(first, logits)

        tile_top = logits.max(dim=1, keepdim=True)
        self.best = torch.where(tile_top.values > self.top, tile_top.indices + first, self.best)
        top = torch.maximum(tile_top.values, self.top)
        shrink, self.top = (self.top - top).exp_(), top
        exponentials = logits.sub_(top).exp_()
        if self.ids.shape[1] > 1:
            # Taken out here and not subtracted later: 1 - sum(q) has no digits where q is sure.
            taken = exponentials.gather(1, offsets[:, 1:]) * is_here[:, 1:]
            exponentials.scatter_add_(1, offsets[:, 1:], -taken)
        self.rest = self.rest * shrink + exponentials.sum(dim=1, keepdim=True)
        if self.wants_grad:
            if slope is not None:
                exponentials *= slope
            self._pull(exponentials, rows_tE, shrink)

    def finish(self) -> tuple[Tensor, ...]:
        """Give the fields of `SlotTerms` and the gradient, `[c, E]` (or empty if unwanted)."""
        kept_exp = (self.kept - self.top).exp()
        total = self.rest + kept_exp[:, 1:].sum(dim=1, keepdim=True)
        log_q = self.kept - self.top - total.log()
        log_rest = self.rest.clamp(min=_TINY).log() - total.log()
        ce = -log_q[:, 0]
        soft, overlap, slope_Sb = self._soft(torch.cat([log_q[:, 1:], log_rest], dim=1))
        loss = self.head.loss.ce * ce + soft
        terms = (loss, ce, self.best.squeeze(1) == self.targets.labels, overlap, self.candidates)
        if not self.wants_grad:
            return *terms, self.pulled
        # d loss / d logit: for an id of the rest (common + slope_rest / q_rest) q, for a teacher's
        # id slope + common q, and -ce at the label.
        common = self.head.loss.ce - slope_Sb.sum(dim=1, keepdim=True)
        rest_factor = common / total + slope_Sb[:, -1:] / self.rest.clamp(min=_TINY)
        single = slope_Sb[:, :-1] + common * kept_exp[:, 1:] / total
        single = torch.cat([torch.full_like(total, -self.head.loss.ce), single], dim=1)
        grad = self.pulled * rest_factor + self._rows_of(single * self.kept_slope)
        return *terms, self.head.multiplier * grad

    def _soft(self, log_q_cb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the soft terms, the overlap and d soft / d log q `[c, b]`; zeros where k = 0."""
        if log_q_cb.shape[1] == 1:
            zero = torch.zeros_like(log_q_cb)
            return zero[:, 0], zero[:, 0], zero
        p_cb = _target_buckets(self.targets, self.head).to(log_q_cb.dtype)
        with torch.enable_grad():
            log_q_cb = log_q_cb.detach().requires_grad_()
            soft = soft_loss(log_q_cb, p_cb, self.head.loss)
            (slope_cb,) = torch.autograd.grad(soft.loss.sum(), log_q_cb)
        return soft.loss.detach(), soft.overlap, slope_cb

    def _pull(self, weights_ct: Tensor, rows_tE: Tensor, shrink: Tensor) -> None:
        self.pulled *= shrink
        if rows_tE.dtype == self.pulled.dtype:
            self.pulled.addmm_(weights_ct, rows_tE)
        else:
            self.pulled += weights_ct.to(rows_tE.dtype) @ rows_tE

    def _rows_of(self, weights: Tensor) -> Tensor:
        """Sum single rows of the head, `[c, 1 + k]` weights of `ids`: `[c, E]`."""
        table = self.head.weight
        if weights.shape[1] == 1:
            return weights * table[self.targets.labels].to(weights.dtype)
        return functional.embedding_bag(
            self.ids.clamp(min=0), table, per_sample_weights=weights.to(table.dtype), mode="sum"
        ).to(weights.dtype)

    def _keep_candidates(self, first: int, logits: Tensor) -> None:
        wanted = self.head.num_candidates
        here = logits.topk(min(wanted, logits.shape[1]), dim=1)
        values = torch.cat([self.candidate_logits, here.values], dim=1)
        ids = torch.cat([self.candidates, here.indices + first], dim=1)
        best = values.topk(min(wanted, values.shape[1]), dim=1)
        self.candidate_logits, self.candidates = best.values, ids.gather(1, best.indices)


def _shape(logits_ct: Tensor, head: HeadSettings, first: int) -> Tensor | None:
    """Apply factor, cap and log weights in place; give d capped / d uncapped if there is a cap."""
    if head.multiplier != 1.0:
        logits_ct *= head.multiplier
    slope = None
    if head.cap:
        logits_ct.div_(head.cap).tanh_()
        slope = 1 - logits_ct.square()
        logits_ct *= head.cap
    if head.log_weights is not None:
        logits_ct += head.log_weights[first : first + logits_ct.shape[1]]
    return slope


def _target_buckets(targets: SlotTargets, head: HeadSettings) -> Tensor:
    is_complete = targets.teacher_ids.shape[1] == len(head.weight)
    return bucket_probabilities(targets.teacher_p, is_complete=is_complete)


def sweep_with_bias(
    hidden_SE: Tensor, latents_Sr: Tensor, table_Vr: Tensor, *, targets: SlotTargets,
    head: HeadSettings,
) -> SlotTerms:  # fmt: skip
    """Give the same for logits with a trained low-rank bias, `shaped(W h) + table @ latent`.

    Gradients flow to the hidden states, the latents and the table; the logits of a chunk are
    formed again in the backward pass.

    Args:
        hidden_SE: `[S, E]`.
        latents_Sr: `[S, r]`.
        table_Vr: `[V, r]`.
        targets: Labels and teacher.
        head: Log weights and candidates do not go together with a bias.
    """
    assert head.log_weights is None
    assert head.num_candidates == 0
    chunk = max(1, head.chunk // 8)  # logits, softmax and their gradients exist at once
    parts = zip(hidden_SE.split(chunk), latents_Sr.split(chunk), targets.split(chunk), strict=True)
    recompute = partial(checkpoint, _biased_chunk, use_reentrant=False, preserve_rng_state=False)
    swept = [
        recompute(hidden, latents, table_Vr, wanted, head) for hidden, latents, wanted in parts
    ]
    loss, ce, is_correct, overlap = (torch.cat(column) for column in zip(*swept, strict=True))
    no_candidates = targets.labels.new_empty((len(targets.labels), 0))
    return SlotTerms(
        loss=loss, ce=ce, is_correct=is_correct, overlap=overlap, candidates=no_candidates
    )


def _biased_chunk(
    hidden_cE: Tensor,
    latents_cr: Tensor,
    table_Vr: Tensor,
    targets: SlotTargets,
    head: HeadSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = functional.linear(hidden_cE.to(head.weight.dtype), head.weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * head.multiplier
    if head.cap:
        logits = head.cap * torch.tanh(logits / head.cap)
    logits = logits + functional.linear(latents_cr, table_Vr).to(logits.dtype)
    log_q = logits.log_softmax(dim=1)
    ce = -log_q.gather(1, targets.labels[:, None]).squeeze(1)
    is_correct = logits.argmax(dim=1) == targets.labels
    if targets.teacher_ids.shape[1] == 0:
        return head.loss.ce * ce, ce.detach(), is_correct, torch.zeros_like(ce)
    p = _target_buckets(targets, head).to(log_q.dtype)
    soft = soft_loss(_bucket_log_q(log_q, targets.teacher_ids), p, head.loss)
    return head.loss.ce * ce + soft.loss, ce.detach(), is_correct, soft.overlap


def _bucket_log_q(log_q_cV: Tensor, ids_ck: Tensor) -> Tensor:
    """Sum q over the teacher's ids, one by one, and over the rest: `[c, b]` logarithms."""
    is_known, ids_ck = ids_ck >= 0, ids_ck.clamp(min=0)
    kept = torch.where(is_known, log_q_cV.gather(1, ids_ck), _ABSENT)
    is_kept = torch.zeros_like(log_q_cV).scatter_add_(1, ids_ck, is_known.to(log_q_cV.dtype)) > 0
    rest = log_q_cV.exp().masked_fill(is_kept, 0.0).sum(dim=1, keepdim=True)
    return torch.cat([kept, rest.clamp(min=_TINY).log()], dim=1)
