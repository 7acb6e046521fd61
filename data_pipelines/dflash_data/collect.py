"""Answered conversations become the feature store that training and replay read.

    dflash-train collect recipe=smollm2

Answers that the target wrote in `regenerate` bring their features along and are linked, not
computed again. Answers that the log already holds and that are on-policy run through the target
once, in batches of similar length. One folder per split, each with its own manifest.
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from dflash_data.drops import DropReason
from dflash_data.feature_rows import exact_ids, feature_row, index_line
from dflash_data.regenerate import needs_answer, splits_in
from dflash_train.config import DataConfig, RecipeConfig
from dflash_train.features.store import INDEX_NAME, IndexLine, read_index, write_index, write_shard
from dflash_train.features.target import Target
from dflash_train.records.chat_template import (
    NoSupervisedTokenError,
    RenderedRow,
    UnstableBoundaryError,
    render_row,
)
from dflash_train.records.conversation import Conversation, read_split
from dflash_train.records.manifest import FILE_NAME, Counts, FileEntry, Manifest, atomic_path

FOLDER = "features"


def collect(
    config: RecipeConfig, *, load_target: Callable[[], Target], manifest: Manifest
) -> Manifest:
    """Build `run_dir/features/<split>` for every split.

    Args:
        config: The recipe; `conversations` and `regenerated` of the run folder are read.
        load_target: Loads the target; called only if an answer has to run through it.
        manifest: Prepared by the caller; completed and written last.
    """
    folder = config.run_dir / FOLDER
    conversations = config.run_dir / "conversations"
    regenerated = config.run_dir / "regenerated"
    source_manifest = Manifest.read(regenerated)
    if source_manifest is not None:
        source_manifest.verify_outputs(regenerated)  # a damaged shard must not get a new checksum
    counts = Counts(dropped={reason.value: 0 for reason in DropReason})
    manifest.details = {"teacher_top_k": config.data.teacher_top_k}
    for split in splits_in(conversations):
        answered = [
            record for record in read_split(conversations, split) if not needs_answer(record)
        ]
        source = regenerated / FOLDER / split
        if not answered and not (source / INDEX_NAME).exists():
            continue
        stage = _SplitCollector(folder / split, config.data, manifest, load_target)
        stage.link(source)
        stage.compute(answered)
        split_counts = stage.finish()
        counts.read += split_counts.read
        counts.kept += split_counts.kept
        for reason, number in split_counts.dropped.items():
            counts.dropped[reason] += number
        manifest.outputs += [FileEntry.of(folder / split / FILE_NAME, folder)]
        manifest.outputs += [
            replace(entry, path=f"{split}/{entry.path}") for entry in stage.manifest.outputs
        ]
    manifest.counts = counts
    manifest.write(folder)
    return manifest


class _SplitCollector:
    """Fills the folder of one split: linked shards first, then computed ones."""

    def __init__(
        self,
        folder: Path,
        data: DataConfig,
        manifest: Manifest,
        load_target: Callable[[], Target],
    ) -> None:
        self.folder = folder
        self.data = data
        self.manifest = replace(manifest, outputs=[], counts=None)
        self.load_target = load_target
        self.lines: list[IndexLine] = []
        self.counts = Counts(dropped={reason.value: 0 for reason in DropReason})
        folder.mkdir(parents=True, exist_ok=True)

    def link(self, source: Path) -> None:
        """Take over the shards of `regenerate`, without a copy where the file system allows."""
        if not (source / INDEX_NAME).exists():
            return
        self.lines = read_index(source)
        self.counts.read = self.counts.kept = len(self.lines)
        for name in sorted({line.shard for line in self.lines}):
            with atomic_path(self.folder / name) as partial:
                try:
                    os.link(source / name, partial)
                except OSError:  # another file system, or one without links
                    shutil.copyfile(source / name, partial)

    def compute(self, answered: list[Conversation]) -> None:
        """Run answered conversations through the target; a shard that exists is not done again."""
        if not answered:
            return
        target = self.load_target()
        rows = self._render(answered, target)
        rows.sort(key=lambda record: (len(_ids(record)), record.id))
        size = self.data.batch_size
        starts = range(0, len(rows), size)
        for number, first in enumerate(tqdm(starts, desc="collect", unit="batch", file=sys.stderr)):
            batch = rows[first : first + size]
            path = self.folder / f"collected-{number:05d}.safetensors"
            if not path.exists():
                self._write(path, batch, target)
            self.lines += [
                index_line(record, self.data, shard=path.name, row=row)
                for row, record in enumerate(batch)
            ]

    def _write(self, path: Path, batch: list[Conversation], target: Target) -> None:
        answers = target.read_answers(
            [_ids(record) for record in batch],
            prompt_lengths=[len(exact_ids(record)[0]) for record in batch],
            teacher_top_k=self.data.teacher_top_k,
        )
        rows = [
            feature_row(record, answer.features, self.data, teacher=answer.teacher)
            for record, answer in zip(batch, answers, strict=True)
        ]
        write_shard(path, rows, dtype=getattr(torch, self.data.features_dtype.value))

    def finish(self) -> Counts:
        """Write index and manifest."""
        write_index(self.folder, self.lines)
        self.manifest.counts = self.counts
        shards = sorted({line.shard for line in self.lines})
        self.manifest.outputs = [
            FileEntry.of(self.folder / name, self.folder) for name in [*shards, INDEX_NAME]
        ]
        self.manifest.write(self.folder)
        return self.counts

    def _render(self, answered: list[Conversation], target: Target) -> list[Conversation]:
        """Fix the token ids of each record, or count why it has none."""
        kept = []
        for record in answered:
            self.counts.read += 1
            try:
                row = render_row(target.tokenizer, record, stop_token_ids=target.stop_token_ids)
            except UnstableBoundaryError:
                self.counts.dropped[DropReason.unstable_boundary.value] += 1
                continue
            except NoSupervisedTokenError:
                self.counts.dropped[DropReason.no_supervised_token.value] += 1
                continue
            if sum(not wrote for wrote in row.loss_mask) > self.data.max_prompt_tokens:
                self.counts.dropped[DropReason.too_long.value] += 1
                continue
            kept.append(_with_ids(record, row))
        self.counts.kept += len(kept)
        return kept


def _with_ids(record: Conversation, row: RenderedRow) -> Conversation:
    first = row.loss_mask.index(True)
    return replace(
        record, prompt_token_ids=row.input_ids[:first], output_token_ids=row.input_ids[first:]
    )


def _ids(record: Conversation) -> list[int]:
    prompt, output = exact_ids(record)
    return prompt + output
