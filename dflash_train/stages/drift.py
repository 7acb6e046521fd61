"""`dflash-train drift`: what was served, watched: has acceptance fallen, why, and does tuning pay?

Rows are read by `dflash_data.served`, judged by `dflash_inference.drift`. A fall that is found is a
result and no failure; `fail_if_fallen=true` makes it the exit code of a gate, for a job that shall
call somebody: 3 and not 1, which is also what a command that broke gives.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import orjson
from rich.console import Console
from tqdm import tqdm

from dflash_train.config import (
    RecipeConfig,
    UnavailableError,
    read_flag,
    require,
    take_keys,
)
from dflash_train.records.manifest import write_bytes
from dflash_train.records.served import ServedRows
from dflash_train.release.promotion import Gain
from dflash_train.stages.estimates import plan_training
from dflash_train.stages.judgement import GATE_FAILED
from dflash_train.stages.tune.judging import read_verdict
from dflash_train.stages.tune.start import TUNING_FOLDER

FOLDER = "drift"
FINDINGS_FILE = "drift.json"
FILE_COLUMNS = 150
"""Width of tables that do not go to a terminal."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the command line says beside the recipe."""

    json: bool
    """Print the findings as JSON in place of tables."""
    fails_if_fallen: bool


def read_choice(arguments: list[str]) -> tuple[Choice, list[str]]:
    """Take `json=` and `fail_if_fallen=` out of the command line's arguments; give the others too.

    Raises:
        ValueError: One is neither true nor false.
    """
    words, others = take_keys(arguments, ("json", "fail_if_fallen"))
    flags = {
        name: read_flag(f"drift: {name}", words.get(name, "false"))
        for name in ("json", "fail_if_fallen")
    }
    return Choice(json=flags["json"], fails_if_fallen=flags["fail_if_fallen"]), others


def watch_drift(config: RecipeConfig, choice: Choice) -> int:
    """Read, judge, write `drift.json`, print, and give the exit code.

    Raises:
        ValueError: There is nothing to read, or it tells nothing about drafts.
        UnavailableError: A server does not answer.
    """
    from dflash_inference.drift.findings import find_drift
    from dflash_inference.drift.shares import Estimate
    from dflash_inference.drift.table import print_drift
    from dflash_inference.statistics import Interval

    folder, gain = config.run_dir / FOLDER, _gain_of_tuning(config)
    served = read_served(config, folder).since(config.drift.first_moment)
    drift = find_drift(
        served,
        config=config.drift,
        evaluate=config.evaluate,
        planned_hours=lambda: planned_hours(config),
        measured_gain=None
        if gain is None
        else Estimate(value=gain.relative, interval=Interval(low=gain.low, high=gain.high)),
    )
    findings = orjson.dumps(drift.as_json(), option=orjson.OPT_INDENT_2)
    write_bytes(folder / FINDINGS_FILE, findings + b"\n")
    if choice.json:
        print(findings.decode())
    else:
        print_drift(drift, Console(width=None if sys.stdout.isatty() else FILE_COLUMNS))
        print(folder)
    return GATE_FAILED if drift.has_fallen and choice.fails_if_fallen else 0


def read_served(config: RecipeConfig, folder: Path) -> ServedRows:
    """Read the one source that is given.

    Args:
        config: Names it.
        folder: Where rows and readings are kept.

    Raises:
        ValueError: None is given, several are, or it cannot be read.
        UnavailableError: A server does not answer.
    """
    from dflash_data.served.calls import read_calls
    from dflash_data.served.pages import poll_server, read_saved_pages
    from dflash_inference.drift.traced import rows_of_traces

    drift, logs = config.drift, config.data.logs
    given = {
        "data.logs": logs,
        "drift.traces": drift.traces,
        "drift.pages": drift.pages,
        "drift.metrics_url": drift.metrics_url,
    }
    named = [name for name, value in given.items() if value]
    require(
        len(named) == 1,
        f"{', '.join(named) or 'no source'} is given; drift reads exactly one of "
        f"{', '.join(given)}. Add data.logs=LOGS, or leave out the others.",
    )
    if logs is not None:
        return read_calls(config, logs, folder)
    if drift.traces:
        return rows_of_traces(drift.traces)
    return read_saved_pages(drift.pages) if drift.pages else poll_server(drift, folder)


def _gain_of_tuning(config: RecipeConfig) -> Gain | None:
    """Read the paired gain of an earlier tuning over all of its newest window.

    Raises:
        ValueError: The run has no verdict of one.
    """
    if config.drift.gain_from is None:
        return None
    try:
        return Gain(**read_verdict(Path(config.drift.gain_from) / TUNING_FOLDER)["gains"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"drift.gain_from (={config.drift.gain_from}) holds no verdict of a tuning. Give the "
            "run folder of a finished `dflash-train tune`, or the figure itself as drift.gain."
        ) from error


def planned_hours(config: RecipeConfig) -> float | None:
    """Give the hours of a training as the recipe or its plan has them; None where nobody knows."""
    if config.training.minutes is not None:
        return config.training.minutes / 60
    try:
        days = plan_training(config).days
    except (ValueError, UnavailableError) as error:
        tqdm.write(f"drift: a run cannot be planned: {error}", file=sys.stderr)
        return None
    return None if days is None else 24 * days
