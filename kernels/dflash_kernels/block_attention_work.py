"""How much the kernels of block attention compute and move, counted from the tables they walk.

Legend: as in `block_attention.py`; a row is a query of one head, a line the D numbers of a row or
key, and counts of rows, keys and their pairs are those of one kv head.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from dflash_kernels._launch import Arch, Config, Work
from dflash_kernels.block_attention_configs import (
    OWN_KEYS,
    QWEN3_8B,
    QWEN3_8B_PACKING,
    Configs,
    block_width,
    configs_for,
    table_sizes,
)
from dflash_kernels.block_tiles import (
    KEY_FIELDS,
    QUERY_FIELDS,
    BlockLayout,
    Packing,
    key_tiles,
    num_steps,
    query_tiles,
)

STATISTIC_BYTES = 4
"""A log-sum-exp or delta of a row, float32."""


def reference_layout(*, num_blocks: int = 512, num_context: int = 4096) -> BlockLayout:
    """Give anchors drawn from one document, as in training on Qwen3-8B."""
    drawn = torch.randperm(num_context, generator=Generator().manual_seed(0))[:num_blocks]
    return BlockLayout(
        context_offsets=[0, num_context],
        block_offsets=[0, num_blocks],
        anchor_positions=drawn.sort().values,
    )


def work(
    layout: BlockLayout | None = None,
    *,
    packing: Packing = QWEN3_8B_PACKING,
    is_causal: bool = False,
    num_kv_heads: int = QWEN3_8B["num_kv_heads"],
    head_dim: int = QWEN3_8B["head_dim"],
    element_bytes: int = 2,
    configs: Configs | None = None,
) -> list[Work]:
    """Count both passes and, behind them, the three kernels of the backward pass.

    The bound of a kernel has as many products over what is visible as the kernel computes; that of
    the whole backward pass has 5, as if no kernel had to compute scores or d_weights again.

    Args:
        layout: None takes `reference_layout`.
        packing: K, R and the window.
        is_causal: As for `block_attention`.
        num_kv_heads: G.
        head_dim: D, a power of two.
        element_bytes: Of a number of a key.
        configs: None takes those of an H100.
    """
    layout = layout or reference_layout()
    configs = configs or configs_for(Arch.sm_90, dtype=torch.bfloat16, head_dim=head_dim)
    context, own = visible_pairs(layout, packing, is_causal=is_causal)
    num_own = len(layout.anchor_positions) * packing.num_slots
    num_rows, num_context = num_own * packing.share, layout.context_offsets[-1]
    forward = _count_query_tiles(layout, packing, configs.forward)
    own_keys = _count_blocks(num_own, packing, configs.own_gradient)
    queries = _count_query_tiles(layout, packing, configs.query_gradient)
    context_keys = _count_key_tiles(layout, packing, configs.context_gradient)
    ideal = _Counts(pairs=context + own, rows=num_rows, keys=num_context + num_own)
    ideal_own = _Counts(pairs=own, rows=num_rows, keys=num_own)
    ideal_context = _Counts(pairs=context, rows=num_rows, keys=num_context)

    def pass_work(name: str, counts: _Counts, least: _Counts, passes: _Pass) -> Work:
        flops = 2 * passes.products * head_dim * num_kv_heads
        line = head_dim * element_bytes
        return Work(
            name=f"block_attention {name}",
            flops=flops * counts.pairs,
            bound_flops=flops * least.pairs,
            num_bytes=num_kv_heads * passes.bytes_of(counts, line),
            bound_bytes=num_kv_heads * passes.bytes_of(least, line),
        )

    kernels = [
        pass_work("backward, own keys", own_keys, ideal_own, OWN_PASS),
        pass_work("backward, queries", queries, ideal, QUERY_PASS),
        pass_work("backward, context keys", context_keys, ideal_context, CONTEXT_PASS),
    ]
    least = pass_work("backward", ideal, ideal, BACKWARD_BOUND)
    backward = Work(
        name=least.name,
        flops=sum(each.flops for each in kernels),
        bound_flops=least.bound_flops,
        num_bytes=sum(each.num_bytes for each in kernels),
        bound_bytes=least.bound_bytes,
    )
    return [pass_work("forward", forward, ideal, FORWARD_PASS), backward, *kernels]


def visible_pairs(layout: BlockLayout, packing: Packing, *, is_causal: bool) -> tuple[int, int]:
    """Count the pairs that see each other, in the context and in the own blocks."""
    lengths, sizes = (
        torch.tensor(offsets).diff() for offsets in (layout.context_offsets, layout.block_offsets)
    )
    anchors_A, slots_K = layout.anchor_positions.cpu(), torch.arange(packing.num_slots)
    stops_A = anchors_A.clamp(min=0).minimum(lengths.repeat_interleave(sizes))
    window = packing.window or torch.iinfo(torch.int64).max // 2
    first_AK = (anchors_A[:, None] + slots_K - window + 1).clamp(min=0)
    context = (stops_A[:, None] - first_AK).clamp(min=0).sum()

    ahead_KK = slots_K - slots_K[:, None]
    meets_AKK = ((ahead_KK.abs() < window) & (not is_causal or ahead_KK <= 0)).repeat(
        len(anchors_A), 1, 1
    )
    if layout.widths is not None:
        exists_AK = slots_K < layout.widths.cpu()[:, None]
        meets_AKK &= exists_AK[:, None] | (ahead_KK == 0)
    return packing.share * int(context), packing.share * int(meets_AKK.sum())


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """What a kernel does in one kv head."""

    pairs: int
    """Of row and key that are multiplied, those that are masked or padding included."""
    rows: int
    """Loaded, once for each time."""
    keys: int
    """Loaded, once for each time."""


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """What a kernel does with each row, key and pair."""

    products: int
    """Matrix products over the pairs."""
    row_lines: int
    """Lines read and written for a row: q, out, d_out, d_q."""
    statistics: int
    """Numbers read and written for a row: lse, delta."""
    key_lines: int
    """Lines read and written for a key: k, v, d_k, d_v."""

    def bytes_of(self, counts: _Counts, line_bytes: int) -> int:
        """Give the bytes read and written in one kv head."""
        row_bytes = self.row_lines * line_bytes + self.statistics * STATISTIC_BYTES
        return counts.rows * row_bytes + counts.keys * self.key_lines * line_bytes


FORWARD_PASS = _Pass(products=2, row_lines=2, statistics=1, key_lines=2)
OWN_PASS = _Pass(products=4, row_lines=3, statistics=2, key_lines=4)
QUERY_PASS = _Pass(products=3, row_lines=3, statistics=2, key_lines=2)
CONTEXT_PASS = _Pass(products=4, row_lines=2, statistics=2, key_lines=4)
BACKWARD_BOUND = _Pass(products=5, row_lines=4, statistics=1, key_lines=4)


def _count_query_tiles(layout: BlockLayout, packing: Packing, config: Config) -> _Counts:
    table = layout.tiles(query_tiles, packing, **table_sizes(config)).cpu().long()
    row, row_stop, _, key, full_key, full_stop, stop = _columns(table, QUERY_FIELDS)
    per_block = packing.num_slots * packing.share
    touched = (row_stop - 1) // per_block + 1 - row // per_block
    own = touched * packing.num_slots
    seen, full = stop - key, full_stop - full_key
    edge_keys = config.tiles["EDGE_KEYS"]
    walked = full + num_steps(seen - full, edge_keys) * edge_keys
    walked_own = num_steps(own, OWN_KEYS) * OWN_KEYS
    return _Counts(
        pairs=config.tiles["ROWS"] * int((walked + walked_own).sum()),
        rows=int((row_stop - row).sum()),
        keys=int((seen + own).sum()),
    )


def _count_key_tiles(layout: BlockLayout, packing: Packing, config: Config) -> _Counts:
    table = layout.tiles(key_tiles, packing, **table_sizes(config)).cpu().long()
    key, key_stop, _, row, _, _, walk_stop, row_stop = _columns(table, KEY_FIELDS)
    return _Counts(
        pairs=config.tiles["KEYS"] * int((walk_stop - row).sum()),
        rows=int((walk_stop.minimum(row_stop) - row).sum()),
        keys=int((key_stop - key).sum()),
    )


def _count_blocks(num_tokens: int, packing: Packing, config: Config) -> _Counts:
    num_blocks, per_block = num_tokens // packing.num_slots, packing.num_slots * packing.share
    rows = -(-per_block // config.tiles["ROWS"]) * config.tiles["ROWS"]
    return _Counts(
        pairs=num_blocks * rows * block_width(packing),
        rows=num_blocks * per_block,
        keys=num_tokens,
    )


def _columns(table: Tensor, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    assert table.shape[1] == len(names)
    return table.unbind(1)
