"""Answered conversations as token ids: what `collect` plans with, one shard of records at a time.

A session stands in one shard of what `ingest` wrote, and in one of what `regenerate` wrote, so a
shard is what has to be held in memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from dflash_data.collect.feature_rows import answer_row, index_line
from dflash_data.collect.plan import RenderedCall
from dflash_data.drops import DropReason
from dflash_data.regenerate.stage import needs_answer
from dflash_train.config import DataConfig
from dflash_train.features.target_text import WrittenTarget
from dflash_train.records.conversation import Conversation, read_shard
from dflash_train.records.manifest import Counts


@dataclass(frozen=True, kw_only=True)
class AnsweredRecords:
    """Records of one split whose answers the target wrote and whose features nobody has."""

    folders: tuple[Path, ...]
    """`conversations` and `regenerated` of a run."""
    split: str
    linked_ids: frozenset[str]
    """Records whose features `regenerate` has left."""

    def shards(self) -> Iterator[Iterator[Conversation]]:
        """Yield the records of each shard that has any kind of record."""
        for folder in self.folders:
            for path in sorted(folder.glob(f"{self.split}-*.jsonl.gz")):
                yield filter(self._is_wanted, read_shard(path))

    def is_empty(self) -> bool:
        """Say whether there is no such record."""
        return not any(True for records in self.shards() for _record in records)

    def _is_wanted(self, record: Conversation) -> bool:
        return not needs_answer(record) and record.id not in self.linked_ids


def render_calls(
    shards: Iterable[Iterable[Conversation]],
    *,
    target: WrittenTarget,
    data: DataConfig,
    counts: Counts,
) -> Iterator[list[RenderedCall]]:
    """Yield the rendered calls of each shard of records.

    Args:
        shards: Answered records; a session is in one of them.
        target: Gives tokenizer and stop tokens.
        data: Says which prompts are too long.
        counts: The books, filled while the calls are read.
    """
    for records in shards:
        calls: list[RenderedCall] = []
        for record in records:
            counts.read += 1
            call = _render(record, target, data)
            if isinstance(call, DropReason):
                counts.dropped[call.value] += 1
            else:
                counts.kept += 1
                calls.append(call)
        yield calls


def _render(
    record: Conversation, target: WrittenTarget, data: DataConfig
) -> RenderedCall | DropReason:
    """Give a record's token ids and index line, or why it has none."""
    row = answer_row(record, target, serving=data.serving_sampling)
    if isinstance(row, DropReason):
        return row
    first = row.prompt_length
    if first > data.max_prompt_tokens:
        return DropReason.too_long
    answered = replace(
        record, prompt_token_ids=row.input_ids[:first], output_token_ids=row.input_ids[first:]
    )
    line = index_line(answered, data, shard="", row=-1)
    return RenderedCall(line=line, input_ids=row.input_ids, loss_mask=row.loss_mask)
