"""A generic drafter, then minutes of tuning to one tenant: what it gains, and what others lose.

    make bench-tune DATA=DIR
    python -m benchmarks.bench_tune --data DIR [--sets fleet prompts] [--minutes 20] [key=value ...]

Two sets of tenants (`tune_logs.py`); each begins with a drafter that was trained on the other set
alone. It is tuned to either of two tenants, on that tenant's log alone and with older rows of
everybody else among it, as it is and blended with the drafter that it began from, and once to both
tenants in twice the time. All figures are those of `dflash-train tune`: paired gains by replay on
newest windows. DIR holds `gsm8k`, `gsm8k_smollm2` and `oasst`. The minutes become steps once, in a
set's first tuning, and hold for the others.
Everything is kept below `--out`, and an interrupted bench goes on. The last line is one JSON
object. The rules stand in docs/protocols/tuning.md.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench_measure import describe_machine
from benchmarks.bench_runs import load_before, markdown_table, tell
from benchmarks.tune_runs import (
    BENCH,
    OTHER,
    SETS,
    Protocol,
    TenantSet,
    TuningRun,
    Way,
    calibrated_steps,
    collect_own_run,
    generic_drafter,
    prepare_logs,
    tune_to,
)
from dflash_inference.request_rows import rows_of, sums_of
from dflash_inference.statistics import Difference, relative_difference
from dflash_inference.trace import read_traces
from dflash_train.cli import exit_code
from dflash_train.config import EvaluateConfig, compose, require
from dflash_train.stages.tune.judging import CANDIDATE, TRAFFIC
from dflash_train.stages.tune.start import TUNING_FOLDER
from dflash_train.training.accelerator import threads_per_process

GOALS = {"gain": 0.15, "gain_low": 0.05, "loss": -0.02, "num_requests": 200}
"""Of the tuned tenant, at least; of every other tenant, at least. They are those of `blended`."""
Figures = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run one command line and give its exit code: 0 done, 2 the user can fix it."""
    parsed = _parser().parse_intermixed_args(arguments)
    return exit_code(BENCH, lambda: _run(parsed))


def measure(protocol: Protocol, tenants: TenantSet) -> Figures:
    """Tune a set's generic drafter in every way of the protocol, and give the figures."""
    start = generic_drafter(protocol, tenants)
    for each in (OTHER[tenants.name], tenants):
        collect_own_run(protocol, each)
    num_steps = protocol.num_steps
    found: dict[str, dict[str, TuningRun]] = {name: {} for name in tenants.tuned}
    for name in tenants.tuned:
        for way in (Way.replayed, Way.blended, Way.alone):
            run = tune_to(protocol, tenants, (name,), way=way, start=start, num_steps=num_steps)
            found[name][way] = run
            num_steps = num_steps or calibrated_steps(run)
    assert num_steps is not None
    both = tune_to(
        protocol,
        tenants,
        tenants.tuned,
        way=Way.blended,
        start=start,
        num_steps=2 * num_steps,
    )
    return {
        "num_steps": num_steps,
        "tuned": {
            name: {kind: summary(run.verdict) for kind, run in kinds.items()}
            for name, kinds in found.items()
        },
        "both": {
            "gains": both.verdict["gains"],
            "over_one_each": {
                name: asdict(_over(both, kinds[Way.blended])) for name, kinds in found.items()
            },
        },
    }


@dataclass(frozen=True, kw_only=True)
class Others:
    """Gains of those whom a drafter was not tuned to."""

    gains: list[Figures]
    """By tenant."""

    @property
    def worst(self) -> Figures:
        """The one who loses most."""
        return min(self.gains, key=lambda gain: gain["relative"])


def summary(verdict: Figures) -> Figures:
    """Give the tuned tenant's gain, those of the others, and which goals are met."""
    own, *rest = verdict["gains"]
    others = Others(gains=[gain for gain in rest if ", " in gain["name"]] or rest)
    return {
        "gain": own,
        "others": others.gains,
        "verdict": verdict["verdict"],
        "met": {
            "gain": own["relative"] >= GOALS["gain"],
            "gain_low": own["low"] >= GOALS["gain_low"],
            "loss": others.worst["relative"] >= GOALS["loss"],
            "num_requests": own["num_requests"] >= GOALS["num_requests"],
        },
    }


def table(name: str, figures: Figures) -> str:
    """Show the figures of a set: a row per tuning."""
    rows = []
    for tenant, kinds in figures["tuned"].items():
        for kind, each in kinds.items():
            worst = Others(gains=each["others"]).worst
            rows.append(
                [
                    f"{name}: {tenant}, {kind}",
                    str(each["gain"]["num_requests"]),
                    f"{each['gain']['incumbent']:.2f}",
                    _shown(each["gain"]),
                    worst["name"].split("tenant ")[-1],
                    _shown(worst),
                    each["verdict"],
                ]
            )
    for gain in figures["both"]["gains"]:
        cells = [str(gain["num_requests"]), f"{gain['incumbent']:.2f}", _shown(gain), "", "", ""]
        rows.append([f"{name}: both, blended; {gain['name']}", *cells])
    head = ["tuned to", "requests", "before", "gain", "loses most", "by", "verdict"]
    return markdown_table(head, rows)


def _over(both: TuningRun, single: TuningRun) -> Difference:
    """Compare one drafter for two tenants with that for one, on the requests both windows hold."""
    ours, theirs = (
        {
            row.id: row
            for row in rows_of(
                read_traces(run.config.run_dir / TUNING_FOLDER / f"{CANDIDATE}-{TRAFFIC}.jsonl")
            )
        }
        for run in (both, single)
    )
    shared = [each for each in theirs if each in ours]
    settings = EvaluateConfig()
    return relative_difference(
        sums_of([ours[each] for each in shared]),
        sums_of([theirs[each] for each in shared]),
        resamples=settings.resamples,
        seed=settings.seed,
    )


def _shown(gain: Figures) -> str:
    return f"{gain['relative']:+.1%} ({gain['low']:+.1%} to {gain['high']:+.1%})"


def _run(parsed: argparse.Namespace) -> int:
    load = load_before(BENCH)
    protocol = _protocol(parsed)
    for tenants in SETS.values():  # each set's generic drafter learns from the other
        prepare_logs(protocol, tenants, data=parsed.data)
    if parsed.only_logs:
        print(protocol.logs)
        return 0
    found = {name: measure(protocol, SETS[name]) for name in parsed.sets}
    for name, figures in found.items():
        print(table(name, figures))
    num_threads = threads_per_process(compose(["recipe=smollm2", *protocol.overrides]).launch)
    about = describe_machine(num_threads) | {"load_before": load}
    print(json.dumps({"sets": found, "goals": GOALS, "minutes": protocol.minutes} | about))
    return 0


def _protocol(parsed: argparse.Namespace) -> Protocol:
    generic = dict(each.split("=", 1) for each in parsed.generic if "=" in each)
    require(
        len(generic) == len(parsed.generic) and set(generic) <= set(SETS),
        f"--generic (={' '.join(parsed.generic)}) must be SET=DIR, SET one of {', '.join(SETS)}.",
    )
    if not (parsed.out / "runs").exists():
        tell(BENCH, f"everything is kept in {parsed.out}")
    return Protocol(
        out=parsed.out.absolute(),
        minutes=parsed.minutes,
        generic_minutes=parsed.generic_minutes,
        replay_share=parsed.replay_share,
        generic={name: str(Path(folder).absolute()) for name, folder in generic.items()},
        num_steps=parsed.steps,
        overrides=tuple(parsed.overrides),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_tune",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe settings")
    parser.add_argument("--data", type=Path, metavar="DIR", help="GSM8K and Open Assistant")
    parser.add_argument("--out", type=Path, default=Path("runs") / BENCH, metavar="DIR")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--minutes", type=float, default=20.0, help="of each tuning")
    parser.add_argument("--steps", type=int, help="of each tuning, in place of minutes")
    parser.add_argument("--generic-minutes", type=float, default=15.0, help="of its training")
    parser.add_argument("--generic", nargs="+", default=[], metavar="SET=DIR", help="begin with")
    parser.add_argument("--replay-share", type=float, default=0.3)
    parser.add_argument("--only-logs", action="store_true", help="have the logs answered and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
