"""Micro-batches of rows that the target reads: equal to a store's, and made ahead of their step."""

import gc
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dflash_train.config import FeaturesFrom, OnlineSettings, Precision
from dflash_train.features.target import ReadAnswer, Target
from dflash_train.testing import assert_close
from dflash_train.training.batching import BatchSource, BlockSettings, Pack, TrainingBatch
from dflash_train.training.online import ReadAhead, open_batches
from tests.test_train.conftest import TinyRecipe
from tests.test_train.twin_splits import TwinSplit

BLOCKS = BlockSettings(block_size=4, num_anchors=4, seed=0)
CPU = torch.device("cpu")


def test_packs_and_anchors_are_those_of_the_store(train_twins: TwinSplit, target32: Target) -> None:
    sources = [
        BatchSource(rows, BLOCKS, pack_tokens=64)
        for rows in (train_twins.stored, train_twins.online(target32))
    ]
    streams = [source.stream(epoch=0, position=0) for source in sources]
    for packs in islice(zip(*streams, strict=True), 12):
        assert packs[0] == packs[1]
        want, got = (source.load(pack) for source, pack in zip(sources, packs, strict=True))
        assert_same_blocks(got, want)
        assert_close("features", got.target_features, want.target_features, 1e-5)


def assert_same_blocks(got: TrainingBatch, want: TrainingBatch) -> None:
    for name in ("anchor_ids", "labels", "label_mask", "num_tokens"):
        assert torch.equal(*(torch.as_tensor(getattr(each, name)) for each in (got, want))), name
    assert torch.equal(got.blocks.anchor_positions, want.blocks.anchor_positions)
    assert got.blocks.context_offsets == want.blocks.context_offsets
    assert got.blocks.block_offsets == want.blocks.block_offsets


class RecordingSource(BatchSource):
    """A source that remembers which packs it made."""

    made: list[Pack]

    def load(self, pack: Pack) -> TrainingBatch:
        self.made.append(pack)
        return super().load(pack)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_bounded_number_of_batches_is_made_ahead_for_this_rank(
    train_twins: TwinSplit, num_ranks: int
) -> None:
    source = RecordingSource(train_twins.stored, BLOCKS, pack_tokens=64)
    source.made = []
    ahead = ReadAhead(source, depth=2, num_ranks=num_ranks, device=CPU)
    own = list(islice(ahead.stream(epoch=0, position=1), 0, 9 * num_ranks, num_ranks))
    plain = BatchSource(train_twins.stored, BLOCKS, pack_tokens=64)
    for number, pack in enumerate(own[:6], start=1):
        assert_same_blocks(ahead.load(pack), plain.load(pack))
        assert len(source.made) <= number + 2
    ahead.load(own[0])  # another place in the stream, as a second trainer would ask for
    assert ahead.load(own[1]).num_tokens == plain.load(own[1]).num_tokens
    assert source.made[:6] == own[:6]


def test_an_error_in_the_thread_comes_up_in_the_step(
    train_twins: TwinSplit, tiny_recipe: TinyRecipe
) -> None:
    class Broken:
        def read_answers(self, *_: Any, **__: Any) -> list[ReadAnswer]:
            raise ValueError("the target is gone")

    config = tiny_recipe(Path("unused"))
    online = OnlineSettings(prefetch=2)
    config.data = replace(config.data, features=FeaturesFrom.online, online=online)
    rows = train_twins.online(Broken())
    batches = open_batches(rows, BLOCKS, config=config, num_ranks=1, device=CPU)
    assert isinstance(batches, ReadAhead)
    with pytest.raises(ValueError, match="the target is gone"):
        batches.load(next(batches.stream(epoch=0, position=0)))


def test_a_cpu_prefetches_only_where_products_are_float32(
    train_twins: TwinSplit, tiny_recipe: TinyRecipe
) -> None:
    config = tiny_recipe(Path("unused"))
    config.launch.mixed_precision = Precision.bf16
    open_them = partial(
        open_batches, train_twins.stored, BLOCKS, config=config, num_ranks=1, device=CPU
    )
    assert isinstance(open_them(), BatchSource)
    config.data = replace(config.data, features=FeaturesFrom.online)
    assert isinstance(open_them(), BatchSource), "on a CPU nothing is made ahead unless asked for"
    config.data.online = OnlineSettings(prefetch=2)
    with pytest.raises(ValueError, match=r"data\.online\.prefetch \(=2\)"):
        open_them()


def alive_bytes() -> int:
    """Sum the bytes of all tensors that Python still holds."""
    gc.collect()
    return sum(each.nbytes for each in gc.get_objects() if type(each) is torch.Tensor)


def test_epochs_leave_nothing_behind(train_twins: TwinSplit, target32: Target) -> None:
    source = BatchSource(train_twins.online(target32), BLOCKS, pack_tokens=64)
    ahead = ReadAhead(source, depth=2, num_ranks=1, device=CPU)
    stream = ahead.stream(epoch=0, position=0)
    held: list[int] = []
    made: list[int] = []
    for epoch in range(12):
        made.append(0)
        while (pack := next(stream)).epoch == epoch:
            made[-1] += ahead.load(pack).target_features.nbytes
        held.append(alive_bytes())
    # What is read ahead and computed differs from look to look, by less than three epochs have.
    assert max(held[2:]) - min(held[2:]) < 3 * min(made), (held, made)


@pytest.mark.gpu
def test_a_stream_of_its_own_gives_the_batches_of_none(
    train_twins: TwinSplit, target32: Target
) -> None:
    device = torch.device("cuda", 0)
    nn.Module.to(target32.model, device)
    target = Target(
        target32.model, target32.tokenizer, target32.target_layer_ids,
        name="tiny", revision="gpu",
    )  # fmt: skip
    try:
        rows = train_twins.online(target, device=device)
        source = BatchSource(rows, BLOCKS, pack_tokens=64)
        ahead = ReadAhead(source, depth=2, num_ranks=1, device=device)
        packs = list(islice(source.stream(epoch=0, position=0), 30))
        want = [source.load(pack) for pack in packs]
        busy = torch.zeros(2000, 2000, device=device)
        for pack, batch in zip(packs, want, strict=True):
            got = ahead.load(pack)
            busy = busy @ busy  # the drafter's own stream has work
            assert torch.equal(got.target_features, batch.target_features)
    finally:
        nn.Module.to(target32.model, CPU)
