"""Backward kernels of block attention; none adds with atomics, so results repeat to the bit.

Every kernel computes the scores again and has one owner for each number that it writes:
- `own_gradient_kernel`, one block and kv head: gradients of the block's own keys and values, which
  no other block meets; and, as it reads outputs and their gradients anyway, each row's mean of
  d_weights under the weights (`delta`), which the other two need;
- `query_gradient_kernel`, one query tile: its rows walk the same keys as in the forward pass;
- `context_gradient_kernel`, one tile of context keys: it walks the rows that see it.
Together they take 7 matrix products over the visible area (3 for queries, 4 for keys), where 5
would do if tiles could add to each other's results, and, as in the forward pass, a few idle ones.

Gradients of scores are taken to the scaled products: d_q and d_k are scaled once, at the end.

Legend: see `block_attention_forward.py`.
"""
# pyright: reportGeneralTypeIssues=false
# A jit function called by another returns; to pyright its call never does.

import triton
import triton.language as tl

from dflash_kernels._numbers import product, rounded
from dflash_kernels.block_attention_forward import (
    LOG2_E,
    load_keys,
    load_lines,
    meets_own,
    own_tokens,
    past_hole,
    read_query_tile,
    read_rows,
    row_lines,
    sees_context,
    store_lines,
)


@triton.jit
def own_gradient_kernel(
    q, block_k, block_v, out, d_out, lse, delta, d_block_k, d_block_v, widths, scale,
    NUM_SLOTS: tl.constexpr, SHARE: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDE_DIM: tl.constexpr,
    WINDOW: tl.constexpr, IS_CAUSAL: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Give d_k and d_v of one block's own keys in one kv head, and delta of its rows."""
    head = tl.program_id(0) % NUM_KV_HEADS
    first_token = tl.program_id(0) // NUM_KV_HEADS * NUM_SLOTS
    own_stop = first_token + NUM_SLOTS
    own_token = first_token + tl.arange(0, BLOCK_KEYS)
    dims = tl.arange(0, WIDE_DIM)
    k_ND, v_ND = load_keys(
        block_k,
        block_v,
        first_token,
        own_stop,
        head,
        dims,
        NUM_KV_HEADS,
        HEAD_DIM,
        BLOCK_KEYS,
        True,
    )
    d_k_ND = tl.zeros([BLOCK_KEYS, WIDE_DIM], tl.float32)
    d_v_ND = tl.zeros([BLOCK_KEYS, WIDE_DIM], tl.float32)
    for first_row in range(first_token * SHARE, own_stop * SHARE, ROWS):
        row = first_row + tl.arange(0, ROWS)
        is_row = row < own_stop * SHARE
        base, line = row_lines(first_row, ROWS, head, SHARE, NUM_KV_HEADS)
        q_MD = load_lines(q + base * HEAD_DIM, line, is_row, dims, HEAD_DIM, True)
        out_MD = load_lines(out + base * HEAD_DIM, line, is_row, dims, HEAD_DIM, True)
        d_out_MD = load_lines(d_out + base * HEAD_DIM, line, is_row, dims, HEAD_DIM, True)
        delta_M = tl.sum(out_MD.to(tl.float32) * d_out_MD.to(tl.float32), 1)
        tl.store(delta + base + line, delta_M, mask=is_row)
        lse_M = tl.load(lse + base + line, mask=is_row, other=float("inf"))
        meets_NM = meets_own(
            (row // SHARE)[None, :], own_token[:, None], own_stop, widths,
            NUM_SLOTS, WINDOW, IS_CAUSAL,
        )  # fmt: skip
        d_k_ND, d_v_ND = _add_key_gradients(
            d_k_ND, d_v_ND, k_ND, v_ND, q_MD, d_out_MD, lse_M, delta_M, meets_NM,
            scale * LOG2_E, True,
        )  # fmt: skip
    base = (first_token.to(tl.int64) * NUM_KV_HEADS + head) * HEAD_DIM
    _store_key_gradients(
        d_block_k + base, d_block_v + base, own_token < own_stop, dims, d_k_ND * scale, d_v_ND,
        NUM_KV_HEADS, HEAD_DIM,
    )  # fmt: skip


@triton.jit
def context_gradient_kernel(
    q, context_k, context_v, d_out, lse, delta, d_context_k, d_context_v, anchors, tiles, scale,
    NUM_SLOTS: tl.constexpr, SHARE: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDE_DIM: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Give d_k and d_v of one tile of context keys in one kv head."""
    head = tl.program_id(0) % NUM_KV_HEADS
    tile = tiles + tl.program_id(0) // NUM_KV_HEADS * 8  # a line of `block_tiles.key_tiles`
    key, key_stop, offset = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    first_row, full_row, full_row_stop = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    walk_stop, row_stop = tl.load(tile + 6), tl.load(tile + 7)
    position = key + tl.arange(0, KEYS)
    dims = tl.arange(0, WIDE_DIM)
    k_ND, v_ND = load_keys(
        context_k, context_v, offset + key, offset + key_stop, head, dims,
        NUM_KV_HEADS, HEAD_DIM, KEYS, True,
    )  # fmt: skip
    d_k_ND = tl.zeros([KEYS, WIDE_DIM], tl.float32)
    d_v_ND = tl.zeros([KEYS, WIDE_DIM], tl.float32)
    d_k_ND, d_v_ND = _walk_rows(
        d_k_ND, d_v_ND, k_ND, v_ND, q, d_out, lse, delta, anchors, first_row, walk_stop, full_row,
        full_row_stop, row_stop, position, key_stop, head, dims, scale,
        NUM_SLOTS, SHARE, NUM_KV_HEADS, HEAD_DIM, WINDOW, ROWS, True,
    )  # fmt: skip
    d_k_ND, d_v_ND = _walk_rows(
        d_k_ND, d_v_ND, k_ND, v_ND, q, d_out, lse, delta, anchors, full_row, full_row_stop,
        full_row, full_row, row_stop, position, key_stop, head, dims, scale,
        NUM_SLOTS, SHARE, NUM_KV_HEADS, HEAD_DIM, WINDOW, ROWS, False,
    )  # fmt: skip
    base = ((offset + key).to(tl.int64) * NUM_KV_HEADS + head) * HEAD_DIM
    _store_key_gradients(
        d_context_k + base, d_context_v + base, position < key_stop, dims, d_k_ND * scale, d_v_ND,
        NUM_KV_HEADS, HEAD_DIM,
    )  # fmt: skip


@triton.jit
def _walk_rows(
    d_k_ND, d_v_ND, k_ND, v_ND, q, d_out, lse, delta, anchors, begin, stop, hole, hole_stop,
    row_stop, position, key_stop, head, dims, scale,
    NUM_SLOTS: tl.constexpr, SHARE: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Go over the packed rows from `begin` to `stop` but those from `hole` to `hole_stop`.

    Rows from `row_stop` on do not exist.
    """
    for step in range(begin, stop - (hole_stop - hole), ROWS):
        first_row = past_hole(step, hole, hole_stop)
        row = first_row + tl.arange(0, ROWS)
        base, line = row_lines(first_row, ROWS, head, SHARE, NUM_KV_HEADS)
        is_row = row < row_stop
        q_MD = load_lines(q + base * HEAD_DIM, line, is_row, dims, HEAD_DIM, True)
        d_out_MD = load_lines(d_out + base * HEAD_DIM, line, is_row, dims, HEAD_DIM, True)
        # Weights of rows that do not exist are exp2(score - infinity), nothing.
        lse_M = tl.load(lse + base + line, mask=is_row, other=float("inf"))
        delta_M = tl.load(delta + base + line, mask=is_row, other=0.0)
        sees_NM = None
        if IS_MASKED:
            token, anchor, _ = read_rows(row, row_stop, anchors, NUM_SLOTS, SHARE)
            sees_NM = sees_context(
                anchor[None, :], token[None, :], position[:, None], key_stop, NUM_SLOTS, WINDOW
            )
        d_k_ND, d_v_ND = _add_key_gradients(
            d_k_ND, d_v_ND, k_ND, v_ND, q_MD, d_out_MD, lse_M, delta_M, sees_NM, scale * LOG2_E,
            IS_MASKED,
        )  # fmt: skip
    return d_k_ND, d_v_ND


@triton.jit
def _add_key_gradients(
    d_k_ND, d_v_ND, k_ND, v_ND, q_MD, d_out_MD, lse_M, delta_M, sees_NM, scale_log2,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Add what some rows contribute; keys stand in lines here, so that no result is transposed."""
    none_NM = tl.zeros([k_ND.shape[0], q_MD.shape[0]], tl.float32)
    scores_NM = product(k_ND, tl.trans(q_MD), none_NM)
    weights_NM = tl.exp2(scores_NM * scale_log2 - lse_M[None, :])
    if IS_MASKED:
        weights_NM = tl.where(sees_NM, weights_NM, 0.0)
    d_v_ND = product(rounded(weights_NM, d_out_MD.dtype), d_out_MD, d_v_ND)
    d_weights_NM = product(v_ND, tl.trans(d_out_MD), none_NM)
    d_scores_NM = weights_NM * (d_weights_NM - delta_M[None, :])
    d_k_ND = product(rounded(d_scores_NM, q_MD.dtype), q_MD, d_k_ND)
    return d_k_ND, d_v_ND


@triton.jit
def _store_key_gradients(
    d_k, d_v, is_key, dims, d_k_ND, d_v_ND, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    line = tl.arange(0, d_k_ND.shape[0]) * NUM_KV_HEADS
    store_lines(d_k, line, is_key, dims, HEAD_DIM, rounded(d_k_ND, d_k.dtype.element_ty))
    store_lines(d_v, line, is_key, dims, HEAD_DIM, rounded(d_v_ND, d_v.dtype.element_ty))


@triton.jit
def query_gradient_kernel(
    q, context_k, context_v, block_k, block_v, d_out, lse, delta, d_q, anchors, widths, tiles,
    scale,
    NUM_SLOTS: tl.constexpr, SHARE: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDE_DIM: tl.constexpr,
    WINDOW: tl.constexpr, IS_CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EDGE_KEYS: tl.constexpr, OWN_KEYS: tl.constexpr,
):  # fmt: skip
    """Give d_q of one query tile in one kv head: the walk of the forward kernel."""
    head = tl.program_id(0) % NUM_KV_HEADS
    first_row, row_stop, offset, key, full_key, full_key_stop, key_stop = read_query_tile(
        tiles, tl.program_id(0) // NUM_KV_HEADS
    )
    row = first_row + tl.arange(0, ROWS)
    token, anchor, is_row = read_rows(row, row_stop, anchors, NUM_SLOTS, SHARE)
    base, line = row_lines(first_row, ROWS, head, SHARE, NUM_KV_HEADS)
    dims = tl.arange(0, WIDE_DIM)
    q_MD = load_lines(q + base * HEAD_DIM, line, is_row, dims, HEAD_DIM, True)
    d_out_MD = load_lines(d_out + base * HEAD_DIM, line, is_row, dims, HEAD_DIM, True)
    lse_M = tl.load(lse + base + line, mask=is_row, other=float("inf"))
    delta_M = tl.load(delta + base + line, mask=is_row, other=0.0)
    scale_log2 = scale * LOG2_E

    d_q_MD = tl.zeros([ROWS, WIDE_DIM], tl.float32)
    own_begin, own_stop = own_tokens(first_row, row_stop, NUM_SLOTS, SHARE)
    for own in range(own_begin, own_stop, OWN_KEYS):
        own_token = own + tl.arange(0, OWN_KEYS)
        sees_MN = meets_own(
            token[:, None], own_token[None, :], own_stop, widths, NUM_SLOTS, WINDOW, IS_CAUSAL
        )
        d_q_MD = _add_query_gradient(
            d_q_MD, q_MD, d_out_MD, lse_M, delta_M, block_k, block_v, own, own_stop, head, dims,
            sees_MN, scale_log2, NUM_KV_HEADS, HEAD_DIM, OWN_KEYS, True,
        )  # fmt: skip
    d_q_MD = _walk_keys(
        d_q_MD, q_MD, d_out_MD, lse_M, delta_M, context_k, context_v, offset, key, key_stop,
        full_key, full_key_stop, head, dims, token, anchor, scale_log2,
        NUM_SLOTS, NUM_KV_HEADS, HEAD_DIM, WINDOW, EDGE_KEYS, True,
    )  # fmt: skip
    d_q_MD = _walk_keys(
        d_q_MD, q_MD, d_out_MD, lse_M, delta_M, context_k, context_v, offset, full_key,
        full_key_stop, full_key, full_key, head, dims, token, anchor, scale_log2,
        NUM_SLOTS, NUM_KV_HEADS, HEAD_DIM, WINDOW, KEYS, False,
    )  # fmt: skip
    d_q_MD = rounded(d_q_MD * scale, d_q.dtype.element_ty)
    store_lines(d_q + base * HEAD_DIM, line, is_row, dims, HEAD_DIM, d_q_MD)


@triton.jit
def _walk_keys(
    d_q_MD, q_MD, d_out_MD, lse_M, delta_M, context_k, context_v, offset, begin, stop, hole,
    hole_stop, head, dims, token, anchor, scale_log2,
    NUM_SLOTS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Go over the context keys from `begin` to `stop` but those from `hole` to `hole_stop`."""
    for step in range(begin, stop - (hole_stop - hole), KEYS):
        key = past_hole(step, hole, hole_stop)
        sees_MN = None
        if IS_MASKED:
            sees_MN = sees_context(
                anchor[:, None], token[:, None], (key + tl.arange(0, KEYS))[None, :], stop,
                NUM_SLOTS, WINDOW,
            )  # fmt: skip
        d_q_MD = _add_query_gradient(
            d_q_MD, q_MD, d_out_MD, lse_M, delta_M, context_k, context_v, offset + key,
            offset + stop, head, dims, sees_MN, scale_log2, NUM_KV_HEADS, HEAD_DIM, KEYS,
            IS_MASKED,
        )  # fmt: skip
    return d_q_MD


@triton.jit
def _add_query_gradient(
    d_q_MD, q_MD, d_out_MD, lse_M, delta_M, k, v, first, stop, head, dims, sees_MN, scale_log2,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Add what keys `first` to `first + KEYS` contribute."""
    k_ND, v_ND = load_keys(k, v, first, stop, head, dims, NUM_KV_HEADS, HEAD_DIM, KEYS, IS_MASKED)
    none_MN = tl.zeros([q_MD.shape[0], KEYS], tl.float32)
    scores_MN = product(q_MD, tl.trans(k_ND), none_MN)
    weights_MN = tl.exp2(scores_MN * scale_log2 - lse_M[:, None])
    if IS_MASKED:
        weights_MN = tl.where(sees_MN, weights_MN, 0.0)
    d_weights_MN = product(d_out_MD, tl.trans(v_ND), none_MN)
    d_scores_MN = weights_MN * (d_weights_MN - delta_M[:, None])
    return product(rounded(d_scores_MN, k_ND.dtype), k_ND, d_q_MD)
