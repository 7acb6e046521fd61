"""Micro-batches made ahead, so that the target reads the next rows while the drafter learns.

With `data.features=online` a micro-batch costs a target pass. A thread makes the next few of this
rank's packs; how far it has come is no state of the run, since what it makes is a function of the
pack alone. On a GPU it works on a stream of its own.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch

from dflash_train.config import CollectEngine, FeaturesFrom, Precision, RecipeConfig, require
from dflash_train.features.row_source import RowSource
from dflash_train.training.batching import (
    Batches,
    BatchSource,
    BlockSettings,
    Pack,
    TrainingBatch,
)

PREFETCHED = 2
"""Micro-batches made ahead where the recipe leaves it open and it pays: one in work, one done."""


def open_batches(
    rows: RowSource,
    settings: BlockSettings,
    *,
    config: RecipeConfig,
    num_ranks: int,
    device: torch.device,
) -> Batches:
    """Give the micro-batches of a run.

    Args:
        rows: The training split.
        settings: How blocks are drawn.
        config: The recipe.
        num_ranks: Processes of the launch, which take turns on the stream of packs.
        device: The drafter's.

    Raises:
        ValueError: No row can be trained on, or the recipe cannot prefetch here.
    """
    source = BatchSource(rows, settings, pack_tokens=config.training.pack_tokens)
    depth = prefetch_depth(config, device)
    return ReadAhead(source, depth=depth, num_ranks=num_ranks, device=device) if depth else source


def prefetch_depth(config: RecipeConfig, device: torch.device) -> int:
    """Give how many micro-batches are made ahead; 0 where features are stored.

    Raises:
        ValueError: A CPU is to prefetch and to multiply in bf16: that switch belongs to the whole
            process, so the target's rounding would depend on what the drafter does meanwhile.
    """
    if config.data.features is FeaturesFrom.stored:
        return 0
    depth = config.data.online.prefetch
    shares_cpu = device.type == "cpu" and config.data.collect_engine is CollectEngine.transformers
    if depth is None:
        return 0 if shares_cpu else PREFETCHED
    require(
        depth == 0 or not shares_cpu or config.launch.mixed_precision is Precision.no,
        f"data.online.prefetch (={depth}) and launch.mixed_precision (=bf16) exclude each other "
        "on a CPU, where a run could not be repeated. Set data.online.prefetch to 0.",
    )
    return depth


class ReadAhead:
    """Another source's micro-batches, made in a thread before they are asked for; a `Batches`."""

    def __init__(
        self, source: Batches, *, depth: int, num_ranks: int, device: torch.device
    ) -> None:
        """Make nothing before the first pack is asked for.

        Args:
            source: What makes them.
            depth: Micro-batches made or in work, at most, beside the one that is in use.
            num_ranks: Every so manieth pack is this rank's.
            device: The drafter's.
        """
        self._source = source
        self._depth = depth
        self._num_ranks = num_ranks
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="online-features")
        self._upcoming: Iterator[Pack] = iter(())
        self._ahead: deque[tuple[Pack, Future[TrainingBatch]]] = deque()

    def stream(self, *, epoch: int, position: int) -> Iterator[Pack]:
        """Yield the packs of all ranks without end."""
        return self._source.stream(epoch=epoch, position=position)

    def load(self, pack: Pack) -> TrainingBatch:
        """Give a pack's micro-batch and have the next ones of this rank made meanwhile."""
        if not self._ahead or self._ahead[0][0] != pack:
            self._go_to(pack)
        _, made = self._ahead.popleft()
        self._make_more()
        batch = made.result()
        if batch.target_features.is_cuda:  # freed after the drafter's use, not after the thread's
            batch.target_features.record_stream(torch.cuda.current_stream())
        return batch

    def _go_to(self, pack: Pack) -> None:
        """Begin at a pack, the first one of a run or of a place in the stream."""
        for _, unwanted in self._ahead:
            unwanted.cancel()
        self._ahead.clear()
        onward = self._source.stream(epoch=pack.epoch, position=pack.position)
        self._upcoming = islice(onward, 0, None, self._num_ranks)
        self._make_more()

    def _make_more(self) -> None:
        while len(self._ahead) < self._depth:
            pack = next(self._upcoming)
            self._ahead.append((pack, self._worker.submit(self._make, pack)))

    def _make(self, pack: Pack) -> TrainingBatch:
        if self._stream is None:
            return self._source.load(pack)
        with torch.cuda.stream(self._stream):
            batch = self._source.load(pack)
            self._stream.synchronize()
        return batch
