"""The counts behind kernels/README.md: from the schedules themselves, and within the promises."""

import pytest

from benchmarks.kernel_tables import (
    CHIPS,
    COUNTED,
    README,
    all_work,
    roofline_ms,
    schedule_ms,
    written,
)
from dflash_kernels._launch import Config
from dflash_kernels.context_kv import work as context_work

WORK = {each.name: each for each in all_work()}


@pytest.mark.parametrize("name", COUNTED)
def test_the_readme_has_the_tables_that_the_tool_prints(name: str):
    assert written(README.read_text(), name) == COUNTED[name]()


def test_attention_multiplies_little_beside_the_visible_area():
    forward = WORK["block_attention forward"]
    assert 1 <= forward.flops / forward.bound_flops <= 1.15
    for kernel in ("own keys", "queries", "context keys"):
        each = WORK[f"block_attention backward, {kernel}"]
        assert 1 <= each.flops / each.bound_flops <= 1.15


def test_cross_entropy_multiplies_each_slot_with_the_head_twice():
    counted = [each for each in WORK.values() if each.name.startswith("block_cross_entropy")]
    least = 4 * 512 * 15 * 151_936 * 4096
    assert sum(each.bound_flops for each in counted) == least
    assert sum(each.flops for each in counted) <= 1.55 * least


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_no_schedule_undercuts_its_bound(work):
    assert work.flops >= work.bound_flops
    assert work.num_bytes >= work.bound_bytes
    for chip in CHIPS:
        assert schedule_ms(work, chip) >= roofline_ms(work, chip)


def test_smaller_tiles_of_context_keys_read_weights_more_often():
    fine, coarse = (
        context_work(config=Config(num_warps=4, num_stages=1, tiles={"ROWS": rows}))[0]
        for rows in (16, 32)
    )
    num_tiles = 4096 * 8 // 32  # of the coarse ones
    assert fine.num_bytes - coarse.num_bytes == num_tiles * 5 * 128 * 4
    assert fine.bound_bytes == coarse.bound_bytes


def test_context_keys_move_each_key_once_each_way():
    forward, backward = context_work(num_layers=3, num_tokens=10, num_kv_heads=2, head_dim=8)
    keys, angles, weights = 3 * 10 * 2 * 8 * 2, 2 * 10 * 8 * 2, 3 * 8 * 4
    assert forward.bound_bytes == 2 * keys + angles + weights
    assert backward.bound_bytes == 3 * keys + angles + 2 * weights
