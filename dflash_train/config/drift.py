"""How served acceptance is watched, and what a tuning costs and brings: `dflash-train drift`."""

import math
from dataclasses import dataclass, field
from enum import Enum

from dflash_train.config.checks import require
from dflash_train.config.data import parse_moment


class PromptKind(Enum):
    """What tells kinds of prompts of one tenant apart."""

    template = "template"
    """The system prompt."""
    prompt_length = "prompt_length"
    """Below 128, 512, 2048, 8192 tokens, or more."""
    sampling = "sampling"
    """Greedy or sampled."""


@dataclass(kw_only=True)
class DriftConfig:
    """What is watched and how. One of `data.logs`, `traces`, `pages`, `metrics_url` is read."""

    traces: list[str] = field(default_factory=list)
    """Trace files or run folders, in order of time."""
    pages: list[str] = field(default_factory=list)
    """Files or globs of saved pages of a server's `/metrics`; each is read at its files' times."""
    metrics_url: str | None = None
    """Address of a server's `/metrics`; each call adds its counts to those of earlier calls."""
    polls: int = 1
    """How often one call reads `metrics_url`."""
    poll_s: float = 60.0
    """Seconds between two of these."""
    since: str | None = None
    """RFC 3339 time before which nothing counts: when the drafter that serves went live."""
    reference_requests: int = 4000
    """First requests, which say what is usual; at most the first half of what there is."""
    kinds: list[PromptKind] = field(
        default_factory=lambda: [PromptKind.template, PromptKind.prompt_length]
    )
    """What makes a kind of prompt of its own, beside the tenant."""
    smallest_fall: float = 0.1
    """Fall of the acceptance length to be noticed soon, as a share of it."""
    false_alarm: float = 0.01
    """Chance of ever raising a false alarm, over all tenants and the whole life of the log."""
    half_life_requests: int = 10_000
    """Requests after which half of that chance is used up."""
    tpot_ms: float | None = None
    """Time per output token of a request, in ms; None takes the log's or the server's own."""
    requests_at_once: float = 1.0
    """Requests that a server decodes together while `tpot_ms` passes."""
    tokens_per_day: float | None = None
    """Output tokens served a day; None counts those that are read."""
    gain: float | None = None
    """What a tuning adds to the acceptance length, as a share of it; None takes `gain_from`, else
    what the fall lost through content."""
    gain_from: str | None = None
    """Run folder of an earlier `tune`, whose paired gain on its newest window stands for `gain`."""
    run_hours: float | None = None
    """Hours that a tuning takes; None takes those of `train --dry-run`."""
    run_price_per_hour: float = 1.0
    """Price of an hour of the machine that tunes, in any currency."""
    serving_price_per_hour: float = 1.0
    """Price of an hour of a server, in the same."""

    def __post_init__(self) -> None:
        for name in ("polls", "reference_requests", "half_life_requests"):
            value = getattr(self, name)
            require(value >= 1, f"drift.{name} (={value}) must be at least 1.")
        for name in ("poll_s", "tpot_ms", "requests_at_once", "tokens_per_day", "gain", "run_hours",
                     "run_price_per_hour", "serving_price_per_hour"):  # fmt: skip
            value = getattr(self, name)
            require(
                value is None or (value > 0 and math.isfinite(value)),
                f"drift.{name} (={value}) must be a number above 0. Leave it out if it is unknown.",
            )
        for name, example in (("smallest_fall", 0.1), ("false_alarm", 0.01)):
            value = getattr(self, name)
            require(
                0 < value < 1,
                f"drift.{name} (={value}) must lie between 0 and 1. Set it to {example}.",
            )
        require(
            self.gain is None or self.gain_from is None,
            f"drift.gain (={self.gain}) and drift.gain_from (={self.gain_from}) are one too many. "
            "Leave one out.",
        )
        if self.since is not None:
            try:
                parse_moment(self.since)
            except ValueError as error:
                raise ValueError(
                    f"drift.since (={self.since}) must be a date or an RFC 3339 time. Set it to "
                    "2026-10-01T00:00:00Z, for example."
                ) from error

    @property
    def first_moment(self) -> float | None:
        """`since` in seconds since 1970."""
        return None if self.since is None else parse_moment(self.since).timestamp()
