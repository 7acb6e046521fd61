import pytest
import torch
from torch import Tensor

from dflash_train.drafter.block_attention import ContextKV
from dflash_train.drafter.context import ContextCache, RawContext, context_kv, write_context_kv

NUM_LAYERS, HEADS, WIDTH = 3, 2, 4


def rows_of(num_rows: int) -> list[ContextKV]:
    return [
        ContextKV(torch.randn(num_rows, HEADS, WIDTH), torch.randn(num_rows, HEADS, WIDTH))
        for _ in range(NUM_LAYERS)
    ]


def joined(parts: list[list[ContextKV]]) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.cat([part.k for part in layer]), torch.cat([part.v for part in layer]))
        for layer in zip(*parts, strict=True)
    ]


def assert_holds(cache: ContextCache, parts: list[list[ContextKV]]) -> None:
    assert cache.length == sum(len(part[0].k) for part in parts)
    for held, (k, v) in zip(cache.layers, joined(parts), strict=True):
        assert torch.equal(held.k, k)
        assert torch.equal(held.v, v)


@pytest.mark.usefixtures("_poisoned_memory")
def test_rows_come_back_in_the_order_in_which_they_came():
    cache, parts = ContextCache(), []
    for num_rows in (9, 1, 4, 0, 60, 3, 70, 1):  # beyond the room of several buffers
        parts.append(rows_of(num_rows))
        cache.append(parts[-1])
        assert_holds(cache, parts)


def test_a_few_rows_are_written_where_the_others_lie():
    cache = ContextCache()
    cache.append(rows_of(5))
    cache.append(rows_of(2))
    places = [layer.k.data_ptr() for layer in cache.layers]
    for _ in range(10):
        cache.append(rows_of(1))
    assert [layer.k.data_ptr() for layer in cache.layers] == places


def test_rows_set_from_outside_are_kept_and_continued():
    cache, parts = ContextCache(), [rows_of(5), rows_of(2)]
    for part in parts:
        cache.append(part)
    shorter = [ContextKV(layer.k[:5], layer.v[:5]) for layer in cache.layers]
    cache.layers = list(shorter)
    cache.append(parts[1])
    assert_holds(cache, parts)
    other = rows_of(4)
    cache.layers = list(other)  # of another buffer
    cache.append(parts[1])
    assert_holds(cache, [other, parts[1]])
    cache.layers = []
    cache.append(other)
    assert_holds(cache, [other])


def test_writing_into_a_cache_equals_appending():
    angles = torch.randn(4, WIDTH)
    raw = RawContext(
        keys=[torch.randn(4, HEADS, WIDTH) for _ in range(NUM_LAYERS)],
        values=[torch.randn(4, HEADS, WIDTH) for _ in range(NUM_LAYERS)],
        weights=[torch.randn(WIDTH) for _ in range(NUM_LAYERS)],
        eps=1e-6,
        cos=angles.cos(),
        sin=angles.sin(),
    )
    first = rows_of(3)
    appended, written = ContextCache(), ContextCache()
    for cache in (appended, written):
        cache.append(first)
    appended.append(context_kv(raw))
    write_context_kv(raw, *written.extend(raw.num_rows))
    assert_holds(written, [first, context_kv(raw)])
    assert_holds(appended, [first, context_kv(raw)])
