"""Verbs and words that judge: `compare A B`, and `report ... fail_under=2.0 baseline=FILE`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import orjson

from dflash_train.config import EvaluateConfig, RecipeConfig, read_flag, require, take_keys

GATE_VERBS = ("report", "run")
"""Verbs whose end a gate can stand at."""
GATE_FAILED = 3
"""Exit code of a report that does not pass its gate."""
DIFFERENCE_FOUND = 1
"""Exit code of `compare first_difference=true` where two traces part."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a report must pass; no part of the recipe."""

    fail_under: float | None = None
    """Least pooled acceptance length: it fails if the whole interval lies below."""
    baseline: Path | None = None
    """`report.json` that the run must not be worse than."""


def read_gate(arguments: list[str]) -> tuple[Gate, list[str]]:
    """Take `fail_under=` and `baseline=` out of the command line's arguments; give the others too.

    Raises:
        ValueError: The limit is no number, or the baseline no file.
    """
    found, others = take_keys(arguments, ("fail_under", "baseline"))
    baseline = Path(found["baseline"]) if "baseline" in found else None
    require(
        baseline is None or baseline.is_file(),
        f"baseline (={baseline}) is not a file. Give the report.json of an earlier run.",
    )
    limit = _number("fail_under", found["fail_under"]) if "fail_under" in found else None
    return Gate(fail_under=limit, baseline=baseline), others


def pass_gate(config: RecipeConfig, gate: Gate) -> int:
    """Judge the finished report of a run: say each verdict on stderr and give the exit code."""
    if gate == Gate():
        return 0
    from dflash_inference.gate import judge_report
    from dflash_inference.report import REPORT_FOLDER

    report = config.run_dir / REPORT_FOLDER / "report.json"
    require(
        gate.baseline is None or gate.baseline.resolve() != report.resolve(),
        f"baseline (={gate.baseline}) is the report of this run itself, which was written anew. "
        "Keep a copy of the earlier one elsewhere.",
    )
    verdicts = judge_report(
        report,
        fail_under=gate.fail_under,
        baseline=gate.baseline,
        evaluate=config.evaluate,
    )
    for verdict in verdicts:
        word = "passed" if verdict.has_passed else "FAILED"
        print(f"gate {word}: {verdict.sentence}", file=sys.stderr)
    return 0 if all(verdict.has_passed for verdict in verdicts) else GATE_FAILED


def compare(arguments: list[str]) -> int:
    """Print how two drafters, or two traces, compare, and give the exit code.

    Args:
        arguments: Two places, and `kind=`, `first_difference=`, `clipped=`, `json=`, `resamples=`,
            `seed=` in any order.

    Returns:
        0, or 1 if `first_difference=true` was asked for and there is one. A verdict of worse is no
        failure: the gate of `report` makes it one.

    Raises:
        ValueError: A word is not understood, or a place holds nothing to compare.
    """
    from dflash_inference.compare import compare_places, find_differences

    keys = ("kind", "first_difference", "clipped", "json", "resamples", "seed")
    words, places = take_keys(arguments, keys)
    unknown = [place for place in places if "=" in place and not Path(place).exists()]
    require(
        not unknown,
        f"compare: {', '.join(unknown)} is not understood. Known keys: {', '.join(keys)}.",
    )
    require(
        len(places) == 2,
        f"compare: {len(places)} places were given, two are compared: run folders, reports or "
        "trace files. Write `dflash-train compare A B`.",
    )
    kind = words.get("kind", "replay")
    settings = EvaluateConfig(
        resamples=_whole("resamples", words.get("resamples", "10000")),
        seed=_whole("seed", words.get("seed", "0")),
    )
    seeks_difference = read_flag(
        "compare: first_difference", words.get("first_difference", "false")
    )
    if seeks_difference:
        found = find_differences(
            places[0],
            places[1],
            kind=kind,
            counts_are_clipped=read_flag("compare: clipped", words.get("clipped", "false")),
        )
        code = DIFFERENCE_FOUND if found.unequal else 0
    else:
        require("clipped" not in words, "compare: clipped goes with first_difference=true.")
        found = compare_places(
            places[0], places[1], kind=kind, resamples=settings.resamples, seed=settings.seed
        )
        code = 0
    if read_flag("compare: json", words.get("json", "false")):
        print(orjson.dumps(found.as_json(), option=orjson.OPT_INDENT_2).decode())
    else:
        print("\n".join(found.lines()))
    return code


def _whole(key: str, text: str) -> int:
    require(text.isdecimal(), f"compare: {key} (={text}) must be a whole number, 0 or more.")
    return int(text)


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    require(value > 0, f"{key} (={text}) must be a number above 0, such as {key}=2.0.")
    return value
