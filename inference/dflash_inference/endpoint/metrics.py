"""The scheduler's counts as Prometheus text, under vLLM's names, so that its dashboards fit."""

from collections.abc import Iterator

from dflash_inference.scheduler import Scheduler

Labels = dict[str, str]


def prometheus_text(scheduler: Scheduler, *, model: str) -> str:
    """Give all counts; gauges are of this moment."""
    lines: list[str] = []
    for name, kind, samples in _families(scheduler):
        lines.append(f"# TYPE vllm:{name} {kind}")
        for labels, value in samples:
            shown = ",".join(
                f'{key}="{_escaped(text)}"' for key, text in {"model_name": model, **labels}.items()
            )
            lines.append(f"vllm:{name}{{{shown}}} {value}")
    return "\n".join(lines) + "\n"


def _families(scheduler: Scheduler) -> Iterator[tuple[str, str, list[tuple[Labels, float]]]]:
    counts = scheduler.counts
    gauges: dict[str, float] = {
        "num_requests_running": scheduler.num_running,
        "num_requests_waiting": scheduler.num_waiting,
        "kv_cache_usage_perc": scheduler.tokens_held / scheduler.token_budget,
    }
    totals: dict[str, float] = {
        "prompt_tokens_total": counts.prompt_tokens,
        "generation_tokens_total": counts.output_tokens,
        "spec_decode_num_drafts_total": counts.drafts,
        "spec_decode_num_draft_tokens_total": counts.draft_tokens,
        "spec_decode_num_accepted_tokens_total": counts.accepted_tokens,
    }
    for name, value in gauges.items():
        yield name, "gauge", [({}, value)]
    for name, value in totals.items():
        yield name, "counter", [({}, value)]
    yield (
        "spec_decode_num_accepted_tokens_per_pos_total",
        "counter",
        [
            ({"position": str(place)}, number)
            for place, number in sorted(counts.accepted_at.copy().items())
        ],
    )
    yield (
        "request_success_total",
        "counter",
        [
            ({"finished_reason": reason}, number)
            for reason, number in sorted(counts.finished.copy().items())
        ],
    )


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
