"""Tiles of the LM head and the sums of a few slots over them; what `head_sweep` is made of.

A chunk of slots meets the head tile by tile. Each tile of logits is formed in one buffer, adds to
the running sums and is overwritten by the next. Legend: S slots, c slots of a chunk, t ids of a
tile, k ids of a teacher, b = k + 1 buckets, C candidates, E hidden size, r rank, V rows of the
head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dflash_train.config import LossConfig
from dflash_train.training.soft_losses import bucket_probabilities, soft_loss

CPU_TILE, GPU_TILE = 2048, 32768
"""Ids whose logits exist at once: 8 MB for 1024 slots in float32 stay in a CPU's last cache."""
KERNEL_LOGIT_BYTES = 2 * 1024**3
"""Logits and their gradients that exist at once where kernels run, for whole rows."""
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
    """`[V]`, added to finished logits: how many ids each row stands for (`head_sample`). They
    correct the sum of exponentials and rank nothing."""
    num_candidates: int = 0
    """C, best ids wanted of each slot; 0 for none."""
    chunk: int = 1024
    """Slots whose logits exist at once."""


@dataclass(kw_only=True)
class Tile:
    """Neighbouring rows of the head, and what goes with them."""

    first: int
    rows: Tensor
    """`[t, E]`."""
    table: Tensor
    """`[t, r]` in the head's dtype; r = 0 without a bias."""
    log_weights: Tensor | None

    @property
    def ids(self) -> slice:
        """Places of the rows in the head."""
        return slice(self.first, self.first + len(self.rows))


def cut_head(head: HeadSettings, table_Vr: Tensor | None = None) -> list[Tile]:
    """Cut the head, and the table of a bias if there is one, into tiles."""
    size = _tile_size(head)
    table = head.weight[:, :0] if table_Vr is None else table_Vr.to(head.weight.dtype)
    return [
        Tile(
            first=first,
            rows=head.weight[first : first + size],
            table=table[first : first + size],
            log_weights=None if head.log_weights is None else head.log_weights[first:][:size],
        )
        for first in range(0, len(head.weight), size)
    ]


def _tile_size(head: HeadSettings) -> int:
    return CPU_TILE if head.weight.device.type == "cpu" else GPU_TILE


def tile_buffer(hidden_SE: Tensor, head: HeadSettings) -> Tensor:
    """Give memory for the widest tile of logits, used again for every one."""
    widest = min(head.chunk, len(hidden_SE)) * min(_tile_size(head), len(head.weight))
    return head.weight.new_empty(widest)


def sum_dtype(weight: Tensor) -> torch.dtype:
    """Give the number format of sums: float32, or wider if the weight is."""
    return torch.promote_types(weight.dtype, torch.float32)


@dataclass(kw_only=True)
class Chunk:
    """Some slots; hidden states and latents are in the head's dtype."""

    hidden: Tensor
    """`[c, E]`."""
    latents: Tensor
    """`[c, r]`; r = 0 without a bias."""
    targets: SlotTargets
    ids: Tensor
    """`[c, 1 + k]`: the label, then the teacher's ids; logits wanted one by one."""

    def logits(
        self, tile: Tile, head: HeadSettings, buffer: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Give `[c, t]` logits, log weights not added, and d capped / d uncapped if there is a cap.

        Factor, cap, then bias. `buffer` is overwritten, and the logits may lie in it.
        """
        shape = len(self.hidden), len(tile.rows)
        logits = buffer[: shape[0] * shape[1]].view(shape)
        torch.mm(self.hidden, tile.rows.T, out=logits)
        logits = logits.to(sum_dtype(logits))
        if head.multiplier != 1.0:
            logits *= head.multiplier
        slope = None
        if head.cap:
            logits.div_(head.cap).tanh_()
            slope = 1 - logits.square()
            logits *= head.cap
        if self.latents.shape[1]:
            add_product(logits, self.latents, tile.table.T)
        return logits, slope

    def places(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Give the place of each id in the tile, and whether it is there; elsewhere any place."""
        offsets = self.ids - tile.first
        is_here = (offsets >= 0) & (offsets < len(tile.rows))
        return offsets.clamp(0, len(tile.rows) - 1), is_here


def cut_slots(
    hidden_SE: Tensor, targets: SlotTargets, head: HeadSettings, latents_Sr: Tensor | None = None
) -> list[Chunk]:
    """Cut the slots into chunks, in the dtype of the head."""
    latents_Sr = hidden_SE[:, :0] if latents_Sr is None else latents_Sr
    hidden_SE, latents_Sr = (x.to(head.weight.dtype) for x in (hidden_SE, latents_Sr))
    parts = hidden_SE.split(head.chunk), latents_Sr.split(head.chunk), targets.split(head.chunk)
    return [
        Chunk(
            hidden=hidden,
            latents=latents,
            targets=wanted,
            ids=torch.cat([wanted.labels[:, None], wanted.teacher_ids], dim=1),
        )
        for hidden, latents, wanted in zip(*parts, strict=True)
    ]


@dataclass(kw_only=True)
class Slopes:
    """d loss / d logit of a chunk: `exp(logit - top) * rest` for all ids but the teacher's, to
    which (and to the label's) `single` is added."""

    top: Tensor
    """`[c, 1]`."""
    rest: Tensor
    """`[c, 1]`."""
    single: Tensor
    """`[c, 1 + k]`, in the order of `Chunk.ids`."""


class ChunkSums:
    """The running sums of one chunk of slots over the tiles of the vocabulary."""

    def __init__(self, chunk: Chunk, head: HeadSettings, *, wants_grad: bool) -> None:
        """Start with no tile; `wants_grad` also sums the head's rows, for `hidden_gradient`."""
        self.chunk, self.targets, self.head = chunk, chunk.targets, head
        self.wants_grad = wants_grad
        ids, num_slots = chunk.ids, len(chunk.hidden)
        zero = chunk.hidden.new_zeros((num_slots, 1), dtype=sum_dtype(head.weight))
        self.kept = torch.full_like(ids, _ABSENT, dtype=zero.dtype)
        """Logits of `ids`."""
        self.kept_slope = torch.ones_like(self.kept)
        self.top, self.best = zero - torch.inf, ids[:, :1]
        self.rest = zero
        """Sum of exp(logit - top) over all ids but the teacher's."""
        self.pulled = zero.new_zeros(chunk.hidden.shape if wants_grad else (num_slots, 0))
        """The same sum with each term times its row of the head."""
        self.candidates, self.candidate_logits = ids[:, :0], zero[:, :0]

    def add_tile(self, tile: Tile, buffer: Tensor) -> None:
        """Add the ids of one tile; `buffer` is overwritten."""
        logits, slope = self.chunk.logits(tile, self.head, buffer)
        if self.head.num_candidates:
            self._keep_candidates(tile.first, logits)
        tile_top = logits.max(dim=1, keepdim=True)
        self.best = torch.where(
            tile_top.values > self.top, tile_top.indices + tile.first, self.best
        )
        top = torch.maximum(tile_top.values, self.top)
        shrink, self.top = (self.top - top).exp_(), top

        if tile.log_weights is not None:
            logits += tile.log_weights
        offsets, is_here = self.chunk.places(tile)
        self.kept = torch.where(is_here, logits.gather(1, offsets), self.kept)
        if slope is not None:
            self.kept_slope = torch.where(is_here, slope.gather(1, offsets), self.kept_slope)
        exponentials = _exponentials(logits, top, offsets, is_here)
        self.rest = self.rest * shrink + exponentials.sum(dim=1, keepdim=True)
        if self.wants_grad:
            if slope is not None:
                exponentials *= slope
            self.pulled *= shrink
            add_product(self.pulled, exponentials, tile.rows)

    def finish(self) -> tuple[tuple[Tensor, ...], Slopes]:
        """Give the fields of `SlotTerms`, and the loss's slopes by logits."""
        kept_exp = (self.kept - self.top).exp()
        total = self.rest + kept_exp[:, 1:].sum(dim=1, keepdim=True)
        log_q = self.kept - self.top - total.log()
        log_rest = self.rest.clamp(min=_TINY).log() - total.log()
        ce = -log_q[:, 0]
        soft, overlap, slope_cb = self._soft(torch.cat([log_q[:, 1:], log_rest], dim=1))
        loss = self.head.loss.ce * ce + soft
        terms = (loss, ce, self.best.squeeze(1) == self.targets.labels, overlap, self.candidates)
        # d loss / d logit: for an id of the rest (common + slope_rest / q_rest) q, for a teacher's
        # id slope + common q, and -ce at the label.
        common = self.head.loss.ce - slope_cb.sum(dim=1, keepdim=True)
        rest = common / total + slope_cb[:, -1:] / self.rest.clamp(min=_TINY)
        single = slope_cb[:, :-1] + common * kept_exp[:, 1:] / total
        single = torch.cat([torch.full_like(total, -self.head.loss.ce), single], dim=1)
        return terms, Slopes(top=self.top, rest=rest, single=single)

    def hidden_gradient(self, slopes: Slopes) -> Tensor:
        """Give d loss / d hidden, `[c, E]`, or `[c, 0]` if it is not wanted."""
        if not self.wants_grad:
            return self.pulled
        grad = self.pulled * slopes.rest + self._rows_of(slopes.single * self.kept_slope)
        return self.head.multiplier * grad

    def _soft(self, log_q_cb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the soft terms, the overlap and d soft / d log q `[c, b]`; zeros where k = 0."""
        if log_q_cb.shape[1] == 1:
            zero = torch.zeros_like(log_q_cb)
            return zero[:, 0], zero[:, 0], zero
        is_complete = self.targets.teacher_ids.shape[1] == len(self.head.weight)
        p_cb = bucket_probabilities(self.targets.teacher_p, is_complete=is_complete)
        with torch.enable_grad():
            log_q_cb = log_q_cb.detach().requires_grad_()
            soft = soft_loss(log_q_cb, p_cb.to(log_q_cb.dtype), self.head.loss)
            (slope_cb,) = torch.autograd.grad(soft.loss.sum(), log_q_cb)
        return soft.loss.detach(), soft.overlap, slope_cb

    def _rows_of(self, weights: Tensor) -> Tensor:
        """Sum single rows of the head, `[c, 1 + k]` weights of `ids`: `[c, E]`."""
        table = self.head.weight
        if weights.shape[1] == 1:
            return weights * table[self.targets.labels].to(weights.dtype)
        return functional.embedding_bag(
            self.chunk.ids.clamp(min=0),
            table,
            per_sample_weights=weights.to(table.dtype),
            mode="sum",
        ).to(weights.dtype)

    def _keep_candidates(self, first: int, logits: Tensor) -> None:
        wanted = self.head.num_candidates
        here = logits.topk(min(wanted, logits.shape[1]), dim=1)
        values = torch.cat([self.candidate_logits, here.values], dim=1)
        ids = torch.cat([self.candidates, here.indices + first], dim=1)
        best = values.topk(min(wanted, values.shape[1]), dim=1)
        self.candidate_logits, self.candidates = best.values, ids.gather(1, best.indices)


def _exponentials(logits_ct: Tensor, top_c1: Tensor, offsets: Tensor, is_here: Tensor) -> Tensor:
    """Turn logits in place into exp(logit - top), 0 at the teacher's ids."""
    exponentials = logits_ct.sub_(top_c1).exp_()
    if offsets.shape[1] > 1:
        # Taken out here and not subtracted later: 1 - sum(q) has no digits where q is sure.
        taken = exponentials.gather(1, offsets[:, 1:]) * is_here[:, 1:]
        exponentials.scatter_add_(1, offsets[:, 1:], -taken)
    return exponentials


def logit_gradient(
    chunk: Chunk, tile: Tile, head: HeadSettings, slopes: Slopes, scale_c: Tensor, buffer: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Give d loss / d logit of one tile, `[c, t]`, and d capped / d uncapped if there is a cap.

    Args:
        chunk: The slots.
        tile: The ids.
        head: Shapes the logits.
        slopes: From the first sweep.
        scale_c: `[c]`, what the caller makes of each slot's loss.
        buffer: Overwritten.
    """
    logits, cap_slope = chunk.logits(tile, head, buffer)
    if tile.log_weights is not None:
        logits += tile.log_weights
    offsets, is_here = chunk.places(tile)
    weights = _exponentials(logits, slopes.top, offsets, is_here)
    weights *= slopes.rest * scale_c[:, None]
    weights.scatter_add_(1, offsets, slopes.single * scale_c[:, None] * is_here)
    return weights, cap_slope


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total` in place, multiplied in the dtype of `right`."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left.to(right.dtype) @ right
