"""Acceptance length of every part of the traffic: who and what gains, and where in an answer.

A slice is judged like the whole: pooled, with its own bootstrap interval. Slices by position in the
answer cut requests into pieces, so there a request counts with the steps that begin in the piece.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson

from dflash_inference.statistics import (
    Interval,
    RequestSums,
    acceptance_length,
    by_group,
    paired_difference,
)
from dflash_inference.trace import DecodeTrace
from dflash_train.config import EvaluateConfig
from dflash_train.records.conversation import read_split

Findings = dict[str, Any]
BlockShape = dict[str, int]
"""K, most drafts of a step, and the ceiling of the acceptance length (drafts + 1), by name."""

PROMPT_EDGES = (0, 128, 512, 2048, 8192)
"""First prompt length of each slice, in tokens; the last has no end."""
POSITION_EDGES = (0, 16, 64, 256, 1024)
"""First output position of each slice, in tokens behind the prompt."""
UNKNOWN = "unknown"


def measure(
    traces: list[DecodeTrace], config: EvaluateConfig, block: BlockShape
) -> Findings | None:
    """Give both acceptance lengths with intervals, ceiling and counts; None if there is no step."""
    sums = RequestSums.of(traces)
    if sums.num_requests == 0:
        return None
    found = acceptance_length(sums, resamples=config.resamples, seed=config.seed)
    return as_plain(found) | block


def compare(
    drafter: list[DecodeTrace], other: list[DecodeTrace], config: EvaluateConfig, block: BlockShape
) -> Findings | None:
    """Give another way of drafting and the paired difference to it, on the requests both have."""
    shared = {trace.id for trace in other}
    drafter = [trace for trace in drafter if trace.id in shared]
    found = measure(other, config, block)
    if found is None:
        return None
    difference = paired_difference(
        RequestSums.of(drafter),
        RequestSums.of(other),
        resamples=config.resamples,
        seed=config.seed,
    )
    return {
        "acceptance_length": found,
        "difference": as_plain(difference) | {"verdict": difference.verdict},
    }


def find_slices(
    traffic: list[DecodeTrace],
    lookup: list[DecodeTrace],
    foreign: list[DecodeTrace],
    config: EvaluateConfig,
    block: BlockShape,
) -> list[Findings]:
    """Give the figures of each tenant, the largest first; its key is shown, never its name."""
    lookup_groups, foreign_groups = by_group(lookup), by_group(foreign)
    return [
        {
            "label": f"tenant {number}",
            "tenant": tenant,
            "acceptance_length": measure(traces, config, block),
            "prompt_lookup": compare(traces, lookup_groups[tenant], config, block),
            "foreign_features": compare(traces, foreign_groups.get(tenant, []), config, block),
        }
        for number, (tenant, traces) in enumerate(by_group(traffic).items(), start=1)
    ]


def find_cuts(
    traffic: list[DecodeTrace],
    lookup: list[DecodeTrace],
    temperatures: dict[str, float | None],
    config: EvaluateConfig,
    block: BlockShape,
) -> dict[str, list[Findings]]:
    """Give the figures of traffic cut in five ways; slices without a step are left out.

    Args:
        traffic: The drafter's traces.
        lookup: Prompt lookup on the same answers.
        temperatures: By request, of `read_temperatures`.
        config: Resamples and seed.
        block: Ceiling and the like, for every slice.
    """

    def by_length(trace: DecodeTrace) -> str:
        return bucket_label(trace.prompt_length, PROMPT_EDGES)

    def by_sampling(trace: DecodeTrace) -> str:
        temperature = temperatures.get(trace.id)
        return UNKNOWN if temperature is None else "sampled" if temperature > 0 else "greedy"

    def by_finish(trace: DecodeTrace) -> str:
        return trace.finish_reason

    cuts: dict[str, list[Findings]] = {}
    for name, label_of in (
        ("prompt_length", by_length),
        ("sampling", by_sampling),
        ("finish_reason", by_finish),
    ):
        ours, theirs = _parts(traffic, label_of), _parts(lookup, label_of)
        cuts[name] = _measure_parts(ours, theirs, config, block)
    ours, theirs = _pieces(traffic), _pieces(lookup)
    cuts["position"] = _measure_parts(ours, theirs, config, block)
    order = {"prompt_length": PROMPT_EDGES, "position": POSITION_EDGES}
    for name, edges in order.items():
        labels = bucket_labels(edges)
        cuts[name].sort(key=lambda each, labels=labels: labels.index(each["label"]))
    return {name: cuts[name] for name in ("prompt_length", "position", "sampling", "finish_reason")}


def read_temperatures(run_dir: Path, split: str) -> dict[str, float | None]:
    """Read at which temperature each answer of a split was written; 0 is greedy, None unknown.

    Answers that `regenerate` wrote stand in its records; the others are as logged.
    """
    found: dict[str, float | None] = {}
    for folder in ("conversations", "regenerated"):
        for record in read_split(run_dir / folder, split):
            value = record.sampling.get("temperature")
            found[record.id] = None if value is None else float(value)
    return found


def bucket_labels(edges: tuple[int, ...]) -> list[str]:
    """Name the slices between edges, such as `128 to 511`; the last is `8192 and more`."""
    inner = [f"{low} to {high - 1}" for low, high in pairwise(edges)]
    return [*inner, f"{edges[-1]} and more"]


def bucket_label(value: int, edges: tuple[int, ...]) -> str:
    """Name the slice that a value falls into; it is not below the first edge."""
    return bucket_labels(edges)[sum(value >= edge for edge in edges) - 1]


def as_plain(result: Any) -> Findings:
    """Turn a result into JSON values; intervals become `[low, high]`."""
    values = orjson.loads(orjson.dumps(result))
    for name, value in vars(result).items():
        if isinstance(value, Interval):
            values[name] = [value.low, value.high]
    return values


def _parts(
    traces: Iterable[DecodeTrace], label_of: Callable[[DecodeTrace], str]
) -> dict[str, list[DecodeTrace]]:
    parts: dict[str, list[DecodeTrace]] = {}
    for trace in traces:
        parts.setdefault(label_of(trace), []).append(trace)
    return dict(sorted(parts.items(), key=lambda item: (-len(item[1]), item[0])))


def _pieces(traces: Iterable[DecodeTrace]) -> dict[str, list[DecodeTrace]]:
    """Cut traces by where in the answer a step's anchor stands; position 0 is prefill's token."""
    pieces: dict[str, list[DecodeTrace]] = {}
    for trace in traces:
        inside = _parts_of_steps(trace)
        for label, steps in inside.items():
            pieces.setdefault(label, []).append(replace(trace, steps=steps))
    return pieces


def _parts_of_steps(trace: DecodeTrace) -> dict[str, list[Any]]:
    parts: dict[str, list[Any]] = {}
    for step in trace.steps:
        label = bucket_label(step.start - trace.prompt_length, POSITION_EDGES)
        parts.setdefault(label, []).append(step)
    return parts


def _measure_parts(
    ours: dict[str, list[DecodeTrace]],
    lookup: dict[str, list[DecodeTrace]],
    config: EvaluateConfig,
    block: BlockShape,
) -> list[Findings]:
    measured = [
        {
            "label": label,
            "acceptance_length": measure(traces, config, block),
            "prompt_lookup": measure(lookup.get(label, []), config, block),
        }
        for label, traces in ours.items()
    ]
    return [each for each in measured if each["acceptance_length"] is not None]
