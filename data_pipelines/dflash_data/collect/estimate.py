"""What `collect` would cost, before it starts: planned in full, measured on a sample.

    dflash-train collect recipe=smollm2 --dry-run

Tokens and disk are counted, since planning renders every call. Time and memory are measured: a few
batches from the shortest to the longest go through the target as they would, and what they took per
token stands for all. Where vLLM runs the target, it is asked for its release and not started: then
time and memory stay unknown. Nothing stays on disk.
"""

import functools
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dflash_data.collect.forward import FeatureReader, PlannedBatch
from dflash_data.collect.plan import CollectionPlan
from dflash_data.collect.stage import open_reader, splits_to_collect
from dflash_data.collect.vllm_reader import engine_versions
from dflash_train.config import CollectEngine, RecipeConfig
from dflash_train.features.shard import write_encoded
from dflash_train.features.target_text import WrittenTarget
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
    """Of the features, and of those on their way from vLLM."""
    memory_bytes: int | None = None
    """Peak of this process, in main memory, and on a GPU if there is one, together; None where
    vLLM runs the target."""
    seconds: float | None = None
    """On one process like this one, planning apart; None where vLLM runs the target."""
    vllm_version: str | None = None
    """Release of the vLLM that runs the target; None where this process does."""

    def lines(self) -> list[str]:
        """Give it as lines to print."""
        lines = [
            f"calls: {self.num_calls} to read, {self.num_linked} linked from regenerate",
            f"tokens: {self.num_tokens} in {self.num_rows} rows",
            f"disk: {self.disk_bytes} bytes, {self.token_bytes} a token",
        ]
        if self.memory_bytes is not None:
            lines.append(f"memory: {self.memory_bytes} bytes")
        if self.seconds is not None:
            lines.append(f"time: {self.seconds:.0f} s on one process")
        if self.vllm_version is not None:
            lines.append(f"engine: vLLM {self.vllm_version}, whose memory and time are not known")
        return lines


@dataclass(kw_only=True)
class _Sample:
    """What the sampled batches took."""

    seconds: float = 0.0
    num_tokens: int = 0

    def seconds_for(self, num_tokens: int) -> float:
        """Give what so many tokens would take; 0 where nothing had to be sampled."""
        return num_tokens * self.seconds / self.num_tokens if self.num_tokens else 0.0


def plan_collection(
    config: RecipeConfig, *, load_target: Callable[[], WrittenTarget]
) -> CollectionEstimate:
    """Plan a collection in a temporary folder and measure a sample of it.

    Args:
        config: The recipe; `conversations` and `regenerated` of the run folder are read.
        load_target: Loads the target; called only if an answer has to run through it. Where vLLM
            runs it, its tokenizer is enough.
    """
    in_process = config.data.collect_engine is not CollectEngine.vllm
    load_reader = functools.cache(lambda: open_reader(config, load_target()))
    estimate = CollectionEstimate()
    sample = _Sample()
    for split in splits_to_collect(config, key="dry-run"):
        estimate.num_linked += len(split.linked_lines)
        if not split.has_answers():
            continue
        reader = load_reader()
        estimate.token_bytes = reader.token_bytes
        with tempfile.TemporaryDirectory(prefix="dflash-plan-") as name:
            plan = split.make_plan(Path(name) / "plan", reader)
            _add(estimate, plan)
            if in_process:
                _measure(sample, plan, Path(name) / "shard", reader)
    if in_process:
        largest = min(config.data.shard_bytes, estimate.disk_bytes)
        estimate.memory_bytes = _peak_memory() + _SHARD_COPIES * largest
        estimate.seconds = sample.seconds_for(estimate.num_tokens)
    elif estimate.num_calls:
        estimate.disk_bytes += load_reader().scratch_bytes(estimate.num_tokens)
        estimate.vllm_version = engine_versions(config.data)["vllm"]
    return estimate


def _add(estimate: CollectionEstimate, plan: CollectionPlan) -> None:
    estimate.num_calls += plan.counts.kept
    for shard in plan.shards:
        estimate.num_rows += sum(len(batch) for batch in shard.batches)
        estimate.num_tokens += shard.num_tokens
        estimate.disk_bytes += shard.num_bytes


def _measure(sample: _Sample, plan: CollectionPlan, path: Path, reader: FeatureReader) -> None:
    """Compute, write and hash a few batches, spread over the lengths, the longest one included."""
    places = [batch for shard in plan.shards for batch in shard.batches]
    if not places:
        return
    step = max(1, len(places) // _SAMPLED_BATCHES)
    chosen = [places[0], *places[::-1][::step][:_SAMPLED_BATCHES]]
    parts = reader.read([PlannedBatch(plan=plan, places=batch) for batch in chosen])
    next(parts)  # the first pass of all is slower
    started = time.perf_counter()
    for part in parts:
        write_encoded(path, [part])
        file_hash(path)
        sample.num_tokens += sum(part.lengths)
    sample.seconds += time.perf_counter() - started


def _peak_memory() -> int:
    """Give the most memory that this process has held so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + on_gpu
