"""What `collect` would cost, before it starts: planned in full, measured on a sample.

    dflash-train collect recipe=smollm2 --dry-run

Tokens and disk are counted, since planning renders every call. Time and memory are measured: a few
batches from the shortest to the longest go through the target as they would, and what they took per
token stands for all. Nothing stays on disk.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dflash_data.collect.forward import compute_batch, stored_token_bytes
from dflash_data.collect.plan import CollectionPlan
from dflash_data.collect.stage import splits_to_collect
from dflash_train.config import DataConfig, RecipeConfig
from dflash_train.features.shard import write_encoded
from dflash_train.features.target import Target
from dflash_train.records.manifest import file_hash

_SAMPLED_BATCHES = 4
_SHARD_COPIES = 3  # a shard while it is computed, joined and written


@dataclass(kw_only=True)
class CollectionEstimate:
    """What collecting a run's features takes."""

    num_linked: int = 0
    """Calls whose features `regenerate` has left; they cost nothing."""
    num_calls: int = 0
    """Calls of the log that the target has to read."""
    num_rows: int = 0
    """Rows that serve them: a session's calls share one where their tokens agree."""
    num_tokens: int = 0
    """Tokens of those rows."""
    token_bytes: int = 0
    """Stored bytes of one token."""
    disk_bytes: int = 0
    memory_bytes: int = 0
    """Peak of this process, in main memory, and on a GPU if there is one, together."""
    seconds: float = 0.0
    """On one process like this one; planning apart."""

    def lines(self) -> list[str]:
        """Give it as lines to print."""
        return [
            f"calls: {self.num_calls} to read, {self.num_linked} linked from regenerate",
            f"tokens: {self.num_tokens} in {self.num_rows} rows",
            f"disk: {self.disk_bytes} bytes, {self.token_bytes} a token",
            f"memory: {self.memory_bytes} bytes",
            f"time: {self.seconds:.0f} s on one process",
        ]


@dataclass(kw_only=True)
class _Sample:
    """What the sampled batches took."""

    seconds: float = 0.0
    num_tokens: int = 0


def plan_collection(
    config: RecipeConfig, *, load_target: Callable[[], Target]
) -> CollectionEstimate:
    """Plan a collection in a temporary folder and measure a sample of it.

    Args:
        config: The recipe; `conversations` and `regenerated` of the run folder are read.
        load_target: Loads the target; called only if an answer has to run through it.
    """
    estimate = CollectionEstimate()
    sample = _Sample()
    for split in splits_to_collect(config, key="dry-run"):
        estimate.num_linked += len(split.linked_lines)
        if not split.has_answers():
            continue
        target = load_target()
        estimate.token_bytes = stored_token_bytes(target, config.data)
        with tempfile.TemporaryDirectory(prefix="dflash-plan-") as name:
            plan = split.make_plan(Path(name) / "plan", target)
            _add(estimate, plan)
            _measure(sample, plan, Path(name) / "shard", target=target, data=config.data)
    largest = min(config.data.shard_bytes, estimate.disk_bytes)
    estimate.memory_bytes = _peak_memory() + _SHARD_COPIES * largest
    if sample.num_tokens:
        estimate.seconds = estimate.num_tokens * sample.seconds / sample.num_tokens
    return estimate


def _add(estimate: CollectionEstimate, plan: CollectionPlan) -> None:
    estimate.num_calls += plan.counts.kept
    for shard in plan.shards:
        estimate.num_rows += sum(len(batch) for batch in shard.batches)
        estimate.num_tokens += shard.num_tokens
        estimate.disk_bytes += shard.num_bytes


def _measure(
    sample: _Sample, plan: CollectionPlan, path: Path, *, target: Target, data: DataConfig
) -> None:
    """Compute, write and hash a few batches, spread over the lengths, the longest one included."""
    batches = [batch for shard in plan.shards for batch in shard.batches]
    if not batches:
        return
    compute_batch(plan, batches[0], target=target, data=data)  # the first pass of all is slower
    step = max(1, len(batches) // _SAMPLED_BATCHES)
    for batch in batches[::-1][::step][:_SAMPLED_BATCHES]:
        started = time.perf_counter()
        part = compute_batch(plan, batch, target=target, data=data)
        write_encoded(path, [part])
        file_hash(path)
        sample.seconds += time.perf_counter() - started
        sample.num_tokens += sum(part.lengths)


def _peak_memory() -> int:
    """Give the most memory that this process has held so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + on_gpu
