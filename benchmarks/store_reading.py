"""What a feature store costs: bytes per token, and tokens per second in order and at random.

Before each pass the pages of its shards are dropped from the kernel's cache; the bytes that the
pass then fetched from the disk are reported beside its time. Linux only.
"""

import gc
import os
import random
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from dflash_train.features.store import FeatureStore
from dflash_train.records.manifest import Manifest


@dataclass(kw_only=True)
class Size:
    """The size of one split of a store."""

    num_tokens: int
    """Stored tokens; calls that share a row count once."""
    num_bytes: int
    """Of all shard files."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the files over stored tokens, headers and offsets included."""
        return self.num_bytes / self.num_tokens


@dataclass(kw_only=True)
class ReadingSpeed:
    """Median speeds of reading every row of a split once, in stored order and at random."""

    num_tokens: int
    """Tokens read in one pass."""
    sequential: float
    """Tokens per second."""
    random: float
    """Tokens per second."""
    sequential_disk_bytes: int
    """Fetched from the disk in one pass: 0 where the system does not say."""
    random_disk_bytes: int

    @property
    def ratio(self) -> float:
        """Random over sequential."""
        return self.random / self.sequential


@dataclass(kw_only=True)
class _Pass:
    seconds: float
    num_tokens: int
    disk_bytes: int


def size_of(folder: Path) -> Size:
    """Measure one split from its files.

    Args:
        folder: `features/<split>` as `collect` computed it.
    """
    manifest = Manifest.read(folder)
    assert manifest is not None, "collect has just finished"
    shards = [entry for entry in manifest.outputs if entry.path.endswith(".safetensors")]
    return Size(
        num_tokens=sum(entry.tokens or 0 for entry in shards),
        num_bytes=sum((folder / entry.path).stat().st_size for entry in shards),
    )


def reading_speeds(folders: dict[str, Path], *, num_rounds: int) -> dict[str, ReadingSpeed]:
    """Read all stores in turns, in order and at random.

    Args:
        folders: `features/<split>` by name of the store.
        num_rounds: Passes of each kind over each store; medians count.
    """
    passes: dict[tuple[str, bool], list[_Pass]] = {}
    for number in range(num_rounds):
        for name, folder in folders.items():
            for is_random in (False, True) if number % 2 == 0 else (True, False):
                one = _read_once(folder, seed=number if is_random else None)
                passes.setdefault((name, is_random), []).append(one)
    return {name: _summarise(passes[name, False], passes[name, True]) for name in folders}


def drop_cached_pages(folder: Path) -> None:
    """Ask the kernel to forget a store's shards; nobody may have them mapped."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # a page that is not on the disk yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _read_once(folder: Path, *, seed: int | None) -> _Pass:
    """Read every row, in stored order or shuffled by a seed."""
    drop_cached_pages(folder)
    store = FeatureStore.open(folder, verify=False)
    places = list(range(len(store)))
    if seed is not None:
        random.Random(seed).shuffle(places)
    disk_before, began = _disk_bytes(), time.perf_counter()
    num_tokens = 0
    for place in places:
        # Of a mapped file the copy is the read; training copies rows into a batch as well.
        num_tokens += len(store[place].features.clone())
    seconds = time.perf_counter() - began
    disk_bytes = _disk_bytes() - disk_before
    del store
    gc.collect()  # the next pass can drop only pages that nobody maps
    return _Pass(seconds=seconds, num_tokens=num_tokens, disk_bytes=disk_bytes)


def _summarise(in_order: list[_Pass], at_random: list[_Pass]) -> ReadingSpeed:
    def speed(passes: list[_Pass]) -> float:
        return statistics.median(each.num_tokens / each.seconds for each in passes)

    def fetched(passes: list[_Pass]) -> int:
        return int(statistics.median(each.disk_bytes for each in passes))

    return ReadingSpeed(
        num_tokens=in_order[0].num_tokens,
        sequential=speed(in_order),
        random=speed(at_random),
        sequential_disk_bytes=fetched(in_order),
        random_disk_bytes=fetched(at_random),
    )


def _disk_bytes() -> int:
    """Give the bytes that the kernel has fetched from disks for this process so far."""
    found = re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
