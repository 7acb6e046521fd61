"""What share of a fall is mix and what share is content; the parts add up exactly.

Traffic asks for tokens, and acceptance decides how many steps they take: so the mix is told in
shares of tokens, and what is divided is the mean number of steps per token, D = 1 / L. Between two
windows 0 and 1, with token shares u and steps per token d of every tenant (Bennet's indicator):

    D_1 - D_0 = sum (u_1 - u_0) (d_0 + d_1) / 2   mix: tenants ask for other shares
              + sum (d_1 - d_0) (u_0 + u_1) / 2   the tenants themselves

and in the same way each tenant's own d_1 - d_0 is divided among its kinds of prompt: into the mix
of kinds, and content, which is what is left. Times -L_0 L_1 these are tokens per step, and add up
to L_1 - L_0. A tenant or kind that one window lacks is mix: it has nothing to be compared with.

Intervals: both windows are resampled by session, or by request where none is known, and everything
is computed anew from each resample.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dflash_inference.drift.cells import Ints, first_rows, number_cells
from dflash_inference.statistics import Interval, bootstrap_ratios, percentile_interval
from dflash_train.records.served import Rows

FEWEST_TO_COMPARE = 20
"""Rows that a tenant or kind needs in both windows to be compared; those with fewer are one."""
ABSENT = 3
"""With fewer rows in one window and enough in the other, it has come or gone."""
MOST_TENANTS = 40
"""Tenants told apart; the smaller ones are one."""
MOST_UNITS = 2000
"""Units that are resampled; more are bundled at random first."""
OTHERS = -1
"""Stands for tenants or kinds that are too small to be told apart."""

Floats = NDArray[np.float64]


@dataclass(kw_only=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    interval: Interval


@dataclass(kw_only=True)
class TenantShares:
    """What one tenant has to do with the change."""

    tenant: int
    """Index of its name; -1 are all the small ones together."""
    num_reference: int
    num_current: int
    token_share_before: float
    token_share_now: float
    reference: Estimate | None
    """Acceptance length; None where there are too few rows."""
    current: Estimate | None
    relative: Estimate | None
    """Change as a share of the reference."""
    tenant_mix: float
    """Tokens per step that its share of the traffic moved; these three add up over tenants."""
    kind_mix: float
    content: float


@dataclass(kw_only=True)
class Division:
    """A change of the pooled acceptance length and its parts, in tokens per step."""

    reference: Estimate
    current: Estimate
    change: Estimate
    relative: Estimate
    tenant_mix: Estimate
    kind_mix: Estimate
    content: Estimate
    content_of_steps: Estimate
    """Share of the steps per token of now that content has added: what a tuning can win back."""
    tenants: list[TenantShares]
    """The largest first."""

    def share_of(self, part: Estimate) -> float | None:
        """Give a part's share of the change; None if the change may be chance."""
        low, high = self.change.interval.low, self.change.interval.high
        return None if low <= 0 <= high else part.value / self.change.value


@dataclass(frozen=True, kw_only=True)
class _Window:
    """One window in numbers: resamples lie along the first axis, the window itself is first."""

    tokens: Floats
    """`[1 + B, C]`, share of all tokens of each cell."""
    steps: Floats
    """`[1 + B, C]`, steps of each cell over all tokens."""
    counts: Ints
    """`[C]`, rows."""


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """`[1 + B, tenants]` each, in steps per token."""

    tenant_mix: Floats
    kind_mix: Floats
    content: Floats


def divide_change(
    reference: Rows, current: Rows, kinds: tuple[Ints, Ints], *, resamples: int, seed: int
) -> Division:
    """Divide the change between two windows.

    Args:
        reference: `[R_0]`.
        current: `[R_1]`.
        kinds: Kind of prompt of each row of both, in one numbering.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    split = len(reference)
    tenants, both = _large_tenants(reference, current), np.concatenate(kinds)
    is_small = _is_small(number_cells(tenants, both), split)
    cells = number_cells(tenants, np.where(is_small, OTHERS, both))
    tenant_of_cell = tenants[first_rows(cells)]
    drawn = [
        _window(rows, own, len(tenant_of_cell), resamples=resamples, seed=seed + place)
        for place, (rows, own) in enumerate(((reference, cells[:split]), (current, cells[split:])))
    ]
    names, tenant_of = np.unique(tenant_of_cell, return_inverse=True)
    parts = _divide(drawn[0], drawn[1], tenant_of, len(names))
    return _described(drawn, parts, names, tenant_of)


def _large_tenants(reference: Rows, current: Rows) -> Ints:
    """Give the tenants `[R_0 + R_1]` of both windows, the small ones as one."""
    tenants = np.concatenate([reference["tenant"], current["tenant"]]).astype(np.int64)
    tokens = np.bincount(tenants, np.concatenate([reference["tokens"], current["tokens"]]))
    large = np.argsort(-tokens, kind="stable")[:MOST_TENANTS]
    is_small = _is_small(tenants, len(reference)) | ~np.isin(tenants, large)
    return np.where(is_small, OTHERS, tenants)


def _is_small(cells: Ints, split: int) -> NDArray[np.bool_]:
    """Tell of each row `[R_0 + R_1]` whether its cell is too small to be told apart."""
    counts = [np.bincount(part, minlength=cells.max() + 1) for part in np.split(cells, [split])]
    fewest, most = np.minimum(*counts)[cells], np.maximum(*counts)[cells]
    has_come_or_gone = (fewest < ABSENT) & (most >= FEWEST_TO_COMPARE)
    return (fewest < FEWEST_TO_COMPARE) & ~has_come_or_gone


def _window(rows: Rows, cells: Ints, num_cells: int, *, resamples: int, seed: int) -> _Window:
    """Sum up a window by cell, as it is and resampled by unit."""
    units = _units(rows, seed)
    sums = np.zeros((2, units.max() + 1, num_cells))
    np.add.at(sums[0], (units, cells), rows["tokens"])
    np.add.at(sums[1], (units, cells), rows["steps"])
    numerators = np.concatenate(list(sums), axis=1)  # [U, 2C]
    denominators = np.repeat(sums[0].sum(axis=1, keepdims=True), 2 * num_cells, axis=1)
    whole = numerators.sum(axis=0) / denominators.sum(axis=0)
    ratios = bootstrap_ratios(numerators, denominators, resamples=resamples, seed=seed)
    table = np.concatenate([whole[None], ratios])
    return _Window(
        tokens=table[:, :num_cells],
        steps=table[:, num_cells:],
        counts=np.bincount(cells, minlength=num_cells),
    )


def _units(rows: Rows, seed: int) -> Ints:
    """Number the sessions; a row without one stands alone; too many are bundled at random."""
    known = rows["session"] != 0
    alone = np.arange(len(rows), dtype=np.uint64)
    units = number_cells(known, np.where(known, rows["session"], alone))
    num_units = int(units.max()) + 1
    if num_units <= MOST_UNITS:
        return units
    bundles = np.random.default_rng(seed).permutation(num_units) % MOST_UNITS
    return bundles[units]


def _divide(before: _Window, now: _Window, tenant_of: Ints, num_tenants: int) -> _Parts:
    """Divide the change of steps per token, of the windows and of each resample."""
    member = np.zeros((len(tenant_of), num_tenants))
    member[np.arange(len(tenant_of)), tenant_of] = 1
    tokens = (before.tokens @ member, now.tokens @ member)
    steps = (before.steps @ member, now.steps @ member)
    rows = np.minimum(before.counts @ member, now.counts @ member)
    mean = (steps[0].sum(axis=1) + steps[1].sum(axis=1))[:, None] / 2
    mix, own = _bennet(tokens, steps, has_both=rows >= FEWEST_TO_COMPARE)
    mix = mix - (tokens[1] - tokens[0]) * mean  # sums to the same; each beside the whole
    share = (tokens[0] + tokens[1]) / 2
    within = [
        _ratio(window.tokens, total[:, tenant_of])
        for window, total in zip((before, now), tokens, strict=True)
    ]
    steps_within = [
        _ratio(window.steps, total[:, tenant_of])
        for window, total in zip((before, now), tokens, strict=True)
    ]
    has_both = np.minimum(before.counts, now.counts) >= FEWEST_TO_COMPARE
    kind_mix, _ = _bennet((within[0], within[1]), (steps_within[0], steps_within[1]),
                          has_both=has_both)  # fmt: skip
    compared = (rows >= FEWEST_TO_COMPARE) & (tokens[0] > 0) & (tokens[1] > 0)
    kinds = np.where(compared, (kind_mix @ member) * share, 0.0)
    return _Parts(tenant_mix=mix, kind_mix=kinds, content=own - kinds)


def _bennet(
    tokens: tuple[Floats, Floats], steps: tuple[Floats, Floats], *, has_both: NDArray
) -> tuple[Floats, Floats]:
    """Divide the change of `steps` into that of `tokens` and that of steps per token, by cell.

    Args:
        tokens: `[..., C]` before and now, shares.
        steps: `[..., C]` before and now, per token of all cells.
        has_both: `[C]`, whether the cell can be compared; else all of its change is mix.
    """
    per_token = [_ratio(each, share) for each, share in zip(steps, tokens, strict=True)]
    change = steps[1] - steps[0]
    own = (per_token[1] - per_token[0]) * (tokens[0] + tokens[1]) / 2
    comparable = has_both & (tokens[0] > 0) & (tokens[1] > 0)
    own = np.where(comparable, own, 0.0)
    return change - own, own


def _described(drawn: list[_Window], parts: _Parts, names: Ints, tenant_of: Ints) -> Division:
    """Turn steps per token into tokens per step and give values with intervals."""
    before, now = (window.steps.sum(axis=1) for window in drawn)  # [1 + B]
    scale = -1 / (before * now)
    lengths = (1 / before, 1 / now)
    scaled = [part * scale[:, None] for part in (parts.tenant_mix, parts.kind_mix, parts.content)]
    tenants = [
        _tenant(place, int(name), drawn, tenant_of, scaled) for place, name in enumerate(names)
    ]
    return Division(
        reference=_estimate(lengths[0]),
        current=_estimate(lengths[1]),
        change=_estimate(lengths[1] - lengths[0]),
        relative=_estimate(lengths[1] / lengths[0] - 1),
        tenant_mix=_estimate(scaled[0].sum(axis=1)),
        kind_mix=_estimate(scaled[1].sum(axis=1)),
        content=_estimate(scaled[2].sum(axis=1)),
        content_of_steps=_estimate(parts.content.sum(axis=1) / now),
        tenants=sorted(tenants, key=lambda each: -each.token_share_before - each.token_share_now),
    )


def _tenant(
    place: int, name: int, drawn: list[_Window], tenant_of: Ints, scaled: list[Floats]
) -> TenantShares:
    own = tenant_of == place
    tokens = [window.tokens[:, own].sum(axis=1) for window in drawn]
    lengths = [
        _ratio(share, window.steps[:, own].sum(axis=1))
        for share, window in zip(tokens, drawn, strict=True)
    ]
    counts = [int(window.counts[own].sum()) for window in drawn]
    shown = [count >= FEWEST_TO_COMPARE for count in counts]
    return TenantShares(
        tenant=name,
        num_reference=counts[0],
        num_current=counts[1],
        token_share_before=float(tokens[0][0]),
        token_share_now=float(tokens[1][0]),
        reference=_estimate(lengths[0]) if shown[0] else None,
        current=_estimate(lengths[1]) if shown[1] else None,
        relative=_estimate(_ratio(lengths[1], lengths[0]) - 1) if all(shown) else None,
        tenant_mix=float(scaled[0][0, place]),
        kind_mix=float(scaled[1][0, place]),
        content=float(scaled[2][0, place]),
    )


def _estimate(samples: Floats) -> Estimate:
    """Give the first value with the interval of the others, `[1 + B]`."""
    return Estimate(value=float(samples[0]), interval=percentile_interval(samples[1:]))


def _ratio(numerators: Floats, denominators: Floats) -> Floats:
    """Divide; 0 where the denominator is 0."""
    return np.divide(
        numerators, denominators, out=np.zeros_like(numerators), where=denominators > 0
    )
