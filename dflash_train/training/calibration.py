"""Minutes become steps, once, before the first step.

A schedule needs to know how many steps it has, and a run that followed the clock could not be
repeated or resumed exactly. So `training.minutes` is turned into `max_steps` by timing a few real
steps and one validation on a copy of the drafter, which is then thrown away; the result is stored
with the train states, and a resumed run reads it. A run with the stored number of steps given as
`training.max_steps` is the same to the bit.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from dflash_train.records.manifest import canonical_json, write_bytes

FILE_NAME = "calibration.json"
WARMUP_STEPS, TIMED_STEPS = 2, 8


@dataclass(kw_only=True)
class Calibration:
    """How long steps take here, and how many of them fit."""

    minutes: float
    """What the recipe asked for."""
    seconds_per_step: float
    """Median of the timed steps."""
    validation_s: float
    """One replay of the validation rows."""
    max_steps: int


def calibrate(
    run_step: Callable[[], object],
    validate: Callable[[], object],
    *,
    minutes: float,
    validate_every: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Time steps and one validation, and count how many steps fit.

    Saving train states is not timed: it is under a second, and rare.

    Args:
        run_step: Runs one optimiser step, loading its rows included.
        validate: Runs one validation.
        minutes: Length of the run.
        validate_every: Steps between validations; there is one more after the last step.
        clock: Gives seconds.
    """
    for _ in range(WARMUP_STEPS):
        run_step()
    step_s = statistics.median(_seconds(run_step, clock) for _ in range(TIMED_STEPS))
    validation_s = _seconds(validate, clock)
    return Calibration(
        minutes=minutes,
        seconds_per_step=step_s,
        validation_s=validation_s,
        max_steps=steps_within(
            60 * minutes,
            step_s=step_s,
            validation_s=validation_s,
            validate_every=validate_every,
        ),
    )


def steps_within(
    seconds: float,
    *,
    step_s: float,
    validation_s: float,
    validate_every: int,
) -> int:
    """Give the most steps whose time, with all replays, fits; at least 1."""

    def duration(steps: int) -> float:
        return steps * step_s + -(-steps // validate_every) * validation_s

    steps = int(seconds / (step_s + validation_s / validate_every))
    while steps > 1 and duration(steps) > seconds:
        steps -= 1
    return max(1, steps)


def read_calibration(folder: Path, *, key: str) -> Calibration | None:
    """Read the calibration of this run from its states' folder; None if it has none."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = orjson.loads(path.read_bytes())
        return Calibration(**content["calibration"]) if content["key"] == key else None
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}. Delete it to measure again.") from error


def write_calibration(folder: Path, calibration: Calibration, *, key: str) -> None:
    """Write the calibration atomically; `key` is the hash of recipe and inputs."""
    folder.mkdir(parents=True, exist_ok=True)
    content = canonical_json({"key": key, "calibration": asdict(calibration)})
    write_bytes(folder / FILE_NAME, content + b"\n")


def _seconds(action: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    action()
    return clock() - started
