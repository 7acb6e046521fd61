"""What a page of `/metrics` (Prometheus text) says about speculative decoding.

vLLM and our own `serve` count since their start: steps with drafts, drafted and accepted tokens, by
position too. SGLang shows a gauge, the acceptance length of its last moments, beside the number of
tokens that it wrote. Everything else on the page is passed over, and so is what cannot be read.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

SAMPLE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+(-?\d+))?\s*")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
VLLM_COUNTERS = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
    "vllm:request_decode_time_seconds_sum": "decode_s",
}
"""Without the `_total` that newer client libraries append."""
VLLM_POSITIONS = "vllm:spec_decode_num_accepted_tokens_per_pos"
SGLANG_LENGTH = "sglang:spec_accept_length"
SGLANG_TOKENS = "sglang:generation_tokens"
SGLANG_DECODE = "sglang:inter_token_latency_seconds_sum"


@dataclass(kw_only=True)
class Totals:
    """What one engine of a server has counted since its start."""

    drafts: float = 0.0
    """Verify steps with drafts."""
    draft_tokens: float = 0.0
    accepted: float = 0.0
    accepted_at: list[float] = field(default_factory=list)
    """By position, the first drafted token first."""
    decode_s: float = math.nan
    """Seconds between first and last token, summed over requests."""
    tokens: float = math.nan
    """Tokens written, where the server counts no drafts."""
    length: float = math.nan
    """Acceptance length of the last moments, where the server counts no drafts."""


@dataclass(kw_only=True)
class Page:
    """One page, read."""

    engines: dict[str, Totals]
    """By model and engine, as the server labels them."""
    moment: float | None
    """Time that its samples carry, seconds since 1970; mostly none do."""
    num_unreadable: int
    """Lines that are no sample."""


def read_page(text: str) -> Page:
    """Read a page."""
    engines: dict[str, Totals] = defaultdict(Totals)
    lengths: dict[str, list[float]] = defaultdict(list)
    moments: list[float] = []
    num_unreadable = 0
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        found = SAMPLE.fullmatch(line)
        value = None if found is None else _number(found[3])
        if found is None or value is None:
            num_unreadable += 1
            continue
        if not math.isfinite(value):  # a gauge that has nothing to show
            continue
        labels = dict(LABEL.findall(found[2] or ""))
        if _add(engines, lengths, found[1].removesuffix("_total"), labels, value) and found[4]:
            moments.append(int(found[4]) / 1000)
    for name, values in lengths.items():
        active = [value for value in values if value > 0]
        engines[name].length = sum(active) / len(active) if active else math.nan
    return Page(
        engines=dict(engines), moment=max(moments, default=None), num_unreadable=num_unreadable
    )


def _add(
    engines: dict[str, Totals],
    lengths: dict[str, list[float]],
    name: str,
    labels: dict[str, str],
    value: float,
) -> bool:
    """Add one sample to its engine; False if it is none of those that are read."""
    model = labels.get("model_name", "server")
    if name in VLLM_COUNTERS:
        place = VLLM_COUNTERS[name]
        totals = engines[_engine(model, labels)]
        setattr(totals, place, _sum(getattr(totals, place), value))
    elif name == VLLM_POSITIONS and labels.get("position", "").isdecimal():
        counts = engines[_engine(model, labels)].accepted_at
        position = int(labels["position"])
        counts.extend([0.0] * (position + 1 - len(counts)))
        counts[position] += value
    elif name == SGLANG_LENGTH:
        lengths[model].append(value)
    elif name == SGLANG_TOKENS:
        engines[model].tokens = _sum(engines[model].tokens, value)
    elif name == SGLANG_DECODE:
        engines[model].decode_s = _sum(engines[model].decode_s, value)
    else:
        return False
    return True


def _engine(model: str, labels: dict[str, str]) -> str:
    return f"{model} engine {labels['engine']}" if "engine" in labels else model


def _sum(total: float, value: float) -> float:
    return value if math.isnan(total) else total + value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
