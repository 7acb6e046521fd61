"""The servers' answers as they arrive: a kill loses only the requests in flight.

There is a log for each shard of conversations. One line per answered record, appended in the order
of arrival: the record's id, a hash of the prompt that was asked, and the finished record, scrubbed
like everything that is written. When all are in, the log is rewritten in the order of the plan, so
that its bytes tell nothing of arrivals.
"""

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import orjson
from tqdm import tqdm

from dflash_data.drops import DropReason
from dflash_train.records.conversation import Conversation
from dflash_train.records.manifest import content_hash, write_bytes

SYNC_EVERY_S = 1.0
"""Lines are with the operating system at once, and on the disk at the latest after this time."""

Outcome = Conversation | DropReason


class AnswerLog:
    """Appends outcomes of one shard durably and gives back those of an earlier run."""

    def __init__(self, path: Path) -> None:
        """Read what an earlier run left; a line that a kill cut short is taken off."""
        self.path = path
        self._outcomes: dict[tuple[str, str], bytes] = {}
        length = self._read() if self.path.exists() else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.truncate(self._file, length)
        self._last_sync = time.monotonic()

    def close(self) -> None:
        """See that all lines are on the disk; nothing can be added any more."""
        os.fsync(self._file)
        os.close(self._file)

    def find(self, record_id: str, prompt_ids: list[int]) -> Outcome | None:
        """Give what became of a record when this very prompt was asked; None if it was not."""
        line = self._outcomes.get((record_id, content_hash(prompt_ids)))
        return None if line is None else _outcome(line)

    def add(self, record_id: str, prompt_ids: list[int], outcome: Outcome) -> None:
        """Append what became of a record."""
        prompt = content_hash(prompt_ids)
        line = _line(record_id, prompt, outcome)
        os.write(self._file, line + b"\n")
        self._outcomes[record_id, prompt] = line
        if time.monotonic() - self._last_sync > SYNC_EVERY_S:
            os.fsync(self._file)
            self._last_sync = time.monotonic()

    def put_in_order(self, record_ids: Iterable[str]) -> None:
        """Rewrite the log in the order of these ids, and without anything else."""
        by_id = {record_id: line for (record_id, _prompt), line in self._outcomes.items()}
        lines = [by_id[record_id] + b"\n" for record_id in record_ids if record_id in by_id]
        write_bytes(self.path, b"".join(lines))

    def _read(self) -> int:
        """Read the lines and give the length of the log up to the last whole one, in bytes."""
        content = self.path.read_bytes()
        length = content.rfind(b"\n") + 1
        num_damaged = 0
        for line in content[:length].splitlines():
            try:
                fields = orjson.loads(line)
                self._outcomes[fields["id"], fields["prompt"]] = line
            except (orjson.JSONDecodeError, KeyError, TypeError):
                num_damaged += 1
        if num_damaged:
            tqdm.write(
                f"warning: {self.path}: {num_damaged} damaged lines, these records are asked again",
                file=sys.stderr,
            )
        return length


def _line(record_id: str, prompt: str, outcome: Outcome) -> bytes:
    fields = {"id": record_id, "prompt": prompt}
    if isinstance(outcome, DropReason):
        return orjson.dumps(fields | {"dropped": outcome.value})
    return msgspec.json.encode(fields | {"record": outcome})


def _outcome(line: bytes) -> Outcome:
    fields = orjson.loads(line)
    if "dropped" in fields:
        return DropReason(fields["dropped"])
    return Conversation.from_json(orjson.dumps(fields["record"]))
