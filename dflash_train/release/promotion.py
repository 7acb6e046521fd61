"""The rule by which a tuned drafter replaces the one that serves: written down before the run.

A candidate is promoted if all of this holds, else the incumbent stays:

1. the newest window has at least `min_requests` requests;
2. over all of its traffic the lower end of the paired 95 % interval of the gain lies above zero: a
   tie promotes nothing;
3. no tenant is shown to lose: its mean loss is above `tenant_margin` and its whole interval lies
   below zero;
4. the doctor finds nothing wrong with the candidate.

How chance is treated in 3. To ask that every tenant be shown *not* to lose (its lower end above the
margin) would refuse every candidate wherever one tenant is small. To ask for its mean alone would
refuse by noise: a mean with a standard error of 2 % lies below -2 % once in six times though
nothing has changed, and of ten such tenants one does four times in five. So a loss must be larger
than the margin and beyond chance. The price: of tenants that lose nothing, at most one in forty is
taken for a loser, which costs a tuning and nothing else; and a small loss of a small tenant passes.
It is seen, though: a tenant whose mean lies below the margin within chance is named in the verdict,
and a rollback is one command.

Tenants with fewer than `fewest_requests` requests make no claim each. They are judged together, as
one tenant, so nobody stands outside the rule.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from dflash_train.records.manifest import content_hash


@dataclass(frozen=True, kw_only=True)
class PromotionRule:
    """What a candidate must show; fixed before anything is trained."""

    min_requests: int
    """Fewest requests of the newest window."""
    tenant_margin: float
    """Share of its acceptance length that no tenant may lose."""
    fewest_requests: int
    """Fewest requests of a tenant that is judged for itself."""
    resamples: int
    """Of the bootstrap behind each interval."""
    seed: int
    """Of that bootstrap."""

    @property
    def hash(self) -> str:
        """Hash of all numbers."""
        return content_hash(asdict(self))

    def sentences(self) -> list[str]:
        """Say what must hold, in words."""
        return [
            f"the newest window has at least {self.min_requests} requests",
            "over all its traffic the paired 95 % interval of the gain lies above zero",
            f"no tenant loses more than {self.tenant_margin:.1%}, its interval wholly below zero "
            f"(those with fewer than {self.fewest_requests} requests count as one)",
            "the doctor finds nothing wrong",
        ]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The candidate against the incumbent on the same requests."""

    name: str
    """Whose requests."""
    num_requests: int
    incumbent: float
    """Pooled acceptance length."""
    candidate: float
    relative: float
    """Of the candidate over the incumbent, less 1."""
    low: float
    """Lower end of its paired 95 % interval."""
    high: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a candidate is promoted, and every reason why not."""

    is_promoted: bool
    reasons: list[str]
    """What of the rule does not hold; empty if it is promoted."""
    remarks: list[str] = field(default_factory=list)
    """What does not decide and should be known."""

    def as_json(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)


def judge(
    rule: PromotionRule, *, traffic: Gain, tenants: list[Gain], failed_checks: list[str]
) -> Verdict:
    """Judge a candidate by the rule.

    Args:
        rule: As it was written down.
        traffic: The gain over the whole newest window.
        tenants: That of each part of the traffic, here and in earlier runs, on which nobody may
            lose; those of too few requests are together in one.
        failed_checks: Names of the doctor's checks that failed.
    """
    large = [gain for gain in tenants if gain.num_requests >= rule.fewest_requests]
    reasons = _reasons_of_traffic(rule, traffic)
    reasons += [_loss(gain, rule) for gain in large if _is_shown_to_lose(gain, rule)]
    if failed_checks:
        reasons.append(f"the doctor's checks failed: {', '.join(failed_checks)}")
    return Verdict(
        is_promoted=not reasons, reasons=reasons, remarks=_remarks(rule, traffic, tenants)
    )


def _reasons_of_traffic(rule: PromotionRule, traffic: Gain) -> list[str]:
    reasons: list[str] = []
    if traffic.num_requests < rule.min_requests:
        reasons.append(
            f"the newest window has {traffic.num_requests} requests, fewer than {rule.min_requests}"
        )
    if traffic.low <= 0:
        verb = "loses" if traffic.high < 0 else "ties"
        reasons.append(f"it {verb} over the whole traffic ({_figures(traffic)})")
    return reasons


def _remarks(rule: PromotionRule, traffic: Gain, tenants: list[Gain]) -> list[str]:
    remarks: list[str] = []
    for gain in tenants:
        if gain.num_requests < rule.fewest_requests:
            remarks.append(
                f"{gain.name} is not judged: {gain.num_requests} requests, fewer than "
                f"{rule.fewest_requests} make no claim"
            )
        elif gain.relative < -rule.tenant_margin and not _is_shown_to_lose(gain, rule):
            remarks.append(f"{gain.name} may lose, within chance ({_figures(gain)})")
    return remarks


def _is_shown_to_lose(gain: Gain, rule: PromotionRule) -> bool:
    return gain.relative < -rule.tenant_margin and gain.high < 0


def _loss(gain: Gain, rule: PromotionRule) -> str:
    return f"{gain.name} loses more than {rule.tenant_margin:.1%} ({_figures(gain)})"


def _figures(gain: Gain) -> str:
    return (
        f"{gain.relative:+.1%}, 95 % interval {gain.low:+.1%} to {gain.high:+.1%}, "
        f"{gain.num_requests} requests"
    )
