"""The verb `tune`: run the stages of a tuning, and say how it ended.

    dflash-train tune recipe=NAME name=RUN data.logs=LOGS [init=DIR] [tune.replay_from=[RUN,...]]

It is a run like any other, whose stages are skipped or resumed as they are there; only what they
start from was fixed before (`start.py`), and judging takes the place of the report.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from dflash_train.config import RecipeConfig, require
from dflash_train.release.registry import PROMOTED, Event, Registry
from dflash_train.stages.table import BLEND, TUNE, stages_of
from dflash_train.stages.tune.judging import read_verdict
from dflash_train.stages.tune.rule_book import BOOK_NAME
from dflash_train.stages.tune.start import (
    TUNING_FOLDER,
    Tuning,
    begin,
    plan_tuning,
    was_judged,
)
from dflash_train.stages.walk import is_complete, run_stage
from dflash_train.stages.work import check_collect_engine
from dflash_train.stages.workshop import Workshop

_NOT_HERE = ("evaluate", "report")
"""Stages of a run that a tuning does without."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a tuning ended."""

    folder: Path
    """Verdict and traces."""
    verdict: dict[str, Any]
    """As `verdict.json` holds it."""
    registry: Registry

    @property
    def is_promoted(self) -> bool:
        """Whether the rule holds for the candidate."""
        return self.verdict["verdict"] == "promoted"

    def lines(self) -> list[str]:
        """Give the verdict as lines to print, the figures first."""
        return [
            *_table(self.verdict["gains"]),
            *_sentences(self.verdict, self.folder.parent / BOOK_NAME),
            *self.registry.lines(),
        ]

    def as_json(self) -> str:
        """Give the verdict as one line."""
        found = self.verdict | {"registry": str(self.registry.folder), "folder": str(self.folder)}
        return orjson.dumps(found).decode()


def tune(config: RecipeConfig, *, force: bool = False) -> Outcome:
    """Tune the serving drafter to a log and promote the result if the rule holds.

    Args:
        config: The recipe as the user gave it.
        force: Begin again, every stage of it.

    Raises:
        ValueError: There is nothing to start from, a stage finds its input unusable, or this run
            has ended and its data changed since.
    """
    num_processes = os.environ.get("WORLD_SIZE", "1")
    require(
        num_processes == "1",
        f"tune runs as one process, and {num_processes} were launched. Launch `train.py` with the "
        "keys that `tune --dry-run` prints; then `tune` goes on from there.",
    )
    tuning = plan_tuning(config, force=force)
    workshop = Workshop(tuning.config)
    check_collect_engine(workshop)
    begin(looking_again(workshop, tuning))
    for name in stage_names(tuning.config):
        run_stage(workshop, name, force=force)
    folder = tuning.config.run_dir / TUNING_FOLDER
    return Outcome(folder=folder, verdict=read_verdict(folder), registry=tuning.registry)


def stage_names(config: RecipeConfig) -> list[str]:
    """List the stages of a tuning in order."""
    names = [stage.name for stage in stages_of(config) if stage.name not in _NOT_HERE]
    return [*names, BLEND.name, TUNE.name]


def looking_again(workshop: Workshop, tuning: Tuning) -> Tuning:
    """Note in the book that another candidate will be judged on a window that was judged before.

    Raises:
        ValueError: The run has ended, and what it would do now would be refused by the registry;
            said before hours of work lead there.
    """
    event, book = tuning.event, tuning.book
    if event is None:
        return tuning
    names = [name for name in stage_names(tuning.config) if name != TUNE.name]
    undone = [name for name in names if not is_complete(workshop, name)]
    is_promoted_by_it = event.kind == PROMOTED and event.facts["rule"] == book.hash
    is_settled = event.kind == PROMOTED or event.facts["rule"] == book.hash
    if undone or not is_settled:
        require(
            tuning.registry.roles.current == book.incumbent and not is_promoted_by_it,
            _ended(tuning, event, undone),
        )
    if not undone or not was_judged(tuning.config, book, event):
        return tuning
    again = replace(book, judged_before=[*book.judged_before, book.hash])
    return replace(tuning, book=again, is_new=True)


def _ended(tuning: Tuning, event: Event, undone: list[str]) -> str:
    """Say why a run that has ended cannot go on."""
    what, name = ("data or settings have", undone[0]) if undone else ("rule has", TUNE.name)
    how = (
        f"was promoted at {event.time}"
        if event.kind == PROMOTED
        else f"was judged at {event.time} against a drafter that is not "
        f"{tuning.registry.folder / 'current'} any more"
    )
    return (
        f"name (={tuning.config.name}): this tuning {how}, and its {what} changed "
        f"since: {name} would run again. Give the run another name, or begin again with --force."
    )


def _table(gains: list[dict[str, Any]]) -> list[str]:
    head = ["", "requests", "incumbent", "candidate", "gain", "95 %, paired"]
    rows = [
        [
            gain["name"],
            str(gain["num_requests"]),
            f"{gain['incumbent']:.3f}",
            f"{gain['candidate']:.3f}",
            f"{gain['relative']:+.1%}",
            f"{gain['low']:+.1%} to {gain['high']:+.1%}",
        ]
        for gain in gains
    ]
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    lines = []
    for row in [head, *rows]:
        first, *others = (
            f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return lines


def _sentences(verdict: dict[str, Any], book: Path) -> list[str]:
    reasons = "; ".join(verdict["reasons"]) or "every part of the rule holds"
    return [
        f"{verdict['verdict']}: {reasons}",
        f"rule {verdict['rule']['hash']}, written before the training: {book}",
        *(f"note: {remark}" for remark in verdict["remarks"]),
    ]
