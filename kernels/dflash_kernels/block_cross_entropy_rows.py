"""The kernels of `block_cross_entropy`: what happens between its two matrix products.

A chunk's products with the head lie in memory, one row a slot. Before the kernels run, the numbers
of the few ids that a loss treats apart (the label, the teacher's) are copied to `kept` and
overwritten by `TAKEN`, so no kernel has to look for them among a vocabulary:

    sum_rows         one program for a few slots: reads their rows once, sums all ids but those
    finish_slots     one program for a few slots: loss terms and slopes, from the sums and `kept`
    write_gradients  one program a tile: d loss / d product, of all ids but those

There are no atomics and every sum has one order, so a run repeats itself bit by bit. Sums have the
number format of the products, float32 or wider. On a GPU a program of `sum_rows` has one slot; in
the interpreter, where a program costs milliseconds, it has many.

Legend: c slots of a chunk, s slots of a program, k ids of a teacher, v ids of a tile, g groups of
neighbouring ids, V rows of the head.
"""

import triton
import triton.language as tl

from dflash_kernels._numbers import rounded

TAKEN = tl.constexpr(float("-inf"))
"""Stands in a row for a product that was taken out of it."""
TINY = tl.constexpr(1e-30)
"""Below any probability that matters; keeps logarithms finite."""


@triton.jit
def _slots_of_program(SLOTS: tl.constexpr):
    """Give the program's slots `[s, 1]`, int64 as addresses are computed from them."""
    return tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)[:, None]


@triton.jit
def _ranked(product, MULTIPLIER: tl.constexpr, CAP: tl.constexpr):
    """Turn products into logits by factor and soft cap; the argmax is taken of these."""
    logit = product * MULTIPLIER
    if CAP is not None:
        # tanh(x) = 2 / (1 + exp(-2 x)) - 1: the vendors' own tanh is not interpreted.
        logit = CAP * (2 / (1 + tl.exp(logit * (-2 / CAP))) - 1)
    return logit


@triton.jit
def _through_shaping(gradient, ranked, MULTIPLIER: tl.constexpr, CAP: tl.constexpr):
    """Turn d loss / d logit into d loss / d product."""
    if CAP is not None:
        gradient *= 1 - (ranked / CAP) * (ranked / CAP)
    return gradient * MULTIPLIER


@triton.jit
def _counted(ranked, ids, mask, log_weights_ptr):
    """Add log weights, where there are any; the sum of exponentials is taken of these."""
    if log_weights_ptr is not None:
        ranked += tl.load(log_weights_ptr + ids, mask=mask, other=0.0).to(ranked.dtype)
    return ranked


@triton.jit
def _any(flags):
    """Tell of each slot whether one of its flags is up, as 0 or 1: `[s, 1]` int32."""
    return tl.max(flags.to(tl.int32), axis=1, keep_dims=True)


@triton.jit
def _sum(numbers):
    """Sum over each slot's numbers: `[s, 1]`."""
    return tl.sum(numbers, axis=1, keep_dims=True)


@triton.jit
def _is_before(ranked, ids, label_ranked, label):
    """Tell whether ids win over the label; among equals the lower id wins."""
    return (ranked > label_ranked) | ((ranked == label_ranked) & (ids < label))


@triton.jit
def sum_rows(
    products_ptr,  # [c, V]
    kept_ptr,  # [c, 1 + k]
    labels_ptr,  # [c]
    log_weights_ptr,  # [V] or None
    top_ptr,  # out [c]
    rest_ptr,  # out [c]
    is_beaten_ptr,  # out [c] int32
    group_tops_ptr,  # out [c, g] or None
    num_slots,
    vocabulary,
    top_k,
    MULTIPLIER: tl.constexpr,
    CAP: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sum exp(logit - top) over rows, and see whether an id comes before the label.

    Ids that were taken out count in nothing here. With `group_tops_ptr` the best product of every
    `GROUP` neighbouring ids is written, too.
    """
    slots = _slots_of_program(SLOTS)
    is_slot = slots < num_slots
    label = tl.load(labels_ptr + slots, mask=is_slot, other=0)
    label_product = tl.load(kept_ptr + slots * (top_k + 1), mask=is_slot, other=0.0)
    label_ranked = _ranked(label_product, MULTIPLIER, CAP)
    top = label_ranked
    rest = tl.zeros_like(top)
    is_beaten = tl.zeros_like(label).to(tl.int32)
    for first in range(0, vocabulary, BLOCK_V):
        ids = first + tl.arange(0, BLOCK_V)[None, :]
        is_here = is_slot & (ids < vocabulary)
        product = tl.load(products_ptr + slots * vocabulary + ids, mask=is_here, other=TAKEN)
        if group_tops_ptr is not None:
            num_groups = tl.cdiv(vocabulary, GROUP)
            groups = first // GROUP + tl.arange(0, BLOCK_V // GROUP)[None, :]
            tops = tl.max(tl.reshape(product, [SLOTS, BLOCK_V // GROUP, GROUP]), axis=2)
            places = group_tops_ptr + slots * num_groups + groups
            tl.store(places, tops, mask=is_slot & (groups < num_groups))
        is_open = product != TAKEN
        ranked = _ranked(tl.where(is_open, product, 0.0), MULTIPLIER, CAP)
        is_beaten |= _any(_is_before(ranked, ids, label_ranked, label) & is_open)
        tile_top = tl.max(tl.where(is_open, ranked, top), axis=1, keep_dims=True)
        new_top = tl.maximum(top, tile_top)
        exponentials = tl.exp(_counted(ranked, ids, is_open, log_weights_ptr) - new_top)
        rest = rest * tl.exp(top - new_top) + _sum(tl.where(is_open, exponentials, 0.0))
        top = new_top
    tl.store(top_ptr + slots, top, mask=is_slot)
    tl.store(rest_ptr + slots, rest, mask=is_slot)
    tl.store(is_beaten_ptr + slots, is_beaten, mask=is_slot)


@triton.jit
def _divergence(p, log_q):
    """Give p log(p / q), 0 where p is 0."""
    return p * (tl.log(tl.maximum(p, TINY)) - log_q)


@triton.jit
def _overlap_slope(p, log_q):
    """Give d min(p, q) / d log q; where both are equal, half the slope of q, as in torch."""
    q = tl.exp(log_q)
    return q * tl.where(q < p, 1.0, tl.where(q == p, 0.5, 0.0))


@triton.jit
def finish_slots(
    kept_ptr,  # [c, 1 + k]
    labels_ptr,  # [c]
    teacher_ids_ptr,  # [c, k]
    teacher_p_ptr,  # [c, k]
    log_weights_ptr,  # [V] or None
    top_ptr,  # [c] from `sum_rows`, becomes the best logit of all ids
    rest_ptr,  # [c] from `sum_rows`, becomes d loss / d logit over exp(logit - top) of its ids
    is_beaten_ptr,  # [c] int32 from `sum_rows`
    singles_ptr,  # out [c, 1 + k], d loss / d product of the label and the teacher's ids
    loss_ptr,  # out [c]
    ce_ptr,  # out [c]
    is_correct_ptr,  # out [c] bool
    overlap_ptr,  # out [c]
    num_slots,
    top_k,
    CE: tl.constexpr,
    KL: tl.constexpr,
    TV: tl.constexpr,
    LK_ALPHA: tl.constexpr,
    LK_LAMBDA: tl.constexpr,
    LK_ETA: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    CAP: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    IS_COMPLETE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_k: tl.constexpr,
):
    """Make of a slot's sums its loss terms and the slopes of its loss.

    p and q are compared on k + 1 buckets, the last one for all ids that the teacher did not keep;
    if it kept all (`IS_COMPLETE`), that bucket's p is 0 and not what rounding leaves.
    """
    slots = _slots_of_program(SLOTS)
    is_slot = slots < num_slots
    label = tl.load(labels_ptr + slots, mask=is_slot, other=0)
    kept_ptr += slots * (top_k + 1)
    label_ranked = _ranked(tl.load(kept_ptr, mask=is_slot, other=0.0), MULTIPLIER, CAP)
    label_counted = _counted(label_ranked, label, is_slot, log_weights_ptr)

    # The teacher's ids, [s, k]: logits without and with log weights; -1 where there is no id.
    place = tl.arange(0, BLOCK_k)[None, :]
    is_place = is_slot & (place < top_k)
    ids = tl.load(teacher_ids_ptr + slots * top_k + place, mask=is_place, other=-1)
    is_here = ids >= 0
    p = tl.load(teacher_p_ptr + slots * top_k + place, mask=is_here, other=0.0)
    p = p.to(label_ranked.dtype)
    product = tl.load(kept_ptr + 1 + place, mask=is_here, other=0.0)
    ranked = _ranked(product, MULTIPLIER, CAP)
    counted = _counted(ranked, ids, is_here, log_weights_ptr)

    # Join them to the sums. `rest` is the sum over all ids but the teacher's, `total` over all;
    # neither is a difference of sums: 1 - sum(q) has no digits where q is sure.
    swept_top = tl.load(top_ptr + slots, mask=is_slot, other=0.0)
    tile_top = tl.max(tl.where(is_here, ranked, swept_top), axis=1, keep_dims=True)
    top = tl.maximum(swept_top, tile_top)
    is_taught = _any(ids == label) > 0
    label_exp = tl.exp(label_counted - top)
    rest = tl.load(rest_ptr + slots, mask=is_slot, other=0.0) * tl.exp(swept_top - top)
    rest += tl.where(is_taught, 0.0, label_exp)
    total = rest + _sum(tl.where(is_here, tl.exp(counted - top), 0.0))
    log_total = tl.log(total)
    # In this order: top + log(total) has no digits of a small log(total).
    label_log_q = label_counted - top - log_total
    log_q = counted - top - log_total
    safe_rest = tl.maximum(rest, TINY)
    rest_log_q = tl.log(safe_rest) - log_total

    # Compare p and q, bucket by bucket.
    mass = _sum(p)
    rest_p = mass * 0 if IS_COMPLETE else tl.maximum(1 - mass, 0.0)
    slope = tl.where(is_here, _overlap_slope(p, log_q), 0.0)
    rest_slope = _overlap_slope(rest_p, rest_log_q)
    # d soft / d log q = -(of_kl * p + of_overlap * d min(p, q) / d log q).
    overlap, soft, of_kl, of_overlap = mass * 0, mass * 0, mass * 0, mass * 0
    if HAS_TEACHER:
        kl = _sum(tl.where(is_here, _divergence(p, log_q), 0.0)) + _divergence(rest_p, rest_log_q)
        overlap = _sum(tl.where(is_here, tl.minimum(p, tl.exp(log_q)), 0.0))
        overlap += tl.minimum(rest_p, tl.exp(rest_log_q))
        safe_overlap = tl.maximum(overlap, TINY)
        kl_share = tl.exp(-LK_ETA * overlap)  # a weight, without gradient
        of_kl = KL + LK_LAMBDA * kl_share
        of_overlap = TV + LK_LAMBDA * (1 - kl_share)
        soft = of_kl * kl + of_overlap * (1 - overlap) - LK_ALPHA * tl.log(safe_overlap)
        of_overlap += tl.where(overlap >= TINY, LK_ALPHA / safe_overlap, 0.0)

    # d loss / d logit: d soft / d log q + common * q for a teacher's id; for the others the slope
    # of their bucket by their share in it, + common * q; and -CE at the label.
    common = CE + of_kl * (mass + rest_p) + of_overlap * (_sum(slope) + rest_slope)
    rest_slope = common / total - (of_kl * rest_p + of_overlap * rest_slope) / safe_rest
    slope = common * tl.exp(log_q) - of_kl * p - of_overlap * slope
    taught_slope = _sum(tl.where(ids == label, slope, 0.0))
    label_slope = tl.where(is_taught, taught_slope, rest_slope * label_exp) - CE
    label_single = _through_shaping(label_slope, label_ranked, MULTIPLIER, CAP)
    # -1 stands for the label's place, which is then written again: with the same bits.
    single = _through_shaping(slope, ranked, MULTIPLIER, CAP)
    single = tl.where(is_here & (ids != label), single, label_single)
    tl.store(singles_ptr + slots * (top_k + 1), label_single, mask=is_slot)
    tl.store(singles_ptr + slots * (top_k + 1) + 1 + place, single, mask=is_place)

    is_beaten = tl.load(is_beaten_ptr + slots, mask=is_slot, other=0)
    is_beaten |= _any(_is_before(ranked, ids, label_ranked, label) & is_here)
    tl.store(is_correct_ptr + slots, is_beaten == 0, mask=is_slot)
    tl.store(loss_ptr + slots, soft - CE * label_log_q, mask=is_slot)
    tl.store(ce_ptr + slots, -label_log_q, mask=is_slot)
    tl.store(overlap_ptr + slots, overlap, mask=is_slot)
    tl.store(top_ptr + slots, top, mask=is_slot)
    tl.store(rest_ptr + slots, rest_slope, mask=is_slot)


@triton.jit
def write_gradients(
    products_ptr,  # [c, V]
    gradients_ptr,  # out [c, V] in the head's number format; may be `products_ptr`
    log_weights_ptr,  # [V] or None
    top_ptr,  # [c]
    rest_slope_ptr,  # [c]
    num_slots,
    vocabulary,
    MULTIPLIER: tl.constexpr,
    CAP: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write d loss / d product of one tile; 0 where the product was taken out."""
    slots = _slots_of_program(SLOTS)
    is_slot = slots < num_slots
    ids = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    is_here = is_slot & (ids < vocabulary)
    product = tl.load(products_ptr + slots * vocabulary + ids, mask=is_here, other=TAKEN)
    is_open = product != TAKEN
    ranked = _ranked(tl.where(is_open, product, 0.0), MULTIPLIER, CAP)
    counted = _counted(ranked, ids, is_open, log_weights_ptr)
    top = tl.load(top_ptr + slots, mask=is_slot, other=0.0)
    rest_slope = tl.load(rest_slope_ptr + slots, mask=is_slot, other=0.0)
    slope = tl.where(is_open, tl.exp(counted - top) * rest_slope, 0.0)
    gradient = _through_shaping(slope, ranked, MULTIPLIER, CAP)
    # Rounded to the head's format for the product that follows, which sums in float32.
    gradient = rounded(gradient, gradients_ptr.dtype.element_ty)
    tl.store(gradients_ptr + slots * vocabulary + ids, gradient, mask=is_here)
