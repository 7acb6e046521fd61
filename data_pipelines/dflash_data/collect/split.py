"""The feature folder of one split while `collect` fills it: links, plan, shards, marks, books.

A shard that was computed leaves a mark in the plan's folder: its checksum, written once the shard
is there. What a kill leaves without a mark, or with a mark that does not fit, is computed again.
"""

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import orjson

from dflash_data.collect.call_rendering import AnsweredRecords, render_calls
from dflash_data.collect.forward import FeatureReader
from dflash_data.collect.plan import (
    CollectionPlan,
    PlannedShard,
    ShardLimits,
    make_plan,
    open_plan,
)
from dflash_data.drops import all_reasons
from dflash_train.config import FeaturesFrom, RecipeConfig
from dflash_train.features.shard import EncodedRows, write_encoded
from dflash_train.features.store import (
    INDEX_NAME,
    TOKENS_PREFIX,
    IndexLine,
    read_index,
    write_index,
)
from dflash_train.records.manifest import (
    Counts,
    FileEntry,
    Manifest,
    atomic_path,
    file_hash,
    write_bytes,
)

FOLDER = "features"
PLAN_FOLDER = "plan"


class CollectedSplit:
    """One split of a run's features."""

    def __init__(self, config: RecipeConfig, name: str, *, key: str) -> None:
        """Look at nothing yet.

        Args:
            config: The recipe.
            name: Name of the split.
            key: Hash of everything that plan and shards depend on.
        """
        self.name = name
        self.folder = config.run_dir / FOLDER / name
        self._plan_folder = self.folder / PLAN_FOLDER
        self._answered_in = (config.run_dir / "conversations", config.run_dir / "regenerated")
        self._source = config.run_dir / "regenerated" / FOLDER / name
        self._data = config.data
        self._key = key

    @functools.cached_property
    def linked_lines(self) -> list[IndexLine]:
        """Index lines of the answers that `regenerate` left with what this recipe stores of them.

        Where features are stored, an answer that was left without them is read by the target.
        """
        if not (self._source / INDEX_NAME).exists():
            return []
        lines = read_index(self._source)
        if self._data.features is FeaturesFrom.online:
            return lines
        return [line for line in lines if not line.shard.startswith(TOKENS_PREFIX)]

    @functools.cached_property
    def plan(self) -> CollectionPlan | None:
        """The stored plan; None where the target has nothing to read.

        Raises:
            ValueError: It is damaged; the message names the file.
        """
        return open_plan(self._plan_folder, key=self._key)

    def link(self) -> None:
        """Take over the shards of `regenerate`, without a copy where the file system allows."""
        for name in sorted({line.shard for line in self.linked_lines}):
            with atomic_path(self.folder / name) as partial:
                try:
                    os.link(self._source / name, partial)
                except OSError:  # another file system, or one without links
                    shutil.copyfile(self._source / name, partial)

    def prepare(self, load_reader: Callable[[], FeatureReader]) -> None:
        """Store the plan if an answer has to be read, and unmark shards that are damaged."""
        is_stored = open_plan(self._plan_folder, key=self._key) is not None
        if not is_stored and self.has_answers():
            self.make_plan(self._plan_folder, load_reader())
        for shard in self.shards:
            mark, path = self._mark(shard), self.folder / shard.name
            is_whole = path.exists() and mark.exists() and file_hash(path) == _read(mark).sha256
            if not is_whole:
                mark.unlink(missing_ok=True)

    def has_answers(self) -> bool:
        """Say whether there are answers that the target has to read."""
        return not self._records.is_empty()

    def make_plan(self, folder: Path, reader: FeatureReader) -> CollectionPlan:
        """Render the answers and store the plan of their rows in a folder."""
        counts = Counts(dropped=all_reasons({}))
        calls = render_calls(
            self._records.shards(), target=reader.target, data=self._data, counts=counts
        )
        limits = ShardLimits(
            batch_size=self._data.batch_size,
            token_bytes=reader.token_bytes,
            shard_bytes=self._data.shard_bytes,
        )
        return make_plan(folder, calls, counts=counts, key=self._key, limits=limits)

    @property
    def shards(self) -> list[PlannedShard]:
        """All planned shards."""
        return [] if self.plan is None else self.plan.shards

    def unfinished(self) -> list[PlannedShard]:
        """List the planned shards without a mark."""
        return [shard for shard in self.shards if not self._mark(shard).exists()]

    def write(self, shard: PlannedShard, parts: list[EncodedRows]) -> None:
        """Write a computed shard and its mark."""
        path = self.folder / shard.name
        write_encoded(path, parts)
        num_rows = sum(len(part.lengths) for part in parts)
        entry = FileEntry.of(path, self.folder, rows=num_rows, tokens=shard.num_tokens)
        write_bytes(self._mark(shard), orjson.dumps(entry))

    def close_books(self, manifest: Manifest) -> Manifest | None:
        """Write index and manifest of the split; None if it holds no call at all.

        Args:
            manifest: The stage's; counts and outputs are the split's own.
        """
        counts = Counts(dropped=all_reasons({})) if self.plan is None else self.plan.counts
        num_linked = len(self.linked_lines)
        if counts.read + num_linked == 0:
            return None
        planned = [] if self.plan is None else self.plan.read_lines()
        write_index(self.folder, [*self.linked_lines, *planned])
        linked = sorted({line.shard for line in self.linked_lines})
        outputs = [FileEntry.of(self.folder / name, self.folder) for name in linked]
        outputs += [_read(self._mark(shard)) for shard in self.shards]
        outputs.append(FileEntry.of(self.folder / INDEX_NAME, self.folder))
        counts = replace(counts, read=counts.read + num_linked, kept=counts.kept + num_linked)
        # Who asked for it stands in the stage's manifest, which vouches for the bytes of this one.
        own = replace(manifest, counts=counts, outputs=outputs, command="", code={}, versions={})
        own.write(self.folder)
        return own

    @property
    def _records(self) -> AnsweredRecords:
        linked_ids = frozenset(line.id for line in self.linked_lines)
        return AnsweredRecords(folders=self._answered_in, split=self.name, linked_ids=linked_ids)

    def _mark(self, shard: PlannedShard) -> Path:
        return (self._plan_folder / shard.name).with_suffix(".json")


def _read(mark: Path) -> FileEntry:
    return FileEntry(**orjson.loads(mark.read_bytes()))
