"""Buckets that would not fit in memory, spread over all others, chain by chain.

Calls without a session go to the bucket of their opening, so that a chain stands in one bucket. A
tenant that opens every conversation alike, or asks one question half a million times, puts all of
it there. Such a bucket is crowded. Its chains are found from numbers, 40 bytes a call, and each
whole chain moves to the bucket that the name of its session gives, the name written into its calls.

Nothing else changes: which call continues which is decided by the same rule, in log order over the
whole bucket, and whether a bucket is crowded follows from the sizes of records alone, never from
workers or files. Sessions that the log names are not divided: the longest one must fit in memory.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from dflash_data.ingest.explode import bucket_of_key, history_keys, instant, session_of_chain
from dflash_data.ingest.partitions import PartitionWriter, index_path, read_lines_of
from dflash_train.records.conversation import Conversation

CROWDED_BYTES = 64 << 20
"""A bucket whose records take more is crowded: four times what is usual."""
CALL = np.dtype(
    [("moment", "f8"), ("id", "u8"), ("chain", "u8"), ("history", "u8"), ("prompt", "u8")]
)
"""One call without a session. `chain` names the chain that would begin with it; `history` is 0 if
it continues nothing."""


def crowded_buckets(paths: list[Path], num_buckets: int) -> list[int]:
    """Give the buckets whose records take too many bytes in all partition files together."""
    if num_buckets == 1:
        return []
    sizes = np.zeros(num_buckets, dtype=np.uint64)
    for path in paths:
        frames = np.load(index_path(path))
        np.add.at(sizes, frames["bucket"], frames["size"])
    return np.flatnonzero(sizes > CROWDED_BYTES).tolist()


def spread_bucket(paths: list[Path], bucket: int, out: Path, *, num_buckets: int) -> int:
    """Write the records of a crowded bucket to the buckets of their sessions.

    Args:
        paths: Partition files of the reading tasks.
        bucket: The crowded one.
        out: Partition file to write.
        num_buckets: All buckets.

    Returns:
        How many records moved to another bucket.
    """
    chains = _chain_by_numbers(_calls(read_lines_of(paths, bucket)))
    num_moved = place = 0
    with PartitionWriter(out) as partition:
        for line in read_lines_of(paths, bucket):
            target = bucket
            fields = orjson.loads(line)
            if fields["session"] is None:
                fields["session"] = f"h:{int(chains[place]):016x}"
                target = bucket_of_key(fields["session"].encode(), num_buckets)
                line = orjson.dumps(fields)
                place += 1
            num_moved += target != bucket
            partition.add(target, line)
    return num_moved


def _calls(lines: Iterator[bytes]) -> NDArray[np.void]:
    """Read what chaining needs of the calls without a session, in the order of the lines."""

    def numbers() -> Iterator[tuple[float, int, int, int, int]]:
        for line in lines:
            call = Conversation.from_json(line)
            if call.session is None:
                moment = instant(call)
                history, prompt = history_keys(call)
                yield (
                    float("inf") if moment is None else moment,
                    _as_number(call.id.removeprefix("sha256:")),
                    _as_number(session_of_chain(call).removeprefix("h:")),
                    _as_number(history) if history is not None else 0,
                    _as_number(prompt),
                )

    return np.fromiter(numbers(), dtype=CALL)


def _chain_by_numbers(calls: NDArray[np.void]) -> NDArray[np.uint64]:
    """Give the chain of each call, by number; a repeated call goes where its first goes.

    The rule is that of `explode`: a call continues the latest one whose prompt it repeats.
    """
    order = np.lexsort((calls["prompt"], calls["history"], calls["id"], calls["moment"]))
    chain_of = np.zeros(len(calls), dtype=np.uint64)
    chain_of_id: dict[int, int] = {}
    open_ends: dict[int, list[int]] = {}
    for place, call in zip(order.tolist(), calls[order], strict=True):
        number, history, prompt = int(call["id"]), int(call["history"]), int(call["prompt"])
        chain = chain_of_id.get(number)
        if chain is None:
            ends = open_ends.get(history) if history else None
            if ends:
                chain = ends.pop() if len(ends) > 1 else ends[0]
            else:
                chain = int(call["chain"])
            chain_of_id[number] = chain
            open_ends.setdefault(prompt, []).append(chain)
        chain_of[place] = chain
    return chain_of


def _as_number(digest: str) -> int:
    """Give the first 64 bits of a hexadecimal digest; their order is that of the text."""
    return int(digest[:16], 16)
