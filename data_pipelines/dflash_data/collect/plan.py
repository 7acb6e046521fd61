"""What `collect` will run through the target, stored before the work: a function of its input.

Calls are rendered once. The calls of a session repeat their history: where the tokens of one begin
the prompt of a later one, the later one's row serves both, so the target's work and the disk grow
with a session's tokens and not with its turns squared. Rows are sorted by length, cut into
batches of similar length, and batches into shards of bounded size. No number of processes enters
it: grouping decides rounding, so any number of processes writes the same shards.

The folder of a plan holds `rows.arrow` (token ids and loss masks, as the target will be fed),
`index.arrow` (which call reads which row) and a manifest with the shards.
"""

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from dflash_train.features.store import INDEX_NAME, IndexLine, read_index, write_index
from dflash_train.records.manifest import Counts, FileEntry, Manifest, atomic_path

ROWS_NAME = "rows.arrow"
_ROW_FEATURES = Features(
    input_ids=List(Value("int32")), loss_mask=List(Value("bool")), prompt_length=Value("int64")
)


@dataclass(kw_only=True)
class RenderedCall:
    """A call as token ids; its shard and row are not known yet."""

    line: IndexLine
    input_ids: list[int]
    loss_mask: list[bool]


@dataclass(kw_only=True)
class PlannedRow:
    """A row that the target reads once, and the calls that it serves."""

    input_ids: list[int]
    loss_mask: list[bool]
    """True where any of its calls is supervised."""
    prompt_length: int
    """P of the shortest call: no answer stands before it."""
    lines: list[IndexLine]
    """Its calls, longest first; empty in a row that was read back from a plan."""

    def serves(self, call: RenderedCall) -> bool:
        """Say whether a call's tokens begin this row and end before its first answer."""
        num_tokens = len(call.input_ids)
        return (
            num_tokens <= self.prompt_length
            and self.input_ids[num_tokens - 1] == call.input_ids[-1]
            and self.input_ids[:num_tokens] == call.input_ids
        )

    def add(self, call: RenderedCall) -> None:
        """Serve one more call."""
        run = slice(call.line.prompt_length, call.line.num_tokens)
        self.loss_mask[run] = call.loss_mask[run]
        self.prompt_length = call.line.prompt_length
        self.lines.append(call.line)


@dataclass(kw_only=True)
class PlannedShard:
    """One shard to write: its rows in batches of similar length."""

    name: str
    batches: list[list[int]]
    """Places of the rows in `rows.arrow`; the rows of a batch go through the target together."""
    num_tokens: int
    num_bytes: int
    """Size of the file to come, the few kB of its header apart."""


@dataclass(frozen=True, kw_only=True)
class ShardLimits:
    """What bounds batches and shards."""

    batch_size: int
    """Rows that go through the target together, at most."""
    token_bytes: int
    """Stored bytes of one token."""
    shard_bytes: int
    """Bytes of a shard, at most; a longer single row stands alone."""


class CollectionPlan:
    """The stored plan of one split."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Wrap a plan folder; use `open_plan` or `make_plan`."""
        assert manifest.counts is not None
        self.counts = manifest.counts
        """Calls read, kept and dropped in rendering."""
        self.shards = [PlannedShard(**shard) for shard in manifest.details["shards"]]
        self._folder = folder
        self._rows = Dataset.from_file(str(folder / ROWS_NAME))

    def read_lines(self) -> list[IndexLine]:
        """Read the index lines of all calls, in the order of the store."""
        return read_index(self._folder)

    def read_rows(self, batch: list[int]) -> list[PlannedRow]:
        """Read the rows of one batch."""
        columns = self._rows[batch]
        return [
            PlannedRow(input_ids=ids, loss_mask=mask, prompt_length=prompt_length, lines=[])
            for ids, mask, prompt_length in zip(*columns.values(), strict=True)
        ]


def open_plan(folder: Path, *, key: str) -> CollectionPlan | None:
    """Open a stored plan; None where there is none of this key.

    Raises:
        ValueError: It is damaged; the message names the file.
    """
    manifest = Manifest.read(folder)
    if manifest is None or manifest.recipe_hash != key:
        return None
    manifest.verify_outputs(folder)
    return CollectionPlan(folder, manifest)


def make_plan(
    folder: Path,
    sessions: Iterable[list[RenderedCall]],
    *,
    counts: Counts,
    key: str,
    limits: ShardLimits,
) -> CollectionPlan:
    """Plan a split and store the plan; the memory it takes is that of the index.

    Args:
        folder: Folder of the plan, replaced whole.
        sessions: Rendered calls in groups; the calls of one session stand in one group.
        counts: The books, complete once `sessions` is read to its end.
        key: Hash of everything the plan depends on.
        limits: What bounds batches and shards.
    """
    with atomic_path(folder) as partial:
        partial.mkdir()
        rows = _write_rows(partial / ROWS_NAME, sessions)
        shards = pack_shards([(length, lines[0].id) for length, lines in rows], limits)
        write_index(partial, list(_placed(shards, [lines for _length, lines in rows])))
        manifest = Manifest(stage="collect", recipe_hash=key, counts=counts)
        manifest.details = {"shards": [asdict(shard) for shard in shards]}
        manifest.outputs = [
            FileEntry.of(partial / name, partial) for name in (ROWS_NAME, INDEX_NAME)
        ]
        manifest.write(partial)
    return CollectionPlan(folder, manifest)


def share_prefixes(calls: list[RenderedCall]) -> list[PlannedRow]:
    """Give the rows that serve all calls: within a session a longer one serves what it repeats."""
    sessions: dict[str, list[RenderedCall]] = defaultdict(list)
    for call in calls:
        sessions[call.line.session or f"alone {call.line.id}"].append(call)
    rows: list[PlannedRow] = []
    for members in sessions.values():
        rows += _share_in_session(members)
    return rows


def _share_in_session(calls: list[RenderedCall]) -> list[PlannedRow]:
    rows: list[PlannedRow] = []
    for call in sorted(calls, key=lambda call: (-len(call.input_ids), call.line.id)):
        host = next((row for row in rows if row.serves(call)), None)
        if host is not None:
            host.add(call)
            continue
        rows.append(
            PlannedRow(
                input_ids=call.input_ids,
                loss_mask=list(call.loss_mask),
                prompt_length=call.line.prompt_length,
                lines=[call.line],
            )
        )
    return rows


def pack_shards(rows: list[tuple[int, str]], limits: ShardLimits) -> list[PlannedShard]:
    """Sort rows by length and cut them into batches and shards.

    Args:
        rows: Tokens and id of each row.
        limits: What bounds batches and shards.
    """
    shards: list[PlannedShard] = []
    for place in sorted(range(len(rows)), key=rows.__getitem__):
        num_tokens = rows[place][0]
        num_bytes = num_tokens * limits.token_bytes + 8  # and its offset
        if not shards or shards[-1].num_bytes + num_bytes > limits.shard_bytes:
            name = f"collected-{len(shards):05d}.safetensors"
            shards.append(PlannedShard(name=name, batches=[[]], num_tokens=0, num_bytes=8))
        shard = shards[-1]
        if len(shard.batches[-1]) == limits.batch_size:
            shard.batches.append([])
        shard.batches[-1].append(place)
        shard.num_tokens += num_tokens
        shard.num_bytes += num_bytes
    return shards


def _write_rows(
    path: Path, sessions: Iterable[list[RenderedCall]]
) -> list[tuple[int, list[IndexLine]]]:
    """Write the rows and give the tokens and calls of each."""
    written: list[tuple[int, list[IndexLine]]] = []
    with ArrowWriter(path=str(path), features=_ROW_FEATURES) as writer:
        for row in (row for calls in sessions for row in share_prefixes(calls)):
            columns: dict[str, Any] = {name: getattr(row, name) for name in _ROW_FEATURES}
            writer.write(columns)
            written.append((len(row.input_ids), row.lines))
        writer.finalize()
    return written


def _placed(shards: list[PlannedShard], lines_of_row: list[list[IndexLine]]) -> Iterator[IndexLine]:
    """Yield all index lines with shard and row filled in; calls of one row by length."""
    for shard in shards:
        places = [place for batch in shard.batches for place in batch]
        for number, place in enumerate(places):
            for line in sorted(lines_of_row[place], key=operator.attrgetter("num_tokens")):
                line.shard, line.row = shard.name, number
                yield line
