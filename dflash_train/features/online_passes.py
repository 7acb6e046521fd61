"""Which rows go through the target together when their features are computed online.

The answer is a function of the rows that are asked for at once, such as those of one pack, and of
nothing else: grouping decides rounding, so a resumed run, a thread that works ahead and any number
of ranks see the same features. Calls that begin the same row share its one pass.
"""

from collections import defaultdict
from collections.abc import Sequence

from dflash_train.features.store import IndexLine

PADDED = 1.25
"""Tokens of a padded pass, at most, for each token that the target has to read."""

SharedRow = tuple[int, ...]
"""Positions of the calls that one fed row serves, the longest first: the others begin it."""
Pass = tuple[SharedRow, ...]
"""Rows that the target reads together, the longest first."""


def plan_passes(
    lines: Sequence[IndexLine], positions: Sequence[int], *, batch_size: int
) -> list[Pass]:
    """Group calls for the target: each in one pass, none twice.

    Args:
        lines: The index of the split.
        positions: Calls that are wanted at once.
        batch_size: Rows of a pass, at most.
    """
    rows = share_rows(lines, positions)
    rows.sort(key=lambda row: (-lines[row[0]].num_tokens, row[0]))
    passes: list[list[SharedRow]] = []
    for row in rows:
        if not passes or not _fits(lines, passes[-1], row, batch_size):
            passes.append([])
        passes[-1].append(row)
    return [tuple(rows) for rows in passes]


def share_rows(lines: Sequence[IndexLine], positions: Sequence[int]) -> list[SharedRow]:
    """Put the calls together that are the first tokens of one stored row."""
    calls: dict[tuple[str, int], list[int]] = defaultdict(list)
    for position in dict.fromkeys(positions):
        calls[lines[position].shard, lines[position].row].append(position)
    return [
        tuple(sorted(members, key=lambda member: (-lines[member].num_tokens, member)))
        for members in calls.values()
    ]


def _fits(
    lines: Sequence[IndexLine], rows: list[SharedRow], new: SharedRow, batch_size: int
) -> bool:
    """Say whether a shorter row may join a pass without too much padding."""
    lengths = [lines[row[0]].num_tokens for row in [*rows, new]]
    return len(lengths) <= batch_size and len(lengths) * lengths[0] <= PADDED * sum(lengths)
