"""The frozen head and the loss of single slots, with the gradient of their hidden states.

Q*V logits would be the largest tensor of a run, so slots come in chunks whose logits stay below a
byte bound. Of the work, all but a thousandth are two matrix products of a chunk with the head, for
the logits and for the gradient; they stay with the vendor's library, and no product is done twice.
Between them Triton kernels (`block_cross_entropy_rows`) read a row of logits once for its sums and
once more to turn it into d loss / d logit.

Why not one fused kernel, as for attention: its accumulator would be a slot's whole hidden state,
and 64 rows of E = 4096 float32 are 1 MiB, four times a multiprocessor's shared memory. Fusing the
sums into the first product saves reading the logits once, 4 of the 16 bytes that each one costs
here and 6 % of the time on an H100 by `work`, but only if Triton's product comes within 14 % of the
vendor's; computing the logits twice instead of keeping them costs half as much again in FLOPs.

The logits are float32 also where the head is bfloat16: of logits near 20, bfloat16 has only every
eighth of one, which makes ties of best ids and errors of several percent in probabilities.

Legend: S slots, c slots of a chunk, k ids of a teacher, C candidates, E hidden size, V rows of the
head, g groups of neighbouring ids, m ids of the groups looked at.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dflash_kernels._launch import Arch, Specimen, Work, arch_of, on_device_of
from dflash_kernels.block_cross_entropy_chunks import (
    FIELDS,
    Chunk,
    CrossEntropySettings,
    CrossEntropyTerms,
    Head,
    RowConfigs,
    Targets,
    chunk_slots,
    config_for,
    cut,
    loss_constants,
    num_tiles,
    sum_dtype,
)
from dflash_kernels.block_cross_entropy_rows import finish_slots, sum_rows, write_gradients

SHAPES = {"num_slots": 512 * 15, "vocabulary": 151936, "width": 4096}
"""512 blocks of 16, the anchors without a label, at Qwen3-8B's head: what the reports take."""


def block_cross_entropy(
    hidden_SE: Tensor,
    *,
    weight_VE: Tensor,
    labels_S: Tensor,
    teacher_ids_Sk: Tensor,
    teacher_p_Sk: Tensor,
    settings: CrossEntropySettings,
    configs: RowConfigs | None = None,
) -> CrossEntropyTerms:
    """Give each slot's loss, with the gradient of its hidden state ready for the backward pass.

    That gradient is of the unweighted loss: weights that need the cross entropy of a whole block,
    and the denominator, multiply its rows afterwards.

    Args:
        hidden_SE: `[S, E]`, brought to the head's dtype for the products.
        weight_VE: `[V, E]`, the frozen head.
        labels_S: `[S]` int64 in 0 .. V - 1.
        teacher_ids_Sk: `[S, k]` int64, different ones in a row but for -1 where the head does not
            have the id; k = 0 without a teacher.
        teacher_p_Sk: `[S, k]`, the teacher's probabilities, 0 where the id is -1: their mass then
            is in the rest.
        settings: Terms, and the shape of logits.
        configs: None takes those of the device.

    Raises:
        ValueError: The factor is not above 0, so that the best product has not the best logit.
        RuntimeError: Triton does not run on the device.
    """
    if settings.multiplier <= 0:
        raise ValueError(
            f"settings.multiplier (={settings.multiplier}) must be above 0. Use the twin instead."
        )
    head = Head(
        weight=weight_VE,
        settings=settings,
        configs=configs or config_for(arch_of(hidden_SE.device), teacher_ids_Sk.shape[1]),
    )
    targets = Targets(
        labels=labels_S.contiguous(),
        teacher_ids=teacher_ids_Sk.contiguous(),
        teacher_p=teacher_p_Sk.contiguous(),
    )
    loss, ce, is_correct, overlap, candidates = _BlockCrossEntropy.apply(hidden_SE, targets, head)
    return CrossEntropyTerms(
        loss=loss, ce=ce, is_correct=is_correct, overlap=overlap, candidates=candidates
    )


class _BlockCrossEntropy(torch.autograd.Function):
    """Chunk by chunk: product, kernels, product."""

    @staticmethod
    def forward(ctx: Any, hidden_SE: Tensor, targets: Targets, head: Head) -> tuple[Tensor, ...]:
        """Give the fields of `CrossEntropyTerms` and keep d loss / d hidden, unweighted."""
        wants_grad = ctx.needs_input_grad[0]
        vocabulary, dtype = len(head.weight), head.weight.dtype
        terms = _empty_terms(hidden_SE, head)
        gradient_SE = hidden_SE.new_empty(hidden_SE.shape if wants_grad else (0,))
        chunk = chunk_slots(vocabulary, dtype, head.settings.max_logit_bytes)
        with on_device_of(hidden_SE):
            for rows in cut(len(hidden_SE), chunk):
                sweep = Chunk(hidden_SE[rows].to(dtype), targets.rows(rows), head)
                sweep.fill(terms.rows(rows))
                if wants_grad:
                    gradient_SE[rows] = sweep.hidden_gradient()
                del sweep  # its logits go before the next ones come
        columns = tuple(getattr(terms, each.name) for each in FIELDS)
        ctx.mark_non_differentiable(*columns[1:])
        if wants_grad:
            ctx.save_for_backward(gradient_SE)
        return columns

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] the decorator hides names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        """Scale each slot's gradient by what the caller makes of its loss."""
        (gradient_SE,) = ctx.saved_tensors
        return gradient_SE * grads[0][:, None].to(gradient_SE.dtype), None, None


def _empty_terms(hidden_SE: Tensor, head: Head) -> CrossEntropyTerms:
    num_slots, dtype = len(hidden_SE), sum_dtype(head.weight.dtype)
    num_candidates = min(head.settings.num_candidates, len(head.weight))
    return CrossEntropyTerms(
        loss=hidden_SE.new_empty(num_slots, dtype=dtype),
        ce=hidden_SE.new_empty(num_slots, dtype=dtype),
        is_correct=hidden_SE.new_empty(num_slots, dtype=torch.bool),
        overlap=hidden_SE.new_empty(num_slots, dtype=dtype),
        candidates=hidden_SE.new_empty((num_slots, num_candidates), dtype=torch.int64),
    )


def kernels_to_compile(arch: Arch) -> list[Specimen]:
    """Give the kernels at `SHAPES`, plain and with all that a recipe can ask for."""
    plain = CrossEntropySettings()
    full = CrossEntropySettings(
        kl=0.5, tv=1.8, lk_alpha=0.2, lk_lambda=0.7, multiplier=0.5, cap=30.0, num_candidates=16
    )
    return [
        *_specimens(arch, "bf16", plain, top_k=0),
        *_specimens(arch, "fp32", plain, top_k=0),
        *_specimens(arch, "bf16", full, top_k=64),
    ]


TYPES = {
    "labels_ptr": "*i64", "teacher_ids_ptr": "*i64", "is_beaten_ptr": "*i32",
    "is_correct_ptr": "*i1", "num_slots": "i32", "vocabulary": "i32", "top_k": "i32",
}  # fmt: skip
"""Types of the kernels' arguments; all others are `*fp32`, but for the gradients."""


def _specimens(
    arch: Arch, dtype: str, settings: CrossEntropySettings, *, top_k: int
) -> list[Specimen]:
    """Give the three kernels for a head of this dtype; with candidates also log weights."""
    configs = config_for(arch, top_k)
    shaping = {"MULTIPLIER": settings.multiplier, "CAP": settings.cap}
    absent = {} if settings.num_candidates else {"log_weights_ptr": None}
    tops = {} if settings.num_candidates else {"group_tops_ptr": None}
    teacher = {"HAS_TEACHER": top_k > 0, "IS_COMPLETE": False}
    launches = (
        (sum_rows, configs.sum_rows, {**absent, **tops}),
        (finish_slots, configs.finish_slots, {**absent, **loss_constants(settings), **teacher}),
        (write_gradients, configs.write_gradients, absent),
    )
    found = []
    for kernel, config, more in launches:
        constants = {**shaping, **more}
        types = {**TYPES, "gradients_ptr": f"*{dtype}"}
        names = [n for n in kernel.arg_names if n not in constants and n not in config.tiles]
        found.append(
            Specimen(
                name=f"block_cross_entropy {kernel.__name__}, k = {top_k}, {dtype}",
                kernel=kernel,
                signature={name: types.get(name, "*fp32") + ":16" for name in names},
                constexprs=constants,
                config=config,
            )
        )
    return found


def work(
    *,
    num_slots: int = SHAPES["num_slots"],
    vocabulary: int = SHAPES["vocabulary"],
    width: int = SHAPES["width"],
    top_k: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_logit_bytes: int = CrossEntropySettings().max_logit_bytes,
    config: RowConfigs | None = None,
) -> list[Work]:
    """Count what each launch does, over all chunks; they run one after another.

    The products are the vendor's: their operands count once a chunk, as if it were one tile.
    Candidates and log weights are not counted; they add some percent to `sum_rows`.

    Args:
        num_slots: S.
        vocabulary: V.
        width: E.
        top_k: k.
        dtype: Of the head and of hidden states.
        max_logit_bytes: As in the settings.
        config: None takes that of an H100.
    """
    config = config or config_for(Arch.sm_90, top_k)
    numbers, head = sum_dtype(dtype).itemsize, dtype.itemsize
    tiles = num_tiles(vocabulary, config.write_gradients.tiles["BLOCK_V"])
    chunk = chunk_slots(vocabulary, dtype, max_logit_bytes)
    sizes = [rows.stop - rows.start for rows in cut(num_slots, chunk)]
    weight, hidden = vocabulary * width * head, width * head
    singles, targets = 1 + top_k, 8 + (8 + 4) * top_k
    terms = 3 * numbers + 1
    flops = [2 * size * vocabulary * width for size in sizes]
    bound_flops = 2 * num_slots * vocabulary * width

    def rows(name: str, slot_bytes: int, bound_bytes: int = 0) -> Work:
        """Count a launch without products that does the same for every slot."""
        return Work(
            name=f"block_cross_entropy {name}",
            flops=0,
            bound_flops=0,
            num_bytes=sum(size * slot_bytes for size in sizes),
            bound_bytes=num_slots * bound_bytes,
        )

    return [
        Work(
            name="block_cross_entropy logits",
            flops=sum(flops),
            bound_flops=bound_flops,
            num_bytes=sum(weight + size * (hidden + vocabulary * numbers) for size in sizes),
            bound_bytes=weight + num_slots * hidden,
        ),
        # Copied to `kept`, overwritten, and in the end their gradients written by themselves.
        rows("single ids", targets + singles * (3 * 8 + 5 * numbers + head)),
        rows("sum_rows", vocabulary * numbers + 8 + 3 * numbers + 4),
        rows("finish_slots", targets + terms + (2 * singles + 4) * numbers + 4, targets + terms),
        rows("write_gradients", vocabulary * (numbers + head) + tiles * 2 * numbers),
        Work(
            name="block_cross_entropy hidden gradient",
            flops=sum(flops),
            bound_flops=bound_flops,
            # The product has the format of sums, its copy that of hidden states.
            num_bytes=sum(
                weight + size * (vocabulary * head + 2 * width * numbers + hidden) for size in sizes
            ),
            bound_bytes=num_slots * hidden,
        ),
    ]
