"""Forward kernel of block attention, and what its backward kernels share with it.

One program holds a tile of packed rows of one kv head, so that all its blocks and query heads
share each tile of keys. The rows meet their own blocks first: every slot sees itself, so from there
on each row has a finite maximum, also where it sees no context at all, and the steps of the online
softmax need no special case. Then come the context keys of the tile's walk (`block_tiles.py`).

The programs of one tile and all kv heads have neighbouring numbers. Long tiles thus start first in
all heads, and where programs go to the chiplets of a GPU in turn, as on MI300X, each keeps few
heads' keys in its cache.

Legend: M packed rows of a tile, in the order block, slot, query head of the kv head; N keys of a
step; D head dim, padded to a power of two. Constexprs: NUM_SLOTS is K, SHARE is R, the query heads
of a kv head, NUM_KV_HEADS is G, HEAD_DIM and WIDE_DIM are D without and with padding.
"""
# pyright: reportGeneralTypeIssues=false
# A jit function called by another returns; to pyright its call never does.

import triton
import triton.language as tl

from dflash_kernels._numbers import product, rounded

LOG2_E = tl.constexpr(1.4426950408889634)
"""Softmax to the base 2: GPUs have no other exponential."""
LOWEST = tl.constexpr(-3.0e38)
"""Maximum of nothing yet; finite, as the difference of two infinities is no number."""


@triton.jit
def forward_kernel(
    q, context_k, context_v, block_k, block_v, out, lse, anchors, widths, tiles, scale,
    NUM_SLOTS: tl.constexpr, SHARE: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDE_DIM: tl.constexpr,
    WINDOW: tl.constexpr, IS_CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EDGE_KEYS: tl.constexpr, OWN_KEYS: tl.constexpr,
):  # fmt: skip
    """Attend for one query tile of one kv head; write outputs and base-2 log-sum-exps."""
    head = tl.program_id(0) % NUM_KV_HEADS
    first_row, row_stop, offset, key, full_key, full_key_stop, key_stop = read_query_tile(
        tiles, tl.program_id(0) // NUM_KV_HEADS
    )
    row = first_row + tl.arange(0, ROWS)
    token, anchor, is_row = read_rows(row, row_stop, anchors, NUM_SLOTS, SHARE)
    base, line = row_lines(first_row, ROWS, head, SHARE, NUM_KV_HEADS)
    dims = tl.arange(0, WIDE_DIM)
    q_MD = load_lines(q + base * HEAD_DIM, line, is_row, dims, HEAD_DIM, True)
    scale_log2 = scale * LOG2_E

    top_M = tl.full([ROWS], LOWEST, tl.float32)
    total_M = tl.zeros([ROWS], tl.float32)
    out_MD = tl.zeros([ROWS, WIDE_DIM], tl.float32)
    own_begin, own_stop = own_tokens(first_row, row_stop, NUM_SLOTS, SHARE)
    for own in range(own_begin, own_stop, OWN_KEYS):
        own_token = own + tl.arange(0, OWN_KEYS)
        sees_MN = meets_own(
            token[:, None], own_token[None, :], own_stop, widths, NUM_SLOTS, WINDOW, IS_CAUSAL
        )
        top_M, total_M, out_MD = _attend(
            top_M, total_M, out_MD, q_MD, block_k, block_v, own, own_stop, head, dims, sees_MN,
            scale_log2, NUM_KV_HEADS, HEAD_DIM, OWN_KEYS, True,
        )  # fmt: skip
    top_M, total_M, out_MD = _walk(
        top_M, total_M, out_MD, q_MD, context_k, context_v, offset, key, key_stop, full_key,
        full_key_stop, head, dims, token, anchor, scale_log2, NUM_SLOTS, NUM_KV_HEADS, HEAD_DIM,
        WINDOW, EDGE_KEYS, True,
    )  # fmt: skip
    top_M, total_M, out_MD = _walk(
        top_M, total_M, out_MD, q_MD, context_k, context_v, offset, full_key, full_key_stop,
        full_key, full_key, head, dims, token, anchor, scale_log2, NUM_SLOTS, NUM_KV_HEADS,
        HEAD_DIM, WINDOW, KEYS, False,
    )  # fmt: skip
    total_M = tl.where(is_row, total_M, 1.0)  # rows of padding have met nothing
    out_MD = rounded(out_MD / total_M[:, None], out.dtype.element_ty)
    store_lines(out + base * HEAD_DIM, line, is_row, dims, HEAD_DIM, out_MD)
    tl.store(lse + base + line, top_M + tl.log2(total_M), mask=is_row)


@triton.jit
def _walk(
    top_M, total_M, out_MD, q_MD, context_k, context_v, offset, begin, stop, hole, hole_stop, head,
    dims, token, anchor, scale_log2,
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
        top_M, total_M, out_MD = _attend(
            top_M, total_M, out_MD, q_MD, context_k, context_v, offset + key, offset + stop, head,
            dims, sees_MN, scale_log2, NUM_KV_HEADS, HEAD_DIM, KEYS, IS_MASKED,
        )  # fmt: skip
    return top_M, total_M, out_MD


@triton.jit
def _attend(
    top_M, total_M, out_MD, q_MD, k, v, first, stop, head, dims, sees_MN, scale_log2,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Let the rows meet keys `first` to `first + KEYS`: one step of the online softmax."""
    k_ND, v_ND = load_keys(k, v, first, stop, head, dims, NUM_KV_HEADS, HEAD_DIM, KEYS, IS_MASKED)
    none_MN = tl.zeros([q_MD.shape[0], KEYS], tl.float32)
    scores_MN = product(q_MD, tl.trans(k_ND), none_MN)
    if IS_MASKED:
        scores_MN = tl.where(sees_MN, scores_MN, float("-inf"))
    new_top_M = tl.maximum(top_M, tl.max(scores_MN, 1) * scale_log2)
    weights_MN = tl.exp2(scores_MN * scale_log2 - new_top_M[:, None])
    shrink_M = tl.exp2(top_M - new_top_M)
    total_M = total_M * shrink_M + tl.sum(weights_MN, 1)
    # The tensor cores take weights in the number format of the values.
    weights_MN = rounded(weights_MN, v_ND.dtype)
    out_MD = product(weights_MN, v_ND, out_MD * shrink_M[:, None])
    return new_top_M, total_M, out_MD


@triton.jit
def past_hole(step, hole, hole_stop):
    """Place a step of a walk that leaves out a stretch: one loop goes over both of its sides."""
    return step + tl.where(step >= hole, hole_stop - hole, 0)


@triton.jit
def read_query_tile(tiles, number):
    """Read one line of `block_tiles.query_tiles`."""
    tile = tiles + number * 7
    return (
        tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4),
        tl.load(tile + 5), tl.load(tile + 6),
    )  # fmt: skip


@triton.jit
def read_rows(row, row_stop, anchors, NUM_SLOTS: tl.constexpr, SHARE: tl.constexpr):
    """Give each row's token (block * K + slot), its anchor position and whether it exists."""
    is_row = row < row_stop
    token = row // SHARE
    # Positions fit into 32 bits, in which masks are twice as fast to compute.
    anchor = tl.load(anchors + token // NUM_SLOTS, mask=is_row, other=0).to(tl.int32)
    return token, anchor, is_row


@triton.jit
def row_lines(first_row, ROWS: tl.constexpr, head, SHARE: tl.constexpr, NUM_KV_HEADS: tl.constexpr):
    """Locate rows in `[A, K, H]`: the place of the first row's token in 64 bits, and the rows'
    places relative to it, which fit into 32."""
    first_token = first_row // SHARE
    row = first_row + tl.arange(0, ROWS)
    line = (row // SHARE - first_token) * (NUM_KV_HEADS * SHARE) + row % SHARE
    return tl.cast(first_token, tl.int64) * (NUM_KV_HEADS * SHARE) + head * SHARE, line


@triton.jit
def own_tokens(first_row, row_stop, NUM_SLOTS: tl.constexpr, SHARE: tl.constexpr):
    """Give the bounds of the tokens of all blocks that have rows in a tile."""
    begin = first_row // SHARE // NUM_SLOTS * NUM_SLOTS
    stop = ((row_stop - 1) // SHARE // NUM_SLOTS + 1) * NUM_SLOTS
    return begin, stop


@triton.jit
def sees_context(
    anchor, token, position, stop, NUM_SLOTS: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """Tell which queries see which context positions, for queries and positions that broadcast."""
    sees = (position < anchor) & (position < stop)
    if WINDOW is not None:
        sees &= anchor + token % NUM_SLOTS - position < WINDOW
    return sees


@triton.jit
def meets_own(
    token, own_token, own_stop, widths,
    NUM_SLOTS: tl.constexpr, WINDOW: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Tell which slots of the same block meet, for query tokens and key tokens that broadcast.

    A slot past its block's width meets itself too.
    """
    meets = (token // NUM_SLOTS == own_token // NUM_SLOTS) & (own_token < own_stop)
    if IS_CAUSAL:
        meets &= own_token <= token
    if WINDOW is not None:
        meets &= (own_token - token < WINDOW) & (token - own_token < WINDOW)
    if widths is not None:
        width = tl.load(widths + own_token // NUM_SLOTS, mask=own_token < own_stop, other=0)
        meets &= (own_token % NUM_SLOTS < width) | (own_token == token)
    return meets


@triton.jit
def load_keys(
    k, v, first, stop, head, dims,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Load keys and values `first` to `first + KEYS` of one head, zeros from `stop` on."""
    base = (tl.cast(first, tl.int64) * NUM_KV_HEADS + head) * HEAD_DIM
    line = tl.arange(0, KEYS) * NUM_KV_HEADS
    is_key = first + tl.arange(0, KEYS) < stop
    k_ND = load_lines(k + base, line, is_key, dims, HEAD_DIM, IS_MASKED)
    v_ND = load_lines(v + base, line, is_key, dims, HEAD_DIM, IS_MASKED)
    return k_ND, v_ND


@triton.jit
def load_lines(
    start, line, is_line, dims, HEAD_DIM: tl.constexpr, IS_MASKED: tl.constexpr
):  # fmt: skip
    """Load rows of head dims, zeros where there is no row and in the padding of the head dim."""
    at = start + line[:, None] * HEAD_DIM + dims[None, :]
    if IS_MASKED:
        lines = tl.load(at, mask=is_line[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif dims.shape[0] != HEAD_DIM:
        lines = tl.load(at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        lines = tl.load(at)
    return lines


@triton.jit
def store_lines(start, line, is_line, dims, HEAD_DIM: tl.constexpr, values):
    """Store rows of head dims, without padding."""
    at = start + line[:, None] * HEAD_DIM + dims[None, :]
    tl.store(at, values, mask=is_line[:, None] & (dims < HEAD_DIM)[None, :])
