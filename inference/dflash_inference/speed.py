"""How fast the live prompts were decoded in each way, and where the milliseconds went.

All ways ran in one process, prompt by prompt in turn (live.py). The measure is `width_one`: the
decoder's own loop without drafts. A speed-up is the ratio of the mean seconds per output token,
each request counting alike; the token from prefill is not counted, its time neither. Seconds are
wall time.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dflash_inference.live import LIVE_FILE, LOOKUP_FILE, PLAIN_FILE, WIDTH_ONE_FILE
from dflash_inference.slices import Findings
from dflash_inference.statistics import bootstrap_ratios, percentile_interval
from dflash_inference.trace import DecodeTrace, StepTrace, read_traces
from dflash_train.config import EvaluateConfig

WAYS = {
    "transformers": PLAIN_FILE,
    "width_one": WIDTH_ONE_FILE,
    "prompt_lookup": LOOKUP_FILE,
    "drafter": LIVE_FILE,
}
"""Ways of decoding, and the file of their traces."""
PARTS = ("draft", "verify", "bookkeeping")

Ways = dict[str, list[DecodeTrace]]


def read_ways(folder: Path) -> Ways:
    """Read the live traces of each way; evaluations of earlier versions have no prompt lookup."""
    return {
        way: read_traces(folder / name) for way, name in WAYS.items() if (folder / name).exists()
    }


def speed_setting(details: dict[str, Any]) -> Findings:
    """Say what the speeds hold for, from an evaluation's manifest; unknown to earlier versions."""
    return {
        "setting": {
            "mode": details.get("live_mode", "exact"),
            "dtype": details.get("dtype"),
            "device": details["machine"].get("device"),
            "batch": 1,
            "temperature": 0,
        }
    }


def measure_speed(ways: Ways, config: EvaluateConfig) -> Findings:
    """Compare the ways of decoding; figures are None where nothing was decoded live."""
    plain, live = ways["width_one"], ways["drafter"]
    found = {way: measure_way(traces, plain, config) for way, traces in ways.items()}
    mine, steps = found["drafter"], _steps(live)
    plain_s = _mean([_seconds(step) for step in _steps(plain)])
    step_s = mine["seconds_per_step"]
    return {
        "tokens_per_second": {
            "plain": found["width_one"]["tokens_per_second"],
            "speculative": mine["tokens_per_second"],
        },
        "speed_up": mine["speed_up"],
        "speed_up_interval": mine["speed_up_interval"],
        "num_requests": len(live),
        "seconds_per_step": step_s,
        "seconds_per_plain_token": plain_s,
        # Acceptance length at which speculative decoding breaks even: one step in plain tokens.
        "step_cost": sum(step_s.values()) / plain_s if step_s and plain_s else None,
        "tokens_per_step": mine["tokens_per_step"],
        "prefill_seconds": {
            "plain": found["width_one"]["prefill_seconds"],
            "speculative": mine["prefill_seconds"],
        },
        "steps_by_source": dict(sorted(Counter(step.source for step in steps).items())),
        "ways": found,
    }


def measure_way(
    traces: list[DecodeTrace], plain: list[DecodeTrace], config: EvaluateConfig
) -> Findings:
    """Give the speed of one way of decoding, and the seconds of its steps and tokens.

    Args:
        traces: The way's.
        plain: Those at width 1, of the same requests.
        config: Resamples and seed of the interval.
    """
    steps = _steps(traces)
    num_tokens = sum(len(trace.output_ids) - 1 for trace in traces)
    seconds = {part: sum(getattr(step, f"{part}_s") for step in steps) for part in PARTS}
    total_s = sum(seconds.values())
    is_measured = bool(steps and total_s and num_tokens)
    speed_up, interval = _speed_up(plain, traces, config)

    def by(number: int) -> dict[str, float] | None:
        return {part: each / number for part, each in seconds.items()} if is_measured else None

    return {
        "tokens_per_second": num_tokens / total_s if is_measured else None,
        "speed_up": speed_up,
        "speed_up_interval": interval,
        "tokens_per_step": _mean([float(step.committed) for step in steps]),
        "seconds_per_step": by(len(steps)),
        "seconds_per_token": by(num_tokens),
        "prefill_seconds": _mean([trace.prefill_s for trace in traces]),
        "wall_seconds": sum(trace.prefill_s for trace in traces) + total_s,
    }


def _speed_up(
    plain: list[DecodeTrace], traces: list[DecodeTrace], config: EvaluateConfig
) -> tuple[float | None, list[float] | None]:
    """Give the ratio of mean seconds per output token, and its bootstrap interval by request."""
    others = {trace.id: trace for trace in plain}
    pairs = [(others[trace.id], trace) for trace in traces if trace.id in others]
    seconds = np.array(
        [
            [trace.decode_s / (len(trace.output_ids) - 1) for trace in pair]
            for pair in pairs
            if all(trace.steps and trace.decode_s for trace in pair)
        ]
    )
    if not len(seconds):
        return None, None
    ratios = bootstrap_ratios(
        seconds[:, :1], seconds[:, 1:], resamples=config.resamples, seed=config.seed
    )
    found = percentile_interval(ratios[:, 0])
    means = seconds.mean(0)
    return float(means[0] / means[1]), [found.low, found.high]


def _steps(traces: list[DecodeTrace]) -> list[StepTrace]:
    return [step for trace in traces for step in trace.steps]


def _seconds(step: StepTrace) -> float:
    return step.draft_s + step.verify_s + step.bookkeeping_s


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
