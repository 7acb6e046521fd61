"""A gate for CI: is the drafter good enough, and no worse than the one before?

    dflash-train report recipe=NAME fail_under=2.0 baseline=old/report.json

Both questions are asked of the pooled acceptance length on held-out traffic, and both are answered
by intervals, never by a mean alone: a gate that fails by chance is switched off.
"""

from dataclasses import dataclass
from pathlib import Path

from dflash_inference.compare import compare_rows
from dflash_inference.report_file import read_report, report_rows
from dflash_inference.statistics import FEWEST_FOR_A_CLAIM
from dflash_inference.trace import TRAFFIC_SPLIT
from dflash_train.config import EvaluateConfig, require


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer to one question of the gate."""

    has_passed: bool
    sentence: str
    """Figure, limit and interval, in words."""


def judge_report(
    report: Path, *, fail_under: float | None, baseline: Path | None, evaluate: EvaluateConfig
) -> list[Verdict]:
    """Judge a report, one verdict per question that was asked.

    Args:
        report: `report.json` of the run.
        fail_under: The pooled acceptance length fails if its 95 % interval lies below this.
        baseline: `report.json` of an earlier run; fails if this one is worse on the same requests.
        evaluate: Resamples and seed of the paired difference.

    Raises:
        ValueError: A report cannot be read, or the two share no request.
    """
    verdicts: list[Verdict] = []
    if fail_under is not None:
        verdicts.append(_judge_limit(report, fail_under))
    if baseline is not None:
        verdicts.append(_judge_baseline(report, baseline, evaluate))
    return verdicts


def _judge_limit(report: Path, limit: float) -> Verdict:
    found = read_report(report)["acceptance_length"]
    low, high = found["interval"]
    has_passed = high >= limit
    rule = "which reaches" if has_passed else "which lies below"
    return Verdict(
        has_passed=has_passed,
        sentence=(
            f"fail_under (={limit:g}): pooled acceptance length {found['pooled']:.3f}, 95 % "
            f"interval {low:.3f} to {high:.3f} on {found['num_requests']} requests, {rule} the "
            "limit."
        ),
    )


def _judge_baseline(report: Path, baseline: Path, evaluate: EvaluateConfig) -> Verdict:
    ours = report_rows(report).get(TRAFFIC_SPLIT, [])
    theirs = report_rows(baseline).get(TRAFFIC_SPLIT, [])
    difference = compare_rows(ours, theirs, resamples=evaluate.resamples, seed=evaluate.seed)
    require(
        difference is not None,
        f"baseline (={baseline}) and {report} share no request. Evaluate both drafters on the same "
        "held-out traffic.",
    )
    assert difference is not None
    few = difference.num_requests < FEWEST_FOR_A_CLAIM
    remark = f", fewer than {FEWEST_FOR_A_CLAIM} make no claim" if few else ""
    return Verdict(
        has_passed=difference.verdict != "worse",
        sentence=(
            f"baseline (={baseline}): pooled acceptance length {difference.value:+.3f} against it, "
            f"95 % interval {difference.interval.low:+.3f} to {difference.interval.high:+.3f} on "
            f"{difference.num_requests} shared requests{remark}, limit 0: {difference.verdict}."
        ),
    )
