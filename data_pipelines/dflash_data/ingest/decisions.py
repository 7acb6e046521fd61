"""Which records stay, what they weigh, and which of the test were seen in training.

Everything here is numpy over the rows of `record_arrays`, for all records of a log at once.

Traffic repeats on purpose: deduplication balances what is learned from, so only train and
validation are touched, each by itself, and what is removed adds to the weight of a record that
stays. Later turns are decided first: a record that a kept later turn builds on always stays,
because `regenerate` takes the history's answers from it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dflash_data.drops import DropReason
from dflash_data.ingest.record_arrays import UNDECIDED
from dflash_data.ingest.splits import split_by_hash
from dflash_train.config import DataConfig
from dflash_train.records.conversation import SPLITS

REASONS = tuple(DropReason)
KEPT = len(REASONS)
"""`reason` of a record that stays; below it a place in `REASONS`."""
TRAIN, VALIDATION, TEST = range(3)
UNKNOWN, SEEN, UNSEEN = range(3)

DECISION = np.dtype(
    [
        ("cluster", "u8"),  # hash of the cluster's smallest id; 0 for a record alone
        ("weight", "u4"),
        ("reason", "u1"),
        ("split", "u1"),
        ("seen", "u1"),
    ]
)


@dataclass
class Decided:
    """One decision per row, and what was counted."""

    decisions: NDArray[np.void]
    dropped: Counter[DropReason] = field(default_factory=Counter)
    facts: Counter[str] = field(default_factory=Counter)


def read_decisions(path: Path) -> NDArray[np.void]:
    """Read the decisions on one bucket, in the order of its records."""
    return np.fromfile(path, dtype=DECISION)


def decide(
    rows: NDArray[np.void], root: NDArray[np.int64], data: DataConfig, names: list[str]
) -> Decided:
    """Decide on every record.

    Args:
        rows: `[N]` of dtype ROW.
        root: `[N]` the smallest row of each row's near-duplicate cluster.
        data: The limits.
        names: Evaluation sets, in the order of `rows["contaminated"]`.
    """
    decided = Decided(np.zeros(len(rows), dtype=DECISION))
    decisions = decided.decisions
    decisions["weight"], decisions["reason"] = 1, KEPT
    decisions["split"] = rows["split"]
    _split_by_cluster(rows, root, decisions, data)
    _drop_contaminated(rows, decided, names)
    _thin_out(rows, root, decided, data)
    _name_clusters(rows, root, decided)
    _mark_seen(rows, root, decisions)
    for place, count in enumerate(np.bincount(decisions["reason"], minlength=KEPT)[:KEPT]):
        decided.dropped[REASONS[place]] = int(count)
    return decided


def _split_by_cluster(
    rows: NDArray[np.void], root: NDArray[np.int64], decisions: NDArray[np.void], data: DataConfig
) -> None:
    """Set splits that wait: chains without times go where the hash of their cluster says."""
    waiting = np.flatnonzero(rows["split"] == UNDECIDED)
    if not len(waiting):
        return
    # Neither chain nor cluster may be divided: join them, by the smallest row of both.
    _, chains = np.unique(rows["session"][waiting], return_inverse=True)
    _, groups = np.unique(root[waiting], return_inverse=True)
    groups = _join_labels(groups, chains)
    smallest = np.full(groups.max() + 1, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(smallest, groups, rows["id"][waiting])
    splits = np.array([SPLITS.index(split_by_hash(f"{id:016x}", data)) for id in smallest.tolist()])
    decisions["split"][waiting] = splits[groups]


def _join_labels(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give the groups of the coarsest partition that neither labelling divides further."""
    label = one
    while True:
        least = np.full(other.max() + 1, len(label), dtype=np.int64)
        np.minimum.at(least, other, label)
        lower = least[other]
        least = np.full(one.max() + 1, len(label), dtype=np.int64)
        np.minimum.at(least, one, lower)
        if np.array_equal(least[one], label):
            return label
        label = least[one]


def _drop_contaminated(rows: NDArray[np.void], decided: Decided, names: list[str]) -> None:
    decisions = decided.decisions
    hit = (rows["contaminated"] >= 0) & (decisions["split"] != TEST)
    decisions["reason"][hit] = REASONS.index(DropReason.contaminated)
    counts = np.bincount(rows["contaminated"][hit], minlength=len(names))
    decided.facts.update(
        {f"contaminated/{name}": int(counts[number]) for number, name in enumerate(names)}
    )


def _thin_out(
    rows: NDArray[np.void], root: NDArray[np.int64], decided: Decided, data: DataConfig
) -> None:
    """Merge repeats and cap clusters, later turns first."""
    decisions = decided.decisions
    prompts, prompt_of = np.unique(rows["prompt"], return_inverse=True)
    is_built_on = np.zeros(len(prompts), dtype=bool)
    room = np.full((len(SPLITS), len(rows)), data.max_per_cluster, dtype=np.int32)
    for level in _levels(rows, decisions):
        needed = is_built_on[prompt_of[level]]
        kept = _merge_repeats(rows, level, needed, decided, data.max_answers_per_prefix)
        kept = _cap_clusters(root, level[kept], needed[kept], decided, room)
        built_on = rows["needs"][kept]
        built_on = built_on[built_on != 0]
        places = np.minimum(np.searchsorted(prompts, built_on), len(prompts) - 1)
        is_built_on[places[prompts[places] == built_on]] = True
    _move_weights(rows, root, decided)


def _levels(rows: NDArray[np.void], decisions: NDArray[np.void]) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of train and validation turn by turn, the last first, each in log order."""
    learning = np.flatnonzero((decisions["split"] != TEST) & (decisions["reason"] == KEPT))
    turns = -rows["turn"][learning].astype(np.int64)
    order = np.lexsort((rows["id"][learning], rows["moment"][learning], turns))
    learning, turns = learning[order], turns[order]
    yield from np.split(learning, np.flatnonzero(np.diff(turns)) + 1) if len(learning) else ()


def _merge_repeats(
    rows: NDArray[np.void],
    level: NDArray[np.int64],
    needed: NDArray[np.bool_],
    decided: Decided,
    max_answers: int,
) -> NDArray[np.bool_]:
    """Merge rows of one split, context and answer into the first, or into those that must stay.

    Returns:
        Which rows of the level stay.
    """
    decisions = decided.decisions
    split, context = decisions["split"][level], rows["context"][level]
    same, same_starts, order = _group(split, context, rows["answer"][level])
    asked = _group(split, context)[0]
    firsts = order[same_starts]  # the first row of each group, in log order
    # Answers of one prompt count in the order in which they first came.
    by_prompt = np.lexsort((firsts, asked[firsts]))
    rank = np.empty(len(firsts), dtype=np.int64)
    rank[by_prompt] = _ranks(asked[firsts][by_prompt])
    has_needed = np.bincount(same, weights=needed, minlength=len(firsts)) > 0
    stays = needed.copy()
    stays[firsts[~has_needed & (rank < max_answers)]] = True
    num_merged = np.bincount(same, weights=~stays, minlength=len(firsts)).astype(np.int64)
    heirs = np.full(len(firsts), len(level))
    np.minimum.at(heirs, same[stays], np.flatnonzero(stays))
    has_heir = heirs < len(level)
    decisions["weight"][level[heirs[has_heir]]] += num_merged[has_heir].astype(np.uint32)
    decided.facts["merged_repeats"] += int(num_merged[has_heir].sum())
    decisions["reason"][level[~stays]] = REASONS.index(DropReason.duplicate)
    return stays


def _cap_clusters(
    root: NDArray[np.int64],
    level: NDArray[np.int64],
    needed: NDArray[np.bool_],
    decided: Decided,
    room: NDArray[np.int32],
) -> NDArray[np.int64]:
    """Keep rows while their cluster has room in their split; those that must stay, always.

    Returns:
        The rows that stay.
    """
    split, cluster = decided.decisions["split"][level], root[level]
    np.subtract.at(room, (split[needed], cluster[needed]), 1)
    asking = np.flatnonzero(~needed)
    groups, _, order = _group(split[asking], cluster[asking])
    rank = np.empty(len(asking), dtype=np.int64)
    rank[order] = _ranks(groups[order])
    stays = needed.copy()
    stays[asking] = rank < room[split[asking], cluster[asking]]
    np.subtract.at(room, (split[stays & ~needed], cluster[stays & ~needed]), 1)
    decided.decisions["reason"][level[~stays]] = REASONS.index(DropReason.cluster_cap)
    return level[stays]


def _move_weights(rows: NDArray[np.void], root: NDArray[np.int64], decided: Decided) -> None:
    """Add the weight of rows that a cap removed to the earliest one that stays."""
    decisions = decided.decisions
    capped = np.flatnonzero(decisions["reason"] == REASONS.index(DropReason.cluster_cap))
    if not len(capped):
        return
    for split in (TRAIN, VALIDATION):
        kept = np.flatnonzero((decisions["reason"] == KEPT) & (decisions["split"] == split))
        latest_first = kept[np.lexsort((rows["id"][kept], rows["moment"][kept]))][::-1]
        heir = np.full(len(rows), -1, dtype=np.int32)
        heir[root[latest_first]] = latest_first  # of equal places the last one is written
        mine = capped[decisions["split"][capped] == split]
        np.add.at(decisions["weight"], heir[root[mine]], decisions["weight"][mine])


def _name_clusters(rows: NDArray[np.void], root: NDArray[np.int64], decided: Decided) -> None:
    """Name each cluster of two or more by its smallest id: the same on every run."""
    sizes = np.bincount(root, minlength=len(rows))
    smallest = np.full(len(rows), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(smallest, root, rows["id"])
    decided.decisions["cluster"] = np.where(sizes[root] > 1, smallest[root], 0)
    decided.facts["clusters"] = int((sizes > 1).sum())
    decided.facts["clustered_records"] = int(sizes[sizes > 1].sum())
    decided.facts["largest_cluster"] = int(sizes.max(initial=0))


def _mark_seen(
    rows: NDArray[np.void], root: NDArray[np.int64], decisions: NDArray[np.void]
) -> None:
    """Mark test sessions of which any record has a near-duplicate among those kept in train."""
    kept = decisions["reason"] == KEPT
    in_train = np.zeros(len(rows), dtype=bool)
    in_train[root[kept & (decisions["split"] == TRAIN)]] = True
    test = np.flatnonzero(kept & (decisions["split"] == TEST))
    _, session = np.unique(rows["session"][test], return_inverse=True)
    seen = np.bincount(session, weights=in_train[root[test]]) > 0
    decisions["seen"][test] = np.where(seen[session], SEEN, UNSEEN)


def _group(
    *keys: NDArray[np.generic],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Number the rows by equal keys.

    Returns:
        The group of each row; where each group starts in the order; the order, stable by group.
    """
    order = np.lexsort(keys[::-1])
    is_new = np.zeros(len(order), dtype=bool)
    is_new[:1] = True
    for key in keys:
        is_new[1:] |= key[order[1:]] != key[order[:-1]]
    groups = np.empty(len(order), dtype=np.int64)
    groups[order] = np.cumsum(is_new) - 1
    return groups, np.flatnonzero(is_new), order


def _ranks(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the rows within runs of equal groups: 0, 1, 2, ..."""
    places = np.arange(len(groups))
    is_new = np.ones(len(groups), dtype=bool)
    is_new[1:] = groups[1:] != groups[:-1]
    return places - np.maximum.accumulate(np.where(is_new, places, 0))
