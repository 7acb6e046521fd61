"""Chunks of slots between two products with the head: what `block_cross_entropy` is made of.

Legend: S slots, c slots of a chunk, k ids of a teacher, C candidates, E hidden size, V rows of the
head, g groups of neighbouring ids, m ids of the groups looked at.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dflash_kernels._launch import Arch, Config
from dflash_kernels.block_cross_entropy_rows import finish_slots, sum_rows, write_gradients


@dataclass(frozen=True, kw_only=True)
class CrossEntropySettings:
    """What a slot's loss is made of, and how the head's products become logits."""

    ce: float = 1.0
    """Coefficient of the cross entropy with the label."""
    kl: float = 0.0
    """Coefficient of KL(p || q), p the teacher's."""
    tv: float = 0.0
    """Coefficient of the total variation, 1 - sum min(p, q)."""
    lk_alpha: float = 0.0
    """Coefficient of -log(sum min(p, q)) (arXiv 2602.23881)."""
    lk_lambda: float = 0.0
    """Coefficient of s * KL + (1 - s) * TV, s = exp(-lk_eta * sum min(p, q)), without gradient."""
    lk_eta: float = 3.0
    """How soon `lk_lambda` turns from KL to TV."""
    multiplier: float = 1.0
    """Factor on the products, above 0."""
    cap: float | None = None
    """Soft cap, after the factor; None or 0 for none."""
    log_weights: Tensor | None = None
    """`[V]`, added to finished logits: log of how many ids each row stands for. They correct the
    sum of exponentials and rank nothing."""
    num_candidates: int = 0
    """C, best ids wanted of each slot; 0 for none."""
    max_logit_bytes: int = 2 * 1024**3
    """Bytes for logits and their gradients that exist at once."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropyTerms:
    """What the op gives for each slot; only `loss` has a gradient."""

    loss: Tensor
    """`[S]`, the weighted sum of cross entropy and soft terms, float32 or wider."""
    ce: Tensor
    """`[S]`, cross entropy with the label, in nats."""
    is_correct: Tensor
    """`[S]` bool, the label has the best logit (log weights apart), the lowest id among equals."""
    overlap: Tensor
    """`[S]`, sum min(p, q); 0 without a teacher."""
    candidates: Tensor
    """`[S, C]` int64, ids with the best logits (log weights apart), best first; fewer if V < C."""

    def rows(self, rows: slice) -> "CrossEntropyTerms":
        """Give some slots, in the same memory."""
        return CrossEntropyTerms(**{each.name: getattr(self, each.name)[rows] for each in FIELDS})


FIELDS = fields(CrossEntropyTerms)


@dataclass(frozen=True, kw_only=True)
class RowConfigs:
    """How the three kernels are launched."""

    sum_rows: Config
    finish_slots: Config
    write_gradients: Config

    @property
    def group(self) -> int:
        """Ids whose best logit is noted, where candidates are wanted."""
        return self.sum_rows.tiles["GROUP"]


def config_for(arch: Arch, top_k: int) -> RowConfigs:
    """Give the tiles: all kernels wait for memory, so the chips do not differ.

    A slot's row is 4 loads of 16 bytes by each of 256 threads after another; some programs to a
    multiprocessor keep its memory busy. A teacher's ids are one tile. The interpreter, to which a
    program costs more than its numbers, has many slots in each.

    Args:
        arch: Where.
        top_k: k.
    """
    kept = 1 << (max(top_k, 1) - 1).bit_length()
    slots, ids, group = (32, 128, 16) if arch is Arch.interpreter else (1, 4096, 128)
    few = slots if arch is Arch.interpreter else max(1, 32 // kept)
    warps = min(16, max(1, few * kept // 256))
    return RowConfigs(
        sum_rows=Config(
            num_warps=8, num_stages=1, tiles={"SLOTS": slots, "BLOCK_V": ids, "GROUP": group}
        ),
        finish_slots=Config(num_warps=warps, num_stages=1, tiles={"SLOTS": few, "BLOCK_k": kept}),
        write_gradients=Config(num_warps=8, num_stages=1, tiles={"SLOTS": slots, "BLOCK_V": ids}),
    )


def chunk_slots(vocabulary: int, dtype: torch.dtype, max_bytes: int) -> int:
    """Give c, the most slots, a power of two, whose logits and gradients take `max_bytes`.

    Args:
        vocabulary: V.
        dtype: Number format of the head. Logits in float32 take the memory of their gradients if
            the head is float32, too.
        max_bytes: At least one slot is taken also above it.
    """
    sums = sum_dtype(dtype)
    id_bytes = sums.itemsize + (0 if sums == dtype else dtype.itemsize)
    fitting = max(1, max_bytes // (vocabulary * id_bytes))
    return 1 << (fitting.bit_length() - 1)


def num_tiles(length: int, size: int) -> int:
    """Divide, rounding up."""
    return -(-length // size)


def cut(num_slots: int, chunk: int) -> Iterator[slice]:
    """Cut slots into chunks."""
    for first in range(0, num_slots, chunk):
        yield slice(first, min(first + chunk, num_slots))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give the number format of logits and sums: float32, or wider if the head is."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Head:
    """The frozen head, and what is asked of it."""

    weight: Tensor
    settings: CrossEntropySettings
    configs: RowConfigs

    @property
    def log_weights(self) -> Tensor | None:
        """As in the settings, one number after another in memory."""
        given = self.settings.log_weights
        return None if given is None else given.contiguous()

    @property
    def shaping(self) -> dict[str, Any]:
        """Constexpr arguments of all kernels."""
        return {"MULTIPLIER": self.settings.multiplier, "CAP": self.settings.cap or None}


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the target said at each slot."""

    labels: Tensor
    teacher_ids: Tensor
    teacher_p: Tensor

    def rows(self, rows: slice) -> "Targets":
        """Give some slots, in the same memory."""
        return Targets(
            labels=self.labels[rows],
            teacher_ids=self.teacher_ids[rows],
            teacher_p=self.teacher_p[rows],
        )

    @property
    def single_ids(self) -> Tensor:
        """`[S, 1 + k]`: the label, then the teacher's ids, the label again instead of -1."""
        labels = self.labels[:, None]
        taught = torch.where(self.teacher_ids < 0, labels, self.teacher_ids)
        return torch.cat([labels, taught], dim=1)


class Chunk:
    """Slots whose logits exist at once."""

    def __init__(self, hidden_cE: Tensor, targets: Targets, head: Head) -> None:
        """Multiply with the head, and take the label's and the teacher's products out."""
        self.targets, self.head = targets, head
        self.single_ids_ck = targets.single_ids
        self.products_cV = matrix_product(hidden_cE, head.weight.T)
        self.kept_ck = self.products_cV.gather(1, self.single_ids_ck)
        self.products_cV.scatter_(1, self.single_ids_ck, -torch.inf)
        self.singles_ck = torch.empty_like(self.kept_ck)
        """d loss / d product of `single_ids_ck`."""
        self.top_c = self.products_cV.new_empty(len(hidden_cE))
        """Best logit."""
        self.rest_c = torch.empty_like(self.top_c)
        """Sum of exp(logit - top) over the ids left, then their slope over exp(logit - top)."""

    def fill(self, terms: CrossEntropyTerms) -> None:
        """Write the terms of all slots, and keep the slopes of their losses."""
        head, targets, settings = self.head, self.targets, self.head.settings
        num_slots, vocabulary = self.products_cV.shape
        top_k = targets.teacher_ids.shape[1]
        is_beaten_c = torch.empty_like(targets.labels, dtype=torch.int32)
        group_tops_cg = None
        if settings.num_candidates:
            num_groups = num_tiles(vocabulary, head.configs.group)
            group_tops_cg = self.products_cV.new_empty((num_slots, num_groups))
        config = head.configs.sum_rows
        sum_rows[(num_tiles(num_slots, config.tiles["SLOTS"]),)](
            self.products_cV, self.kept_ck, targets.labels, head.log_weights,
            self.top_c, self.rest_c, is_beaten_c, group_tops_cg, num_slots, vocabulary, top_k,
            **head.shaping, **config.arguments(),
        )  # fmt: skip
        teacher: dict[str, Any] = {"HAS_TEACHER": top_k > 0, "IS_COMPLETE": top_k == vocabulary}
        config = head.configs.finish_slots
        finish_slots[(num_tiles(num_slots, config.tiles["SLOTS"]),)](
            self.kept_ck, targets.labels, targets.teacher_ids, targets.teacher_p,
            head.log_weights, self.top_c, self.rest_c, is_beaten_c, self.singles_ck,
            terms.loss, terms.ce, terms.is_correct, terms.overlap, num_slots, top_k,
            **loss_constants(settings), **teacher, **head.shaping, **config.arguments(),
        )  # fmt: skip
        if group_tops_cg is not None:
            terms.candidates.copy_(self._candidates(group_tops_cg, terms.candidates.shape[1]))

    def hidden_gradient(self) -> Tensor:
        """Give d loss / d hidden, `[c, E]`; the products may be overwritten."""
        products_cV, weight = self.products_cV, self.head.weight
        gradients_cV = products_cV
        if weight.dtype != products_cV.dtype:
            gradients_cV = torch.empty_like(products_cV, dtype=weight.dtype)
        num_slots, vocabulary = products_cV.shape
        config = self.head.configs.write_gradients
        # Slots first: a grid's second axis ends at 65535.
        grid = (
            num_tiles(num_slots, config.tiles["SLOTS"]),
            num_tiles(vocabulary, config.tiles["BLOCK_V"]),
        )
        write_gradients[grid](
            products_cV, gradients_cV, self.head.log_weights, self.top_c, self.rest_c,
            num_slots, vocabulary, **self.head.shaping, **config.arguments(),
        )  # fmt: skip
        gradients_cV.scatter_(1, self.single_ids_ck, self.singles_ck.to(weight.dtype))
        return matrix_product(gradients_cV, weight)

    def _candidates(self, group_tops_cg: Tensor, wanted: int) -> Tensor:
        """Give the ids of the best products, best first: `[c, wanted]`.

        The best of the ids left are in as many groups with the best tops, so a selection looks at
        V / group + wanted * group numbers of a slot in place of V.
        """
        num_groups, group = group_tops_cg.shape[1], self.head.configs.group
        groups_cC = group_tops_cg.topk(min(wanted, num_groups), dim=1).indices
        members = torch.arange(group, device=groups_cC.device)
        ids_cm = (groups_cC[:, :, None] * group + members).flatten(1)
        last = self.products_cV.shape[1] - 1
        products_cm = self.products_cV.gather(1, ids_cm.clamp(max=last))
        products_cm = products_cm.masked_fill(ids_cm > last, -torch.inf)
        is_again = self.single_ids_ck[:, 1:] == self.single_ids_ck[:, :1]
        is_again = functional.pad(is_again, (1, 0), value=False)
        kept_ck = self.kept_ck.masked_fill(is_again, -torch.inf)
        best = torch.cat([products_cm, kept_ck], dim=1).topk(wanted, dim=1).indices
        return torch.cat([ids_cm, self.single_ids_ck], dim=1).gather(1, best)


def loss_constants(settings: CrossEntropySettings) -> dict[str, Any]:
    """Give the coefficients as constexpr arguments of `finish_slots`: a run has one set."""
    names = ("ce", "kl", "tv", "lk_alpha", "lk_lambda", "lk_eta")
    return {name.upper(): float(getattr(settings, name)) for name in names}


def matrix_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices of one number format, with the result in `sum_dtype`."""
    dtype = sum_dtype(left.dtype)
    if dtype == left.dtype:
        return torch.mm(left, right)
    if left.device.type == "cpu":  # torch has no `out_dtype` there
        return torch.mm(left.to(dtype), right.to(dtype))
    return torch.mm(left, right, out_dtype=dtype)
