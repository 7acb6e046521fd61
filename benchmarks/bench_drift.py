"""How soon `drift` notices that acceptance fell, and how often it cries wolf.

    make bench-drift
    python -m benchmarks.bench_drift [--logs 100] [--undisturbed 300] [--requests 20000]

Logs are resampled from measured requests (`served_counts.json`: numbers only, with their origin).
Half of each is as measured; in the other half the acceptance length is 10 % lower, in two ways:
`slower`, every answer takes more steps, and `other`, answers that were drafted badly come more
often within their tenant. The streams are those of `dflash-train drift`; a fall is noticed with the
first alarm of any stream. Settings are the defaults, but for kinds of prompts, which are left out:
five measured values of a kind, drawn a hundred times, vary less than any traffic does.

The last line is one JSON object; the exit code is 1 if a goal is missed. The goals hold for the
sets `fleet` (with HumanEval) and `gsm8k`. `fleet-alone` is shown beside them: its answers of 64
tokens vary so much that a test with this few false alarms needs more requests on average than the
goal allows; `least_delay` is what the variance alone costs.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from tqdm import tqdm

from dflash_inference.drift.streams import kinds_of, streams_of
from dflash_train.config import DriftConfig
from dflash_train.records.served import SERVED_ROW, ServedRows

COUNTS = Path(__file__).with_name("served_counts.json")
FALL = 0.1
SECONDS_BETWEEN = 10.0
FALLS = ("slower", "other")
GOALS = ("fleet", "gsm8k")
STEEPEST, HALVINGS = 60.0, 60
WITHIN = 0.02
"""Share of the requests after a fall in which it has to be noticed."""
UNDISTURBED = 20
"""Logs of which none may raise an alarm."""


@dataclass(kw_only=True)
class Measured:
    """Requests to resample, `[M]` each."""

    tokens: NDArray[np.float64]
    steps: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    tenants: NDArray[np.int64]
    names: list[str]

    def only(self, is_kept: NDArray[np.bool_]) -> "Measured":
        """Give some of the requests."""
        return replace(
            self,
            tokens=self.tokens[is_kept], steps=self.steps[is_kept],
            prompt_tokens=self.prompt_tokens[is_kept], tenants=self.tenants[is_kept],
        )  # fmt: skip


def read_measured() -> dict[str, Measured]:
    """Read the measured sets, and the fleet without HumanEval."""
    found: dict[str, Measured] = {}
    for name, entry in orjson.loads(COUNTS.read_bytes())["sets"].items():
        columns = entry["columns"]
        names, tenants = np.unique(columns["tenant"], return_inverse=True)
        found[name] = Measured(
            tokens=np.array(columns["tokens"], float),
            steps=np.array(columns["steps"], float),
            prompt_tokens=np.array(columns["prompt_tokens"]),
            tenants=tenants,
            names=names.tolist(),
        )
    fleet = found["fleet"]
    found["fleet-alone"] = fleet.only(fleet.tenants != fleet.names.index("humaneval"))
    return found


def resampled(measured: Measured, *, num_requests: int, fall: str | None, seed: int) -> ServedRows:
    """Draw a log, the second half of which has fallen.

    Args:
        measured: To draw from, with replacement.
        num_requests: Of the log.
        fall: One of `FALLS`; None leaves the log undisturbed.
        seed: Of the draw.
    """
    generator = np.random.default_rng(seed)
    half = num_requests // 2
    drawn = generator.integers(0, len(measured.tokens), num_requests)
    if fall == "other":
        drawn[half:] = generator.choice(
            len(measured.tokens), num_requests - half, p=_tilted(measured)
        )
    rows = np.zeros(num_requests, SERVED_ROW)
    rows["moment"] = SECONDS_BETWEEN * np.arange(num_requests)
    rows["tokens"], rows["steps"] = measured.tokens[drawn], measured.steps[drawn]
    rows["prompt_tokens"] = measured.prompt_tokens[drawn]
    rows["tenant"] = measured.tenants[drawn]
    rows["decode_s"] = rows["temperature"] = np.nan
    if fall == "slower":
        more = rows["steps"][half:] / (1 - FALL)
        rows["steps"][half:] = np.floor(more + generator.random(num_requests - half))
    return ServedRows(rows=rows, tenants=measured.names, read=num_requests)


def _tilted(measured: Measured) -> NDArray[np.float64]:
    """Weigh requests by exp(-t length) within each tenant so that its pooled length falls."""
    weights = np.zeros(len(measured.tokens))
    for tenant in np.unique(measured.tenants):
        own = measured.tenants == tenant
        tokens, steps = measured.tokens[own], measured.steps[own]
        above = tokens / steps - (tokens / steps).min()
        wanted = (1 - FALL) * tokens.sum() / steps.sum()
        low, high = 0.0, STEEPEST
        for _ in range(HALVINGS):
            tilt = (low + high) / 2
            kept = np.exp(-tilt * above)
            is_too_long = (kept @ tokens) / (kept @ steps) > wanted
            low, high = (tilt, high) if is_too_long else (low, tilt)
        kept = np.exp(-high * above)
        weights[own] = kept / kept.sum() * own.sum()
    return weights / weights.sum()


def first_alarm(served: ServedRows, config: DriftConfig) -> int | None:
    """Give the row with which any stream raises an alarm; None if none does."""
    num_reference = min(config.reference_requests, len(served.rows) // 2)
    kinds = kinds_of(served.rows, config.kinds, num_reference=num_reference)
    streams = streams_of(served, kinds, num_reference=num_reference, config=config)
    rows = [stream.alarm_place for stream in streams if stream.alarm_place is not None]
    return min(rows, default=None)


def settings() -> DriftConfig:
    """Give the defaults without kinds of prompts."""
    return DriftConfig(kinds=[])


def measure(
    measured: Measured, *, num_requests: int, num_logs: int, num_undisturbed: int
) -> dict[str, Any]:
    """Give delays in requests for both kinds of fall, and false alarms."""
    config = settings()
    half = num_requests // 2
    found: dict[str, Any] = {"least_delay": round(least_delay(measured, config), 1)}
    for fall in FALLS:
        delays: list[float] = []
        early = 0
        for seed in tqdm(range(num_logs), desc=fall, file=sys.stderr, leave=False):
            log = resampled(measured, num_requests=num_requests, fall=fall, seed=seed)
            row = first_alarm(log, config)
            early += row is not None and row < half
            delays.append(np.inf if row is None else row - half + 1)
        after = np.array([delay for delay in delays if delay > 0])
        found[fall] = _described(after, within=WITHIN * half) | {"alarms_before": early}
    alarms = [
        first_alarm(
            resampled(measured, num_requests=num_requests, fall=None, seed=10_000 + seed), config
        )
        is not None
        for seed in tqdm(range(num_undisturbed), desc="undisturbed", file=sys.stderr, leave=False)
    ]
    found["undisturbed"] = {
        "logs": num_undisturbed,
        "false_alarms": sum(alarms),
        f"in_the_first_{UNDISTURBED}": sum(alarms[:UNDISTURBED]),
    }
    return found


def least_delay(measured: Measured, config: DriftConfig) -> float:
    """Give log(1 / false alarm) / I, below which no test's mean delay can stay by much.

    I is what a request tells of a known fall of `FALL`, were log lengths normal within tenants.
    """
    lengths = np.log(measured.tokens / measured.steps)
    shift = -np.log1p(-FALL)
    told = 0.0
    for tenant in np.unique(measured.tenants):
        own = measured.tenants == tenant
        told += own.mean() * shift**2 / (2 * lengths[own].var(ddof=1))
    return float(np.log(1 / config.false_alarm) / told)


def _described(delays: NDArray[np.float64], *, within: float) -> dict[str, Any]:
    shown = {"mean": delays.mean(), "largest": delays.max()}
    for share in (5, 50, 90, 95):
        shown[f"p{share}"] = np.percentile(delays, share)
    return {
        **{name: round(float(value), 1) for name, value in shown.items()},
        "logs": len(delays),
        "later_than_goal": int((delays > within).sum()),
        "goal": within,
    }


def is_met(found: dict[str, Any]) -> bool:
    """Tell whether every fall of `slower` was noticed in time and no early log was disturbed."""
    return (
        found["slower"]["later_than_goal"] == 0
        and found["undisturbed"][f"in_the_first_{UNDISTURBED}"] == 0
    )


def main() -> int:
    """Measure all sets and print; 1 if a goal is missed."""
    options = _options()
    results: dict[str, Any] = {}
    for name, measured in read_measured().items():
        found = results[name] = measure(
            measured,
            num_requests=options.requests,
            num_logs=options.logs,
            num_undisturbed=options.undisturbed,
        )
        for fall in FALLS:
            shown = found[fall]
            print(
                f"{name:12} {fall:7} noticed after {shown['mean']} requests on average, median "
                f"{shown['p50']}, p95 {shown['p95']}, largest {shown['largest']}; "
                f"{shown['later_than_goal']} of {shown['logs']} later than {shown['goal']:.0f}"
            )
        print(f"{name:12} undisturbed {found['undisturbed']}", flush=True)
    met = all(is_met(results[name]) for name in GOALS)
    print(json.dumps({"requests": options.requests, "fall": FALL, "sets": results, "met": met}))
    return 0 if met else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--logs", type=int, default=100, help="with a fall, of each kind")
    parser.add_argument("--undisturbed", type=int, default=300, help="logs without one")
    parser.add_argument("--requests", type=int, default=20_000, help="of each log")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
