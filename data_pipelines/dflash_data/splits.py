"""Train, validation and test by time: the newest window is the test, the one before validates.

A drafter serves tomorrow's traffic, so it is judged on calls that came after its training
calls. A session belongs to the window in which it starts and is never divided: its calls
past the cut are dropped as `straddles_cut`. Without times the session's hash decides, and
the manifest says so.
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass

from dflash_data.drops import DropReason
from dflash_data.explode import Sifted, in_log_order, instant
from dflash_train.config import DataConfig
from dflash_train.records.conversation import Conversation


@dataclass(frozen=True)
class Cuts:
    """Where validation and test begin, in seconds since 1970."""

    validation: float
    test: float

    def window(self, moment: float) -> str:
        """Give the split to which a moment belongs."""
        if moment < self.validation:
            return "train"
        return "validation" if moment < self.test else "test"


def time_cuts(records: list[Conversation], data: DataConfig) -> Cuts | None:
    """Cut the time range of the records by its shares; None if it has no extent."""
    moments = [moment for record in records if (moment := instant(record)) is not None]
    if not moments or min(moments) == max(moments):
        return None
    extent = max(moments) - min(moments)
    test = max(moments) - data.test_share * extent
    return Cuts(validation=test - data.validation_share * extent, test=test)


def assign_splits(records: list[Conversation], cuts: Cuts | None, data: DataConfig) -> Sifted:
    """Set `split` on every record, whole sessions at a time, and drop calls past a cut."""
    sifted = Sifted([])
    sessions: dict[str | None, list[Conversation]] = defaultdict(list)
    for record in in_log_order(records):
        sessions[record.session or record.id].append(record)
    for session in sessions.values():
        split = _split_by_time(session, cuts)
        sifted.facts["sessions"] += 1
        sifted.facts["sessions_not_time_based"] += split is None
        for record in session:
            record.split = split or _split_by_hash(session, data)
            if split is not None and _split_by_time([record], cuts) not in (None, split):
                sifted.dropped[DropReason.straddles_cut] += 1
            else:
                sifted.kept.append(record)
    sifted.kept = in_log_order(sifted.kept)
    return sifted


def _split_by_time(session: list[Conversation], cuts: Cuts | None) -> str | None:
    """Give the window in which a session starts; None without times."""
    start = instant(session[0])
    return None if cuts is None or start is None else cuts.window(start)


def _split_by_hash(session: list[Conversation], data: DataConfig) -> str:
    """Choose by the ids of the session: the same on every machine, whatever the HMAC key."""
    first_id = min(record.id for record in session)
    place = int.from_bytes(hashlib.sha256(first_id.encode()).digest()[:8]) / 2**64
    if place < data.test_share:
        return "test"
    return "validation" if place < data.test_share + data.validation_share else "train"
