"""How likely a draft is kept once those before it were, learnt while decoding.

For each slot of a block two counts: how often verify reached it, and how often it kept the draft
there. Their ratio is the conditional acceptance of the slot; it is right also where the number of
verified drafts changed from step to step, since a slot that was not verified counts as nothing.
Counts fade, so a change of text is noticed. Few counts are held back by what is expected anyhow: a
slot by the slot before it, a request by all requests.
"""

import numpy as np
from numpy.typing import NDArray

Rates = NDArray[np.float64]
"""`[n]`, each in (0, 1): of every slot, the probability that it is kept once it is reached."""


class RunningAcceptance:
    """Fading counts of one kind of draft."""

    def __init__(self, num_slots: int, *, kept_share: float, trust: float) -> None:
        """Start without any count.

        Args:
            num_slots: Most drafts of a step.
            kept_share: What a new step leaves of the counts before it, in (0, 1]; their memory is
                about `1 / (1 - kept_share)` steps.
            trust: Steps that the expected rates are worth beside the counts.
        """
        self._kept_share, self._trust = kept_share, trust
        self._reached = np.zeros(num_slots)
        self._kept = np.zeros(num_slots)

    def observe(self, num_kept: int, *, num_verified: int) -> None:
        """Count one step: drafts that the target kept, of those that it verified."""
        self._reached *= self._kept_share
        self._kept *= self._kept_share
        self._reached[: min(num_kept + 1, num_verified)] += 1
        self._kept[:num_kept] += 1

    def rates(self, expected: Rates) -> Rates:
        """Give the rates, held back by expected ones `[n]` where there are few counts."""
        return (self._kept + self._trust * expected) / (self._reached + self._trust)

    def rates_from(self, first_guess: float) -> Rates:
        """Give the rates, each held back by the one before it, the first by a guess."""
        rates = np.empty_like(self._kept)
        before = first_guess
        for slot, (kept, reached) in enumerate(zip(self._kept, self._reached, strict=True)):
            before = (kept + self._trust * before) / (reached + self._trust)
            rates[slot] = before
        return rates


def expected_kept(rates: Rates) -> Rates:
    """Give for 0, 1, ... n verified drafts how many are kept on average, `[n + 1]`."""
    return np.concatenate([[0.0], rates.cumprod().cumsum()])
