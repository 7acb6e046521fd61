"""A test that looks after every request, for as long as a log grows, and seldom cries wolf.

Watched are log acceptance lengths, `y = log(tokens / steps)` of each request: bounded, however long
a request is, and a fall by a share moves all of them by the same amount d. Requests of one cell
(tenant, kind of prompt) share mean and spread, both taken from the reference, the first rows.

The evidence for a fall that began with request j is the likelihood ratio of a tilted reference:

    E_j(n) = prod_{i=j..n} exp(-t_c (y_i - mean_c) - psi_c),  t_c = d / spread_c^2,
    psi_c  = log mean over the reference of exp(-t_c (y - mean_c)),

so each factor has mean 1 over the reference itself, whatever its distribution. As nobody knows j,
all starts are weighed, `R(n) = sum_j w_j E_j(n)` with `sum_j w_j = 1`: this is an e-process, and by
Ville's inequality it ever reaches 1 / a with a chance of at most a (Shiryaev and Roberts' statistic
with a prior; Shin, Ramdas, Rinaldo, "E-detectors", 2022). Half of the prior lies on the first
`half_life` requests, so the chance holds for the whole life of the log and is not spent at once.

Three things are not known exactly, and each costs some evidence:
- The reference's mean has an error. Averaged over it, evidence of h comes about by chance
  exp(h^2 / (N I)) times as often (N reference rows, I the evidence that a request brings after the
  fall), so the bound rises by that. Where N is too small for the fall asked for, a larger one is
  looked for, and the result says so.
- Neighbours may be alike (sessions, hours of the day). The variance of block sums over the
  reference tells by how much; all evidence is divided by it.
- The size of the fall: two are watched, the one asked for and 2.5 times as much.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dflash_inference.drift.cells import Ints, number_cells

Floats = NDArray[np.float64]

DESIGNS = ((1.0, 0.75), (2.5, 0.25))
"""Falls watched for, as multiples of the one asked for in log length, and their share."""
LARGEST_FALL = 0.9
FEWEST_OF_CELL = 30
"""Reference rows that a cell needs for a mean and a spread of its own."""
FEWEST_OF_REFERENCE = 50
"""Reference rows below which nothing is watched."""
SMALLEST_SPREAD = 0.02
"""Log lengths are taken to vary at least by this, also where a reference shows less."""
BLOCKS = (10, 30, 100, 300)
"""Lengths of blocks that tell whether neighbours are alike, in rows."""
FEWEST_BLOCKS = 12
UNKNOWN = -1
"""Group of rows with which nothing can be compared."""
REFERENCE_PART = 0.5
"""Largest `4 h / (N I)`: beyond it the reference is too small for the fall asked for."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a stream is watched."""

    false_alarm: float
    """Chance of ever raising a false alarm, over the whole life of the log."""
    fall: float
    """Fall of the acceptance length to notice soon, as a share of it."""
    half_life: int
    """Rows in which half of `false_alarm` may be used up."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A fall beyond chance. Rows count from the first watched one."""

    row: int
    """With which it was certain."""
    onset: int
    """From which on it is most likely."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What became of one stream."""

    num_reference: int
    num_watched: int
    num_unknown: int
    """Watched rows of cells that the reference does not have; they tell nothing about content."""
    fall: float | None
    """Smallest fall that was looked for; None if the reference was too small to watch at all."""
    dependence: float
    """How many times the variance of sums exceeds that of independent requests."""
    chance: float
    """Bound on the chance of such evidence if nothing changed (anytime-valid p-value)."""
    alarm: Alarm | None


def watch(lengths: Floats, cells: Ints, num_reference: int, rules: Rules) -> Watched:
    """Watch a stream from the end of its reference on, up to the first alarm.

    Args:
        lengths: `[N]`, log acceptance length of each row in order of time.
        cells: `[N]`, cell of each row.
        num_reference: Rows at the beginning that are the reference.
        rules: How to watch.
    """
    groups = _grouped(cells, num_reference)
    past = _Reference(lengths[:num_reference], groups[:num_reference])
    now, now_groups = lengths[num_reference:], groups[num_reference:]
    if past.num_rows < FEWEST_OF_REFERENCE or not len(now):
        return Watched(
            num_reference=num_reference, num_watched=len(now),
            num_unknown=int((now_groups == UNKNOWN).sum()),
            fall=None, dependence=1.0, chance=1.0, alarm=None,
        )  # fmt: skip
    bound, fall = past.bound(rules)
    weights = _log_prior(len(now), rules.half_life)
    evidence = [past.evidence(now, now_groups, _times(fall, times)) for times, _ in DESIGNS]
    totals = [
        np.log(share) + _log_sum_over_starts(each, weights)
        for each, (_, share) in zip(evidence, DESIGNS, strict=True)
    ]
    joint = np.logaddexp.reduce(totals)
    hits = np.flatnonzero(joint >= bound)
    alarm = None
    if len(hits):
        row = int(hits[0])
        strongest = int(np.argmax([total[row] for total in totals]))
        alarm = Alarm(row=row, onset=_onset(evidence[strongest], row))
    raised_by = bound + np.log(rules.false_alarm)
    return Watched(
        num_reference=num_reference,
        num_watched=len(now),
        num_unknown=int((now_groups == UNKNOWN).sum()),
        fall=float(1 - np.exp(-fall)),
        dependence=past.dependence,
        chance=float(min(1.0, np.exp(raised_by - joint.max()))),
        alarm=alarm,
    )


class _Reference:
    """What is usual in each group, what evidence is made of, and what it is worth."""

    def __init__(self, lengths: Floats, groups: Ints) -> None:
        known = groups != UNKNOWN
        lengths, groups = lengths[known], groups[known]
        self.num_rows = len(lengths)
        self._means: dict[int, float] = {}
        self._spreads: dict[int, float] = {}
        self._centred: dict[int, Floats] = {}
        scores = np.zeros(len(lengths))
        precisions = np.zeros(len(lengths))
        for group in np.unique(groups).tolist():
            own = groups == group
            self._means[group] = mean = float(lengths[own].mean())
            self._spreads[group] = max(SMALLEST_SPREAD, float(lengths[own].std(ddof=1)))
            self._centred[group] = lengths[own] - mean
            precisions[own] = self._spreads[group] ** -2
            scores[own] = self._centred[group] * precisions[own]
        self._total_precision = float(precisions.sum())
        self.dependence = _dependence(scores)

    def evidence(self, lengths: Floats, groups: Ints, fall: float) -> Floats:
        """Give the log factor of each row for a fall in log length; 0 where nothing is usual."""
        given = np.zeros(len(lengths))
        for group, past in self._centred.items():
            here = groups == group
            tilt = fall / self._spreads[group] ** 2
            level = np.logaddexp.reduce(-tilt * past) - np.log(len(past))
            given[here] = -tilt * (lengths[here] - self._means[group]) - level
        return given / self.dependence

    def bound(self, rules: Rules) -> tuple[float, float]:
        """Give the log bound on R, and the fall in log length that it is for."""
        needed = np.log(1 / rules.false_alarm) + np.log(4 * rules.half_life)
        worth = self._total_precision / (2 * self.dependence)  # N I / d^2
        least = np.sqrt(4 * needed / (REFERENCE_PART * worth))
        fall = max(-np.log1p(-rules.fall), float(least))
        part = 1 / (worth * fall**2)
        raised = (1 - np.sqrt(1 - 4 * needed * part)) / (2 * part)  # solves h' = h + part h'^2
        return float(np.log(1 / rules.false_alarm) + raised - needed), float(fall)


def _grouped(cells: Ints, num_reference: int) -> Ints:
    """Give the group of each row `[N]`: its cell, or one for all that are rare in the reference.

    Cells that the reference does not have are `UNKNOWN`, and so are the rare ones if even together
    they are too few.
    """
    groups = number_cells(cells)
    counts = np.bincount(groups[:num_reference], minlength=int(groups.max(initial=-1)) + 1)
    is_rare = (counts > 0) & (counts < FEWEST_OF_CELL)
    together = len(counts) if counts[is_rare].sum() >= FEWEST_OF_CELL else UNKNOWN
    new = np.where(is_rare, together, np.where(counts == 0, UNKNOWN, np.arange(len(counts))))
    return new[groups]


def _dependence(scores: Floats) -> float:
    """Give the largest ratio of the variance of block sums to that of independent rows, from 1 on.

    A ratio counts only where it exceeds 1 by 2.5 of its standard errors; else it is chance.
    """
    ratios = [1.0]
    for length in BLOCKS:
        num_blocks = len(scores) // length
        if num_blocks < FEWEST_BLOCKS:
            break
        sums = scores[: num_blocks * length].reshape(num_blocks, length).sum(axis=1)
        ratio = float(sums.var(ddof=1) / (length * scores.var(ddof=1)))
        if ratio > 1 + 2.5 * np.sqrt(2 / (num_blocks - 1)):
            ratios.append(ratio)
    return max(ratios)


def _log_prior(num_rows: int, half_life: int) -> Floats:
    """Give log w_j = log(H / ((j + H)(j + H + 1))), which sums to 1, one half before j = H."""
    place = np.arange(num_rows) + half_life
    return np.log(half_life) - np.log(place) - np.log(place + 1.0)


def _log_sum_over_starts(evidence: Floats, weights: Floats) -> Floats:
    """Give log sum_j w_j E_j(n) for every n."""
    total = np.cumsum(evidence)
    before = total - evidence
    return total + np.logaddexp.accumulate(weights - before)


def _onset(evidence: Floats, row: int) -> int:
    """Give the start from which on the evidence up to a row is largest."""
    before = np.cumsum(evidence[: row + 1]) - evidence[: row + 1]
    return int(np.argmin(before))


def _times(fall: float, times: float) -> float:
    """Give a multiple of a fall in log length, as far as there is one."""
    return min(times * fall, -float(np.log1p(-LARGEST_FALL)))
