"""`dflash-train <verb> recipe=<name> key=value ...`: compose, validate, hand over to the stages.

Progress goes to stderr; the output folder is the last line of stdout, `doctor` prints its findings
there. Exit codes: 0 done, 1 a check failed, 2 the user can fix it, 130 interrupted with the work so
far kept.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from dflash_train import stages
from dflash_train.config import RecipeConfig, UnavailableError, compose, require, to_plain
from dflash_train.release.finding import Status
from dflash_train.release.inspection import print_view, read_choice

VERBS = {
    "run": "walk all stages of a recipe: traffic log to report",
    "ingest": "traffic log -> clean, scrubbed, split conversations",
    "regenerate": "conversations -> the target's own answers and its features",
    "collect": "answered conversations -> the feature store",
    "train": "features -> drafter",
    "evaluate": "drafter + held-out answers -> traces",
    "report": "traces -> report.json, report.md, report.html",
    "inspect": "print a conversation, supervised tokens coloured: id=ID or index=N [split=NAME]",
    "doctor": "check a drafter against its target: checkpoint=DIR target.name_or_path=NAME",
    "sample-traffic": "play a simulated fleet of clients: out=FILE [seed=0] [requests=600]",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command line and give its exit code."""
    parsed = _parser().parse_intermixed_args(arguments)
    if parsed.verb == "sample-traffic":
        return exit_code("dflash-train sample-traffic", lambda: _play_fleet(parsed.overrides))
    return exit_code(f"dflash-train {parsed.verb}", lambda: _run_verb(parsed))


def exit_code(command: str, run: Callable[[], int]) -> int:
    """Run a command and give its exit code: its own, 2 for what the user can fix, 130 if stopped.

    Args:
        command: What the one sentence on stderr begins with.
        run: The command; `DFLASH_TRACEBACK` lets its errors through.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return run()
    except (ValueError, UnavailableError) as error:
        if os.environ.get("DFLASH_TRACEBACK"):
            raise
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{command}: interrupted; run it again to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {verb:<16}{meaning}" for verb, meaning in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="dflash-train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Train DFlash drafters on your own traffic.\n\nverbs:\n{verbs}",
        epilog="DFLASH_TRACEBACK=1 shows the traceback of an error.",
    )
    parser.add_argument("verb", choices=VERBS, metavar="verb", help="what to do")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe=NAME and settings"
    )
    parser.add_argument("--recipes", metavar="DIR", help="folder of recipes (default ./recipes)")
    parser.add_argument("--print-recipe", action="store_true", help="print the recipe and stop")
    parser.add_argument("--force", action="store_true", help="do finished stages again")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="ingest, regenerate, collect: print calls or tokens, disk, time; stop",
    )
    return parser


def _run_verb(parsed: argparse.Namespace) -> int:
    if parsed.verb == "inspect":
        return _inspect(parsed)
    config = compose(parsed.overrides, parsed.recipes)
    if parsed.print_recipe:
        print(OmegaConf.to_yaml(OmegaConf.create(to_plain(config))), end="")
        return 0
    if parsed.dry_run:
        return _estimate(parsed.verb, config)
    if parsed.verb == "doctor":
        return _examine(config)
    if parsed.verb == "run":
        stages.run(config, force=parsed.force)
        folder = config.run_dir / "report"
        for line in stages.summary(config):
            print(line)
    else:
        stages.run_stage(stages.Workshop(config), parsed.verb, force=parsed.force)
        folder = config.run_dir / stages.stage_folder(parsed.verb)
    if os.environ.get("RANK", "0") == "0":  # one line, however many processes there are
        print(folder)
    return 0


def _estimate(verb: str, config: RecipeConfig) -> int:
    """Print what a stage would take."""
    estimates = {
        "ingest": stages.estimate_ingest,
        "regenerate": stages.estimate_regeneration,
        "collect": stages.estimate_collection,
    }
    require(
        verb in estimates,
        f"--dry-run is for {', '.join(estimates)}, not for `{verb}`. Leave it out.",
    )
    for line in estimates[verb](config):
        print(line)
    return 0


def _inspect(parsed: argparse.Namespace) -> int:
    """Print one conversation; the keys that choose it are no part of the recipe."""
    choice, overrides = read_choice(parsed.overrides)
    config = compose(overrides, parsed.recipes)
    print_view(stages.view_conversation(config, choice), Console())
    return 0


def _examine(config: RecipeConfig) -> int:
    """Print the doctor's findings, one a line; 1 if a check failed."""
    findings = stages.examine_checkpoint(config)
    for finding in findings:
        print(finding)
    num_failed = sum(finding.status is Status.failed for finding in findings)
    print(f"{num_failed} of {len(findings)} checks failed")
    return 1 if num_failed else 0


def _play_fleet(overrides: list[str]) -> int:
    settings = {"out": "", "seed": "0", "requests": "600"}
    for override in overrides:
        key, separator, value = override.partition("=")
        require(
            bool(separator) and key in settings,
            f"sample-traffic: {override!r} is not understood. Known keys: {', '.join(settings)}.",
        )
        settings[key] = value
    require(bool(settings["out"]), "sample-traffic: out must be set: add out=FILE.")
    numbers = {key: _whole_number(key, settings[key]) for key in ("seed", "requests")}
    out = Path(settings["out"])
    counts = stages.play_fleet(out, seed=numbers["seed"], num_requests=numbers["requests"])
    listed = ", ".join(f"{kind} {number}" for kind, number in counts.items())
    print(f"sample-traffic: {listed}", file=sys.stderr)
    print(out)
    return 0


def _whole_number(key: str, text: str) -> int:
    require(text.isdigit(), f"sample-traffic: {key} (={text}) must be a whole number, 0 or more.")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
