"""`dflash-train <verb> recipe=<name> key=value ...`: compose, validate, hand over to the stages.

Progress goes to stderr; the output folder is the last line of stdout, `doctor` and `compare` print
their findings there. Exit codes: 0 done, 1 a check failed or `compare first_difference=true` found
one, 2 the user can fix it, 3 the report did not pass `fail_under=` or `baseline=`, or the candidate
not `tune fail_if_kept=true`, or served acceptance fell under `drift fail_if_fallen=true`, 130
interrupted with the work so far kept.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from dflash_train.config import (
    RecipeConfig,
    UnavailableError,
    compose,
    read_flag,
    require,
    take_keys,
    to_plain,
)
from dflash_train.release.finding import Status
from dflash_train.release.inspection import print_view, read_choice
from dflash_train.release.registry import Registry
from dflash_train.stages import drift, judgement, pushing, serve_check, serving, tools
from dflash_train.stages.estimates import ESTIMATES
from dflash_train.stages.examination import Scope, examine_checkpoint
from dflash_train.stages.exporting import export_checkpoint
from dflash_train.stages.publication import export_dataset
from dflash_train.stages.table import stage_named
from dflash_train.stages.tune.foresight import foresee
from dflash_train.stages.tune.walk import tune
from dflash_train.stages.walk import run, run_stage
from dflash_train.stages.workshop import Workshop

VERBS = {
    "run": "walk all stages of a recipe: traffic log to report",
    "ingest": "traffic log -> clean, scrubbed, split conversations",
    "regenerate": "conversations -> the target's own answers and its features",
    "collect": "answered conversations -> the feature store",
    "train": "features -> drafter",
    "evaluate": "drafter + held-out answers -> traces",
    "report": "traces -> report.json, report.md, report.html; [fail_under=2.0] [baseline=FILE]",
    "tune": "serving drafter + new log -> its successor if it is better: data.logs=LOGS [init=DIR]",
    "rollback": "give a registry's previous drafter its place back: registry=DIR",
    "drift": "did served acceptance fall, why, does tuning pay: data.logs=LOGS [json=true]",
    "compare": "two runs, reports or trace files: A B [first_difference=true] [json=true]",
    "generate": "chat in this terminal, accepted tokens coloured: checkpoint=DIR [prompt=TEXT]",
    "serve": "OpenAI endpoint to try a drafter and record traffic: checkpoint=DIR [serve.log=FILE]",
    "costs": "time draft and verify passes on this machine: checkpoint=DIR [--force]",
    "inspect": "print a conversation, supervised tokens coloured: id=ID or index=N [split=NAME]",
    "pseudonym": "by which hash a run knows a tenant, for whoever holds its key: tenant=NAME",
    "export": "a drafter for servers: checkpoint=DIR format=zlab|speculators out=DIR",
    "push": "a drafter and its card to the Hub: repo_id=OWNER/NAME license=ID [private=false]",
    "export-dataset": "conversations -> a repository for `datasets`: license=ID [out=DIR]",
    "doctor": "check a drafter: checkpoint=DIR [target.name_or_path=NAME], or recipe=NAME",
    "serve-check": "the drafter in a real vLLM against our decoder: checkpoint=DIR [prompts=FILE]",
    "sample-traffic": "play a simulated fleet of clients: out=FILE [seed=0] [requests=600]",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command line and give its exit code."""
    parsed = _parser().parse_intermixed_args(arguments)
    run_verb = _WITHOUT_RECIPE.get(parsed.verb, _run_verb)
    return exit_code(f"dflash-train {parsed.verb}", lambda: run_verb(parsed))


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
        help="ingest, regenerate, collect, train, tune, rollback, push: print what it would take",
    )
    return parser


def _run_verb(parsed: argparse.Namespace) -> int:
    if parsed.verb in _WITH_OWN_KEYS:
        return _WITH_OWN_KEYS[parsed.verb](parsed)
    gate, overrides = judgement.Gate(), parsed.overrides
    if parsed.verb in judgement.GATE_VERBS:
        gate, overrides = judgement.read_gate(overrides)
    config = compose(overrides, parsed.recipes)
    if _only_shows(parsed, config):
        return 0
    if parsed.verb == "doctor":
        return _examine(config, parsed.overrides)
    if parsed.verb == "serve":
        serving.serve(config)
        return 0
    if parsed.verb == "costs":
        print(serving.measure_costs(config, force=parsed.force))
        return 0
    if parsed.verb == "run":
        run(config, force=parsed.force)
        folder = config.run_dir / "report"
        for line in tools.summary(config):
            print(line)
    else:
        run_stage(Workshop(config), parsed.verb, force=parsed.force)
        folder = config.run_dir / stage_named(parsed.verb).folder
    code = judgement.pass_gate(config, gate)
    if os.environ.get("RANK", "0") == "0":  # one line, however many processes there are
        print(folder)
    return code


def _only_shows(parsed: argparse.Namespace, config: RecipeConfig) -> bool:
    """Print the recipe or what the verb would take, if a flag says to, and whether that is all."""
    if parsed.print_recipe:
        print(OmegaConf.to_yaml(OmegaConf.create(to_plain(config))), end="")
    elif parsed.dry_run:
        _estimate(parsed.verb, config)
    return parsed.print_recipe or parsed.dry_run


def _estimate(verb: str, config: RecipeConfig) -> None:
    """Print what a stage would take."""
    require(
        verb in ESTIMATES,
        f"--dry-run is for {', '.join(ESTIMATES)}, not for `{verb}`. Leave it out.",
    )
    if os.environ.get("RANK", "0") != "0":  # one plan, however many processes there are
        return
    for line in ESTIMATES[verb](config):
        print(line)


def _inspect(parsed: argparse.Namespace) -> int:
    """Print one conversation; the keys that choose it are no part of the recipe."""
    choice, overrides = read_choice(parsed.overrides)
    config = compose(overrides, parsed.recipes)
    if _only_shows(parsed, config):
        return 0
    print_view(tools.view_conversation(config, choice), Console())
    return 0


def _pseudonym(parsed: argparse.Namespace) -> int:
    """Print a tenant's hash; whose is no part of the recipe."""
    chosen, overrides = take_keys(parsed.overrides, ("tenant",))
    config = compose(overrides, parsed.recipes)
    if not _only_shows(parsed, config):
        print(tools.tenant_pseudonym(config, chosen.get("tenant", "")))
    return 0


def _export_dataset(parsed: argparse.Namespace) -> int:
    """Write a dataset repository; licence and folder are no part of the recipe."""
    chosen, overrides = take_keys(parsed.overrides, ("license", "out"))
    config = compose(overrides, parsed.recipes)
    if _only_shows(parsed, config):
        return 0
    out = Path(chosen["out"]) if chosen.get("out") else None
    print(export_dataset(config, license_id=chosen.get("license", ""), out=out))
    return 0


def _export(parsed: argparse.Namespace) -> int:
    """Write a drafter in another dialect; format and folder are no part of the recipe."""
    chosen, overrides = take_keys(parsed.overrides, ("format", "out"))
    config = compose(overrides, parsed.recipes)
    if _only_shows(parsed, config):
        return 0
    written = export_checkpoint(
        config, format_name=chosen.get("format", ""), out=chosen.get("out", "")
    )
    for remark in written.remarks:
        print(f"export: {remark}", file=sys.stderr)
    print(written.folder)
    return 0


def _push(parsed: argparse.Namespace) -> int:
    """Upload a drafter, or print what would be; the repository is no part of the recipe."""
    request, overrides = pushing.read_request(parsed.overrides)
    config = compose(overrides, parsed.recipes)
    if parsed.print_recipe:
        _only_shows(parsed, config)
        return 0
    publication = pushing.prepare(config, request, Scope.of(overrides))
    if parsed.dry_run or request.dry_run:
        print("\n".join(publication.lines()))
        return 0
    print("\n".join(publication.lines()), file=sys.stderr)
    print(pushing.push(publication).url)
    return 0


def _generate(parsed: argparse.Namespace) -> int:
    """Chat; a single prompt is no part of the recipe."""
    chosen, overrides = take_keys(parsed.overrides, ("prompt",))
    config = compose(overrides, parsed.recipes)
    if not _only_shows(parsed, config):
        serving.generate(config, chosen.get("prompt"))
    return 0


def _examine(config: RecipeConfig, overrides: list[str]) -> int:
    """Print the doctor's findings, one a line; 1 if a check failed."""
    findings = examine_checkpoint(config, Scope.of(overrides))
    for finding in findings:
        print(finding)
    num_failed, num_skipped = (
        sum(finding.status is status for finding in findings)
        for status in (Status.failed, Status.skipped)
    )
    print(f"{num_failed} of {len(findings)} checks failed, {num_skipped} skipped")
    return 1 if num_failed else 0


def _serve_check(parsed: argparse.Namespace) -> int:
    """Check a drafter in a server; prompts and server are no part of the recipe."""
    choice, overrides = serve_check.read_choice(parsed.overrides)
    config = compose(overrides, parsed.recipes)
    return 0 if _only_shows(parsed, config) else serve_check.serve_check(config, choice)


def _tune(parsed: argparse.Namespace) -> int:
    """Tune the serving drafter; how the command ends for a kept one is no part of the recipe."""
    chosen, overrides = take_keys(parsed.overrides, ("fail_if_kept",))
    must_promote = read_flag("fail_if_kept", chosen.get("fail_if_kept", "false"))
    config = compose(overrides, parsed.recipes)
    if parsed.dry_run:
        print("\n".join(foresee(config, force=parsed.force)))
        return 0
    if _only_shows(parsed, config):
        return 0
    outcome = tune(config, force=parsed.force)
    print("\n".join([*outcome.lines(), outcome.as_json(), str(outcome.folder)]))
    return judgement.GATE_FAILED if must_promote and not outcome.is_promoted else 0


def _drift(parsed: argparse.Namespace) -> int:
    """Watch served acceptance; how it is shown is no part of the recipe."""
    choice, overrides = drift.read_choice(parsed.overrides)
    config = compose(overrides, parsed.recipes)
    return 0 if _only_shows(parsed, config) else drift.watch_drift(config, choice)


def _refuse_flags(parsed: argparse.Namespace, *, but: tuple[str, ...] = ()) -> None:
    """Refuse the flags that would change nothing of a verb without recipe."""
    for name in ("recipes", "print_recipe", "force", "dry_run"):
        flag = f"--{name.replace('_', '-')}"
        require(
            name in but or not getattr(parsed, name),
            f"{flag} means nothing to `{parsed.verb}`. Leave it out.",
        )


def _roll_back(parsed: argparse.Namespace) -> int:
    """Give the previous drafter of a registry its place back; a registry is all it needs."""
    _refuse_flags(parsed, but=("dry_run",))
    chosen, unknown = take_keys(parsed.overrides, ("registry",))
    require(
        not unknown,
        f"{', '.join(map(repr, unknown))} is not understood. Known keys: registry.",
    )
    place = chosen.get("registry", "")
    registry = Registry(Path(place))
    require(
        bool(place) and registry.roles.current is not None,
        f"registry (={place}) is no registry of drafters. Give registry=DIR, the tune.registry of "
        "the recipe.",
    )
    if not parsed.dry_run:
        registry.roll_back()
    print("\n".join([*registry.lines(), str(registry.folder / "current")]))
    return 0


def _compare(parsed: argparse.Namespace) -> int:
    """Compare two files of traces."""
    _refuse_flags(parsed)
    return judgement.compare(parsed.overrides)


def _play_fleet(parsed: argparse.Namespace) -> int:
    """Write the log of a simulated fleet."""
    _refuse_flags(parsed)
    settings = {"out": "", "seed": "0", "requests": "600"}
    chosen, unknown = take_keys(parsed.overrides, settings)
    require(
        not unknown,
        f"sample-traffic: {', '.join(map(repr, unknown))} is not understood. Known keys: "
        f"{', '.join(settings)}.",
    )
    settings |= chosen
    require(bool(settings["out"]), "sample-traffic: out must be set: add out=FILE.")
    numbers = {key: _whole_number(key, settings[key]) for key in ("seed", "requests")}
    out = Path(settings["out"])
    counts = tools.play_fleet(out, seed=numbers["seed"], num_requests=numbers["requests"])
    listed = ", ".join(f"{kind} {number}" for kind, number in counts.items())
    print(f"sample-traffic: {listed}", file=sys.stderr)
    print(out)
    return 0


def _whole_number(key: str, text: str) -> int:
    require(text.isdigit(), f"sample-traffic: {key} (={text}) must be a whole number, 0 or more.")
    return int(text)


_WITH_OWN_KEYS: dict[str, Callable[[argparse.Namespace], int]] = {
    "inspect": _inspect,
    "pseudonym": _pseudonym,
    "export": _export,
    "push": _push,
    "export-dataset": _export_dataset,
    "generate": _generate,
    "serve-check": _serve_check,
    "tune": _tune,
    "drift": _drift,
}
"""Verbs with keys that are no part of the recipe."""
_WITHOUT_RECIPE: dict[str, Callable[[argparse.Namespace], int]] = {
    "sample-traffic": _play_fleet,
    "compare": _compare,
    "rollback": _roll_back,
}
"""Verbs that know no recipe."""


if __name__ == "__main__":
    sys.exit(main())
