"""What a new drafter gains over the old one, on the same stored answers: in all and by tenant.

Both are replayed on every answer, so requests are paired, and conversations are resampled for both
together. The gain is relative, since 0.1 tokens per step is much at a length of 1.2 and little at
5. Tenants of too few requests for a claim are taken together, so that every request counts twice:
in all the traffic, and among somebody's.
"""

from dataclasses import dataclass

from dflash_inference.request_rows import RequestRow, rows_of, sums_of
from dflash_inference.statistics import Difference, pooled_mean, relative_difference
from dflash_inference.trace import DecodeTrace
from dflash_train.config import require


@dataclass(frozen=True, kw_only=True)
class PairedGain:
    """The new drafter against the old one on some requests."""

    name: str
    """Of the window, and of the tenant if it is one's part of it."""
    old: float
    """Pooled acceptance length."""
    new: float
    difference: Difference
    """Of `new` over `old`, less 1."""


def paired_gains(
    window: str,
    *,
    new: list[DecodeTrace],
    old: list[DecodeTrace],
    fewest_requests: int,
    resamples: int,
    seed: int,
) -> list[PairedGain]:
    """Compare two replays of one window.

    Args:
        window: Its name.
        new: Traces of the new drafter.
        old: Those of the old one, of the same answers.
        fewest_requests: A tenant with fewer is taken together with others of that kind.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        That of the whole window, then those of its tenants, the largest first; a window of one
        tenant has the first alone. Empty if no answer has a verify step.
    """
    ours, theirs = rows_of(new), {row.id: row for row in rows_of(old)}
    require(
        {row.id for row in ours} == theirs.keys(),
        f"the replays of {window} are of different answers. Run `tune` again with --force.",
    )
    parts = {window: ours} if ours else {}
    tenants = _tenants(ours, fewest_requests)
    if len(tenants) > 1:
        parts |= {f"{window}, {name}": rows for name, rows in tenants.items()}
    return [
        _gain(name, rows, [theirs[row.id] for row in rows], resamples=resamples, seed=seed)
        for name, rows in parts.items()
    ]


def _tenants(rows: list[RequestRow], fewest_requests: int) -> dict[str, list[RequestRow]]:
    """Group requests by tenant, the largest first, the small ones in one group at the end."""
    groups: dict[str, list[RequestRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    found = {f"tenant {name}": each for name, each in ordered if len(each) >= fewest_requests}
    small = [each for _, each in ordered if len(each) < fewest_requests]
    if small:
        found[f"{len(small)} small tenants"] = [row for each in small for row in each]
    return found


def _gain(
    name: str, new: list[RequestRow], old: list[RequestRow], *, resamples: int, seed: int
) -> PairedGain:
    ours, theirs = sums_of(new), sums_of(old)
    return PairedGain(
        name=name,
        old=pooled_mean(theirs),
        new=pooled_mean(ours),
        difference=relative_difference(ours, theirs, resamples=resamples, seed=seed),
    )
