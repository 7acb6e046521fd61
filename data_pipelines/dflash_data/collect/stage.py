"""Answered conversations become the feature store that training and replay read.

    dflash-train collect recipe=smollm2
    accelerate launch -m dflash_train collect recipe=smollm2

Answers that the target wrote in `regenerate` bring their features along and are linked, not
computed again. Answers that the log already holds and that are on-policy run through the target
once: the first process renders them and stores a plan (`collection_plan.py`), every process takes
its share of the planned shards, the first one closes the books. One folder per split, each with its
own manifest (`collected_split.py`).
"""

import functools
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from dflash_data.collect.forward import compute_batch
from dflash_data.collect.plan import PlannedShard
from dflash_data.collect.split import FOLDER, CollectedSplit
from dflash_data.drops import all_reasons
from dflash_data.regenerate.stage import splits_in
from dflash_train.config import DataConfig, RecipeConfig, UnavailableError
from dflash_train.features.target import Target
from dflash_train.records.manifest import FILE_NAME, Counts, FileEntry, Manifest
from dflash_train.training.accelerator import Accelerator


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


def collect(
    config: RecipeConfig,
    *,
    load_target: Callable[[], Target],
    manifest: Manifest,
    accelerator: Accelerator | None = None,
) -> Manifest:
    """Build `run_dir/features/<split>` for every split.

    Args:
        config: The recipe; `conversations` and `regenerated` of the run folder are read.
        load_target: Loads the target; called only if an answer has to run through it.
        manifest: Prepared by the caller; the first process completes it and writes it last.
        accelerator: The processes of this launch, all of which call this; None is this one alone.

    Raises:
        ValueError: A shard of `regenerate` or a stored plan is damaged.
        UnavailableError: The disk would not hold the shards; none has been written.
    """
    ranks = Ranks.of(accelerator)
    load_target = functools.cache(load_target)
    splits = splits_to_collect(config, key=manifest.key)
    if ranks.is_main:
        _prepare(config, splits, load_target)
    ranks.wait()
    work = [_Work(split=split, shard=shard) for split in splits for shard in split.unfinished()]
    ranks.wait()  # all have listed the same work before the first of it is done
    _compute(
        work[ranks.index :: ranks.number], load_target, config.data, shows_progress=ranks.is_main
    )
    ranks.wait()
    if ranks.is_main:
        _close_books(config, splits, manifest)
    ranks.wait()
    return manifest


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
    config: RecipeConfig, splits: list[CollectedSplit], load_target: Callable[[], Target]
) -> None:
    """Do what one process does for all: check the source, link, plan, look at the disk."""
    regenerated = config.run_dir / "regenerated"
    source_manifest = Manifest.read(regenerated)
    if source_manifest is not None:
        source_manifest.verify_outputs(regenerated)  # a damaged shard must not get a new checksum
    for split in splits:
        split.prepare(load_target)
    needed = sum(shard.num_bytes for split in splits for shard in split.unfinished())
    check_disk(needed, config.run_dir)
    for split in splits:
        split.link()


def _compute(
    work: list[_Work],
    load_target: Callable[[], Target],
    data: DataConfig,
    *,
    shows_progress: bool,
) -> None:
    """Compute shards; while the target reads the next one, a thread writes the last."""
    num_tokens = sum(each.shard.num_tokens for each in work)
    with (
        tqdm(
            total=num_tokens, desc="collect", unit="token", file=sys.stderr,
            disable=not shows_progress,
        ) as progress,
        ThreadPoolExecutor(max_workers=1) as writer,
    ):  # fmt: skip
        written = None
        for each in work:
            plan = each.split.plan
            assert plan is not None, "only a plan has shards"
            parts = []
            for batch in each.shard.batches:
                parts.append(compute_batch(plan, batch, target=load_target(), data=data))
                progress.update(sum(parts[-1].lengths))
            if written is not None:
                written.result()  # one shard waits at most, and errors come up
            written = writer.submit(each.split.write, each.shard, parts)
        if written is not None:
            written.result()


def _close_books(config: RecipeConfig, splits: list[CollectedSplit], manifest: Manifest) -> None:
    folder = config.run_dir / FOLDER
    counts = Counts(dropped=all_reasons({}))
    manifest.details = {"teacher_top_k": config.data.teacher_top_k}
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
    manifest.write(folder)
