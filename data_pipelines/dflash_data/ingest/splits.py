"""Train, validation and test by time: the newest window is the test, the one before validates.

A drafter serves tomorrow's traffic, so it is judged on calls that came after its training
calls. A session belongs to the window in which it starts and is never divided: its calls
past the cut are dropped as `straddles_cut`.

Without times a hash decides, and the manifest says so: of the session, or, where the log names
no session, of the near-duplicate cluster. Clusters are known only when all records are, so those
records leave here with `split` None and `decisions` sets it.
"""

import hashlib
from dataclasses import dataclass

from dflash_data.drops import DropReason
from dflash_data.ingest.explode import Sifted, by_session, in_log_order, instant, is_chained
from dflash_train.config import DataConfig
from dflash_train.records.conversation import Conversation

DAY_S = 86_400


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


def time_cuts(moments: list[float], data: DataConfig) -> Cuts | None:
    """Cut the time range of some moments by its shares, or by days; None if it has no extent."""
    if not moments or min(moments) == max(moments):
        return None
    extent = max(moments) - min(moments)
    test_s = extent * data.test_share if data.test_days is None else data.test_days * DAY_S
    validation_s = extent * data.validation_share
    if data.validation_days is not None:
        validation_s = data.validation_days * DAY_S
    test = max(moments) - test_s
    return Cuts(validation=test - validation_s, test=test)


def assign_splits(records: list[Conversation], cuts: Cuts | None, data: DataConfig) -> Sifted:
    """Set `split` on every record, whole sessions at a time, and drop calls past a cut."""
    sifted = Sifted([])
    for session in by_session(in_log_order(records)):
        split = _split_by_time(session, cuts)
        sifted.facts["sessions"] += 1
        sifted.facts["sessions_not_time_based"] += split is None
        otherwise = None
        if split is None and not is_chained(session):
            otherwise = split_by_hash(min(record.id for record in session), data)
        for record in session:
            record.split = split or otherwise
            if split is not None and _split_by_time([record], cuts) not in (None, split):
                sifted.dropped[DropReason.straddles_cut] += 1
            else:
                sifted.kept.append(record)
    sifted.kept = in_log_order(sifted.kept)
    return sifted


def split_by_hash(name: str, data: DataConfig) -> str:
    """Choose by a name of the group that is the same on every machine, whatever the HMAC key."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    if place < data.test_share:
        return "test"
    return "validation" if place < data.test_share + data.validation_share else "train"


def _split_by_time(session: list[Conversation], cuts: Cuts | None) -> str | None:
    """Give the window in which a session starts; None without times."""
    start = instant(session[0])
    return None if cuts is None or start is None else cuts.window(start)
