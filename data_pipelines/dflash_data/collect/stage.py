"""Answered conversations become the feature store that training and replay read.

    dflash-train collect recipe=smollm2
    accelerate launch -m dflash_train collect recipe=smollm2
    dflash-train collect recipe=smollm2 data.collect_engine=vllm data.vllm_python=VENV/bin/python

Answers that the target wrote in `regenerate` bring their features along and are linked, not
computed again. Answers that the log already holds and that are on-policy run through the target
once: the first process renders them and stores a plan (`plan.py`), every process takes its share of
the planned shards, the first one closes the books. One folder per split, each with its own manifest
(`split.py`). What runs the target is a `FeatureReader`: this process (`forward.py`) or vLLM
(`vllm_reader.py`). With `data.features=online` none does: shards hold token ids and masks alone,
and `train` has the target read them.
"""

import contextlib
import functools
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from dflash_data.collect.forward import FeatureReader, PlannedBatch, TargetReader, TokenReader
from dflash_data.collect.plan import PlannedShard
from dflash_data.collect.split import FOLDER, CollectedSplit
from dflash_data.collect.vllm_reader import VllmReader, engine_versions, require_one_feeder
from dflash_data.drops import all_reasons
from dflash_data.regenerate.stage import splits_in
from dflash_train.config import CollectEngine, FeaturesFrom, RecipeConfig, UnavailableError
from dflash_train.features.store import WITHOUT_FEATURES
from dflash_train.features.target import Target
from dflash_train.features.target_text import WrittenTarget
from dflash_train.records.manifest import FILE_NAME, Counts, FileEntry, Manifest
from dflash_train.training.accelerator import Accelerator

CAPTURE_FOLDER = "capture"
"""vLLM's log and the features on their way from it, beside the splits while it runs."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a launch and which one this is."""

    index: int = 0
    number: int = 1
    wait: Callable[[], object] = lambda: None
    """Return once every process has called it."""

    @classmethod
    def of(cls, accelerator: Accelerator | None) -> "Ranks":
        """Take them from accelerate; None is one process alone."""
        if accelerator is None:
            return cls()
        return cls(
            index=accelerator.process_index,
            number=accelerator.num_processes,
            wait=accelerator.wait_for_everyone,
        )

    @property
    def is_main(self) -> bool:
        """Whether this process plans, shows progress and closes the books."""
        return self.index == 0


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One shard to compute."""

    split: CollectedSplit
    shard: PlannedShard

    def batches(self) -> list[PlannedBatch]:
        """List the batches of the shard, in order."""
        plan = self.split.plan
        assert plan is not None, "only a plan has shards"
        return [PlannedBatch(plan=plan, places=places) for places in self.shard.batches]


def collect(
    config: RecipeConfig,
    *,
    load_target: Callable[[], WrittenTarget],
    manifest: Manifest,
    accelerator: Accelerator | None = None,
) -> Manifest:
    """Build `run_dir/features/<split>` for every split.

    Args:
        config: The recipe; `conversations` and `regenerated` of the run folder are read.
        load_target: Loads the target; called only if an answer has to run through it. Where vLLM
            or `train` runs it, its tokenizer is enough (`TargetText`).
        manifest: Prepared by the caller; the first process completes it and writes it last.
        accelerator: The processes of this launch, all of which call this; None is this one alone.

    Raises:
        ValueError: A shard of `regenerate` or a stored plan is damaged, or vLLM is to run in
            several processes.
        UnavailableError: The disk would not hold the shards, and none has been written; or vLLM
            cannot start or stopped.
    """
    ranks = Ranks.of(accelerator)
    require_one_feeder(config.data, num_processes=ranks.number)
    load_reader = functools.cache(lambda: open_reader(config, load_target()))
    splits = splits_to_collect(config, key=manifest.key)
    if ranks.is_main:
        _prepare(config, splits, load_reader)
    ranks.wait()
    work = [_Work(split=split, shard=shard) for split in splits for shard in split.unfinished()]
    ranks.wait()  # all have listed the same work before the first of it is done
    _compute(work[ranks.index :: ranks.number], load_reader, shows_progress=ranks.is_main)
    ranks.wait()
    if ranks.is_main:
        _close_books(config, splits, manifest)
    ranks.wait()
    return manifest


def open_reader(config: RecipeConfig, target: WrittenTarget) -> FeatureReader:
    """Give what runs the target, as the recipe has it.

    Args:
        config: The recipe.
        target: The loaded target; where vLLM or `train` runs it, its tokenizer is enough.
    """
    if config.data.features is FeaturesFrom.online:
        return TokenReader(target)
    if config.data.collect_engine is CollectEngine.vllm:
        return VllmReader(config, target, folder=config.run_dir / FOLDER / CAPTURE_FOLDER)
    assert isinstance(target, Target), "only vLLM can do without its weights"
    return TargetReader(target, config.data)


def splits_to_collect(config: RecipeConfig, *, key: str) -> list[CollectedSplit]:
    """List the splits of a run.

    Args:
        config: The recipe.
        key: Plans and shards that another key left behind are not used.
    """
    names = splits_in(config.run_dir / "conversations")
    return [CollectedSplit(config, name, key=key) for name in names]


def check_disk(needed: int, folder: Path) -> None:
    """Raise UnavailableError unless the disk of an existing folder has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UnavailableError(
            f"{folder}: the features take {needed} bytes, and {free} are free. Set "
            "data.features_dtype=float8_e4m3fn, lower drafter.num_taps, or give runs_dir=DIR on "
            "another disk."
        )


def _prepare(
    config: RecipeConfig, splits: list[CollectedSplit], load_reader: Callable[[], FeatureReader]
) -> None:
    """Do what one process does for all: check the source, link, plan, look at the disk."""
    regenerated = config.run_dir / "regenerated"
    source_manifest = Manifest.read(regenerated)
    if source_manifest is not None:
        source_manifest.verify_outputs(regenerated)  # a damaged shard must not get a new checksum
    for split in splits:
        split.prepare(load_reader)
    shards = [shard for split in splits for shard in split.unfinished()]
    if shards:
        beside = load_reader().scratch_bytes(sum(shard.num_tokens for shard in shards))
        check_disk(sum(shard.num_bytes for shard in shards) + beside, config.run_dir)
    for split in splits:
        split.link()


def _compute(
    work: list[_Work], load_reader: Callable[[], FeatureReader], *, shows_progress: bool
) -> None:
    """Compute shards; while the target reads the next one, a thread writes the last."""
    if not work:
        return
    batches = [batch for each in work for batch in each.batches()]
    num_tokens = sum(each.shard.num_tokens for each in work)
    with (
        tqdm(
            total=num_tokens, desc="collect", unit="token", file=sys.stderr,
            disable=not shows_progress,
        ) as progress,
        ThreadPoolExecutor(max_workers=1) as writer,
        contextlib.closing(load_reader().read(batches)) as reader,
    ):  # fmt: skip
        written = None
        for each in work:
            parts = []
            for part in islice(reader, len(each.shard.batches)):
                parts.append(part)
                progress.update(sum(part.lengths))
            if written is not None:
                written.result()  # one shard waits at most, and errors come up
            written = writer.submit(each.split.write, each.shard, parts)
        for _part in reader:  # at its end it clears up
            raise RuntimeError("more batches came than were planned.")
        if written is not None:
            written.result()


def _close_books(config: RecipeConfig, splits: list[CollectedSplit], manifest: Manifest) -> None:
    folder = config.run_dir / FOLDER
    counts = Counts(dropped=all_reasons({}))
    manifest.details = {
        "teacher_top_k": config.data.teacher_top_k,
        "engine": config.data.collect_engine.value,  # of the shards that are not linked
    }
    if config.data.features is FeaturesFrom.online:
        manifest.details |= WITHOUT_FEATURES
    if any(split.shards for split in splits):
        manifest.versions = manifest.versions | engine_versions(config.data)
    for split in splits:
        own = split.close_books(manifest)
        if own is None:
            continue
        assert own.counts is not None
        counts.read += own.counts.read
        counts.kept += own.counts.kept
        for reason, number in own.counts.dropped.items():
            counts.dropped[reason] += number
        manifest.outputs.append(FileEntry.of(split.folder / FILE_NAME, folder))
        manifest.outputs += [
            replace(entry, path=f"{split.name}/{entry.path}") for entry in own.outputs
        ]
    manifest.counts = counts
    shutil.rmtree(folder / CAPTURE_FOLDER, ignore_errors=True)  # what a kill may have left
    manifest.write(folder)
