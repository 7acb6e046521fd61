"""When tuning pays: what a run costs beside the decoding that it saves.

A step takes as long as before and commits more tokens, so an output token takes less by the ratio
of the lengths:

    server seconds saved a day = tokens a day * TPOT / requests at once * (1 - L_now / L_tuned)
    break-even, days = run hours * price / (server hours saved a day * price)

Nothing is guessed: what is not known is named, and then there are no days.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dflash_inference.drift.shares import Estimate
from dflash_inference.statistics import Interval
from dflash_train.config import DriftConfig

SECONDS_PER_HOUR = 3600.0


@dataclass(kw_only=True)
class Payback:
    """Cost and gain of a tuning."""

    tokens_per_day: float | None
    tpot_ms: float | None
    requests_at_once: float
    gain: Estimate | None
    """Of the acceptance length, as a share of it; one that was given has no width."""
    gain_from: str
    run_hours: float | None
    cost: float | None
    """Run hours times their price."""
    saved_hours_per_day: Estimate | None
    """Of servers."""
    saved_per_day: Estimate | None
    """The same times their price."""
    days: Estimate | None
    """Until the run is paid for; without end (inf) where the gain may be none."""
    missing: list[str]
    """What would have to be known."""


def weigh(
    config: DriftConfig,
    *,
    tokens_per_day: float | None,
    tpot_ms: float | None,
    content_of_steps: Estimate,
    has_fallen: bool,
    planned_hours: Callable[[], float | None],
    measured_gain: Estimate | None = None,
) -> Payback:
    """Weigh a tuning against what it saves.

    Args:
        config: Prices, and what the user knows better.
        tokens_per_day: As read.
        tpot_ms: As read, time per output token.
        content_of_steps: Share of today's steps per token that content has added.
        has_fallen: Whether there is a fall beyond chance, which a tuning could win back.
        planned_hours: Gives those of a tuning; asked only where all else is known.
        measured_gain: Of an earlier tuning, as a share.
    """
    tokens_per_day = config.tokens_per_day or tokens_per_day
    tpot_ms = config.tpot_ms or tpot_ms
    gain, gain_from = _gain(config, measured_gain, content_of_steps, has_fallen=has_fallen)
    run_hours = config.run_hours
    if run_hours is None and tokens_per_day and tpot_ms and gain:
        run_hours = planned_hours()
    known = {
        "drift.tokens_per_day": tokens_per_day,
        "drift.tpot_ms": tpot_ms,
        "drift.gain": gain,
        "drift.run_hours": run_hours,
    }
    missing = [name for name, value in known.items() if value is None]
    cost = None if run_hours is None else run_hours * config.run_price_per_hour
    hours = money = days = None
    if tokens_per_day and tpot_ms and gain:
        busy_s = tokens_per_day * tpot_ms / 1000 / config.requests_at_once
        hours = _mapped(gain, lambda share: busy_s / SECONDS_PER_HOUR * (1 - 1 / (1 + share)))
        money = _mapped(hours, lambda saved: saved * config.serving_price_per_hour)
    if money and cost:
        days = _days(cost, money)
    return Payback(
        tokens_per_day=tokens_per_day, tpot_ms=tpot_ms, requests_at_once=config.requests_at_once,
        gain=gain, gain_from=gain_from, run_hours=run_hours, cost=cost, saved_hours_per_day=hours,
        saved_per_day=money, days=days, missing=missing,
    )  # fmt: skip


def _gain(
    config: DriftConfig,
    measured: Estimate | None,
    content_of_steps: Estimate,
    *,
    has_fallen: bool,
) -> tuple[Estimate | None, str]:
    """Give the gain that was given or measured, else what content cost: 1 / (1 - share) - 1."""
    if config.gain is not None:
        return Estimate(value=config.gain, interval=Interval(low=config.gain, high=config.gain)), (
            "drift.gain"
        )
    if measured is not None:
        return measured, f"the tuning in {config.gain_from}"
    if not has_fallen or content_of_steps.value <= 0:
        return None, "nothing: no fall of content beyond chance"
    return _mapped(content_of_steps, lambda share: share / (1 - share)), "the fall through content"


def _mapped(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    """Map value and ends by a function that does not fall."""
    low, high = estimate.interval.low, estimate.interval.high
    return Estimate(
        value=function(estimate.value), interval=Interval(low=function(low), high=function(high))
    )


def _days(cost: float, saved: Estimate) -> Estimate:
    def days(money: float) -> float:
        return cost / money if money > 0 else float("inf")

    return Estimate(
        value=days(saved.value),
        interval=Interval(low=days(saved.interval.high), high=days(saved.interval.low)),
    )
