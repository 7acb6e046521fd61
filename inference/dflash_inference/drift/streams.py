"""Which requests are watched together: all of them, with and without the mix, and each tenant's.

- `content`: every request beside its own cell (tenant and kind of prompt). A change of the mix does
  not show here, a change within cells does, and soonest, since the most varied part is taken out.
- `traffic`: every request beside all others: what the server feels, mix and content together.
- One stream for each tenant, request beside all others of that tenant.

The chance of a false alarm is divided among them, half to `content`, so that it holds for all
together. A tenant's stream is as much shorter as its share, and so is the time in which half of its
chance may be used up.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dflash_inference.drift.alarm import (
    FEWEST_OF_CELL,
    FEWEST_OF_REFERENCE,
    Rules,
    Watched,
    watch,
)
from dflash_inference.drift.cells import Ints, number_cells
from dflash_inference.slices import PROMPT_EDGES
from dflash_train.config import DriftConfig, PromptKind
from dflash_train.records.served import Rows, ServedRows

CONTENT, TRAFFIC = "content", "traffic"
SHARES = {CONTENT: 0.5, TRAFFIC: 0.25}
"""Of the chance of a false alarm; the tenants divide the rest."""
SMALLEST_STEPS = 1e-9


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Some rows of a log, in order, and what was found in them."""

    name: str
    """`content`, `traffic`, or a tenant's."""
    places: Ints
    """Rows of the log."""
    watched: Watched

    @property
    def alarm_place(self) -> int | None:
        """Row of the log that raised the alarm."""
        alarm = self.watched.alarm
        return None if alarm is None else int(self.places[self.watched.num_reference + alarm.row])

    @property
    def onset_place(self) -> int | None:
        """Row of the log from which on a fall is most likely."""
        alarm = self.watched.alarm
        return None if alarm is None else int(self.places[self.watched.num_reference + alarm.onset])


def kinds_of(rows: Rows, kinds: list[PromptKind], *, num_reference: int) -> Ints:
    """Give the kind of prompt of each row as a number, `[R]`; equal numbers are of one kind.

    System prompts that the reference hardly has are one kind: some hold a date or a name, and are
    new with every request.

    Args:
        rows: `[R]`.
        kinds: What tells prompts apart; none makes all of one kind.
        num_reference: Rows at the beginning that are the reference.
    """
    columns: list[NDArray] = [np.zeros(len(rows))]
    if PromptKind.template in kinds:
        found, places = np.unique(rows["template"], return_inverse=True)
        counts = np.bincount(places[:num_reference], minlength=len(found))
        columns.append(np.where(counts[places] >= FEWEST_OF_CELL, places + 1, 0))
    if PromptKind.prompt_length in kinds:
        columns.append(np.searchsorted(PROMPT_EDGES, rows["prompt_tokens"], side="right"))
    if PromptKind.sampling in kinds:
        known = ~np.isnan(rows["temperature"])
        columns.append(np.where(known, rows["temperature"] > 0, -1))
    return number_cells(*columns)


def cells_of(rows: Rows, kinds: Ints) -> Ints:
    """Give the cell of each row as a number, `[R]`: its tenant and kind of prompt."""
    return number_cells(rows["tenant"], kinds)


def log_lengths(rows: Rows) -> NDArray[np.float64]:
    """Give the log acceptance length of each row, `[R]`."""
    return np.log(rows["tokens"] / np.maximum(rows["steps"], SMALLEST_STEPS))


def streams_of(
    served: ServedRows, kinds: Ints, *, num_reference: int, config: DriftConfig
) -> Iterator[Stream]:
    """Watch every stream of a log; `content` comes first, tenants last, the largest first.

    Args:
        served: The log, in order.
        kinds: Of `kinds_of`, `[R]`.
        num_reference: Rows at the beginning that are the reference.
        config: How to watch.
    """
    rows = served.rows
    lengths, cells = log_lengths(rows), cells_of(rows, kinds)
    everything = np.arange(len(rows))
    tenants = _tenants_to_watch(rows, num_reference)
    # Where all rows are of one cell, all streams would be the same.
    names = [CONTENT] if len(np.unique(cells)) == 1 else [CONTENT, TRAFFIC]
    per_tenant = (1 - sum(SHARES.values())) / max(1, len(tenants))
    weights = [SHARES[name] for name in names]
    if len(tenants) > 1:
        weights += [per_tenant] * len(tenants)
    budget = config.false_alarm / sum(weights)

    def rules(weight: float, *, share: float = 1.0) -> Rules:
        return Rules(
            false_alarm=budget * weight,
            fall=config.smallest_fall,
            half_life=max(1, round(config.half_life_requests * share)),
        )

    for name in names:
        used = cells if name == CONTENT else np.zeros_like(cells)
        found = watch(lengths, used, num_reference, rules(SHARES[name]))
        yield Stream(name=name, places=everything, watched=found)
    if len(tenants) < 2:
        return
    for tenant in tenants:
        places = np.flatnonzero(rows["tenant"] == tenant)
        own = int((places < num_reference).sum())
        followed = rules(per_tenant, share=own / num_reference)
        found = watch(lengths[places], np.zeros_like(places), own, followed)
        yield Stream(name=served.tenants[tenant], places=places, watched=found)


def _tenants_to_watch(rows: Rows, num_reference: int) -> list[int]:
    """List the tenants whose reference is large enough, the largest first."""
    found, counts = np.unique(rows["tenant"][:num_reference], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [int(found[place]) for place in order if counts[place] >= FEWEST_OF_REFERENCE]
