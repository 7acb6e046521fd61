"""The last stage of a tuning: candidate against incumbent, the doctor, the verdict, the switch.

Both are replayed on the answers of the newest window, which nothing was trained on or chosen by,
and on the newest windows of the earlier runs, whose tenants may be missing from the new log. The
verdict is written, then the registry is switched, then the manifest says that it is done: a run cut
short in between finds the switch in the registry's history and does not make it twice.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import orjson
import torch

from dflash_train.config import require
from dflash_train.features.row_source import RowSource
from dflash_train.records.manifest import FileEntry, Manifest, write_bytes
from dflash_train.release.doctor import examine
from dflash_train.release.finding import Finding, Status
from dflash_train.release.promotion import Gain, PromotionRule, Verdict, judge
from dflash_train.release.registry import PROMOTED, Registry
from dflash_train.stages.drafters import import_drafter
from dflash_train.stages.earlier_runs import earlier_window, earlier_window_inputs
from dflash_train.stages.examination import decode_prompts
from dflash_train.stages.online import open_rows
from dflash_train.stages.tune.blending import BLEND_FOLDER, candidate_folder
from dflash_train.stages.tune.rule_book import RuleBook, read_book
from dflash_train.stages.tune.start import TUNING_FOLDER, ending
from dflash_train.stages.workshop import Workshop

VERDICT_NAME = "verdict.json"
TRAFFIC, EARLIER = "traffic", "earlier runs"
INCUMBENT, CANDIDATE = "incumbent", "candidate"
_FORMAT, _FORMAT_VERSION = "dflash-train/verdict", 1


def judging_inputs(workshop: Workshop) -> dict[str, str]:
    """Hash what the verdict depends on beside the run: rule, incumbent, earlier windows.

    Raises:
        ValueError: The rule is not written, or an earlier run does not fit.
    """
    book = _book_of(workshop)
    blend = Manifest.read(workshop.config.run_dir / BLEND_FOLDER)
    found = {
        "rule": book.hash,
        "incumbent": book.incumbent,
        "blend": "none yet" if blend is None else blend.hash,
    }
    return found | earlier_window_inputs(workshop)


def judge_candidate(workshop: Workshop, manifest: Manifest) -> None:
    """Write verdict and traces, switch the registry, and write the manifest last."""
    config, book = workshop.config, _book_of(workshop)
    registry = Registry(Path(config.tune.registry))
    folder, place = config.run_dir / TUNING_FOLDER, candidate_folder(config)
    candidate = registry.store(place)
    registry.nominate(candidate, facts={"rule": book.hash, "run": config.name})
    _replay_both(workshop, registry, book=book, candidate=candidate)
    gains = _gains(folder, book.rule)
    findings = _examine(workshop, place)
    failed = [each.check for each in findings if each.status is Status.failed]
    verdict = judge(book.rule, traffic=gains[0], tenants=gains[1:], failed_checks=failed)
    verdict = replace(verdict, remarks=verdict.remarks + _remarks(workshop, book, candidate))
    content = _content(verdict, book, candidate=candidate, gains=gains, findings=findings)
    text = orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
    write_bytes(folder / VERDICT_NAME, text + b"\n")
    _settle(registry, verdict, book, candidate=candidate, run=config.name)
    files = [*sorted(folder.glob("*.jsonl")), folder / VERDICT_NAME]
    manifest.outputs = [FileEntry.of(path, folder) for path in files]
    manifest.write(folder)


def read_verdict(folder: Path) -> dict[str, Any]:
    """Read the verdict of a finished tuning, as `verdict.json` holds it."""
    return orjson.loads((folder / VERDICT_NAME).read_bytes())


def _book_of(workshop: Workshop) -> RuleBook:
    book = read_book(workshop.config.run_dir)
    require(
        book is not None,
        f"{workshop.config.run_dir} has no promotion rule. Run `dflash-train tune`, which writes "
        "it first.",
    )
    assert book is not None
    return book


def _replay_both(workshop: Workshop, registry: Registry, *, book: RuleBook, candidate: str) -> None:
    """Replay both drafters on all windows; files that are there already are kept."""
    from dflash_inference.evaluate import trace_replay

    target, folder = workshop.target, workshop.config.run_dir / TUNING_FOLDER
    for side, drafter_hash in ((INCUMBENT, book.incumbent), (CANDIDATE, candidate)):
        place = registry.drafter_folder(drafter_hash)
        drafter = import_drafter(place, workshop.config.target).drafter.to(target.device)
        for window, rows in _windows(workshop).items():
            path = _trace_path(folder, side, window)
            trace_replay(path, window, rows, drafter=drafter, head=target.head)


def _windows(workshop: Workshop) -> dict[str, RowSource]:
    """Open the newest windows: that of the new log, and those of the earlier runs if it has any."""
    windows = {TRAFFIC: open_rows(workshop, "test")}
    earlier = earlier_window(workshop.config, verify=True)
    return windows if earlier is None else windows | {EARLIER: earlier}


def _trace_path(folder: Path, side: str, window: str) -> Path:
    return folder / f"{side}-{window.replace(' ', '-')}.jsonl"


def _gains(folder: Path, rule: PromotionRule) -> list[Gain]:
    """Compare the replays; the gain over the whole newest window comes first."""
    from dflash_inference.paired_gains import paired_gains
    from dflash_inference.trace import read_traces

    found: list[Gain] = []
    for window in (TRAFFIC, EARLIER):
        paths = [_trace_path(folder, side, window) for side in (CANDIDATE, INCUMBENT)]
        if not paths[0].exists():
            continue
        new, old = (read_traces(path) for path in paths)
        gains = paired_gains(
            window,
            new=new,
            old=old,
            fewest_requests=rule.fewest_requests,
            resamples=rule.resamples,
            seed=rule.seed,
        )
        require(
            window != TRAFFIC or bool(gains),
            "no answer of the newest window has a verify step: each ended with its first token. "
            "Give a longer log or raise data.test_share.",
        )
        found += [
            Gain(
                name=each.name,
                num_requests=each.difference.num_requests,
                incumbent=each.old,
                candidate=each.new,
                relative=each.difference.value,
                low=each.difference.interval.low,
                high=each.difference.interval.high,
            )
            for each in gains
        ]
    return found


@torch.no_grad()
def _examine(workshop: Workshop, checkpoint: Path) -> list[Finding]:
    """Let the doctor look at the candidate beside its target, recipe and answers."""
    config = workshop.config
    return examine(
        checkpoint,
        workshop.target,
        recipe=config,
        run_dir=config.run_dir,
        decode=decode_prompts,
    )


def _remarks(workshop: Workshop, book: RuleBook, candidate: str) -> list[str]:
    """Say what makes the figures worth less than they seem."""
    remarks: list[str] = []
    if candidate == book.incumbent:
        remarks.append("the candidate is the incumbent itself: training led to it again")
    ingested = Manifest.read(workshop.config.run_dir / "conversations")
    assert ingested is not None, "stages before have run"
    sessions, timeless = (
        ingested.details[name] for name in ("sessions", "sessions_not_time_based")
    )
    if timeless:
        remarks.append(
            f"{timeless} of {sessions} sessions have no time, so which of them are the newest was "
            "drawn by lot"
        )
    if book.judged_before:
        remarks.append(
            f"this run was judged {len(book.judged_before)} time(s) before, by another rule, for "
            "another candidate or on another log: the more looks, the likelier one succeeds by "
            "chance"
        )
    return remarks


def _content(
    verdict: Verdict,
    book: RuleBook,
    *,
    candidate: str,
    gains: list[Gain],
    findings: list[Finding],
) -> dict[str, Any]:
    checks = {
        status.value: [each.check for each in findings if each.status is status]
        for status in Status
    }
    return {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "verdict": "promoted" if verdict.is_promoted else "kept",
        "reasons": verdict.reasons,
        "remarks": verdict.remarks,
        "rule": asdict(book.rule) | {"hash": book.hash, "judged_before": book.judged_before},
        "incumbent": book.incumbent,
        "candidate": candidate,
        "gains": [asdict(each) for each in gains],
        "doctor": checks,
    }


def _settle(
    registry: Registry, verdict: Verdict, book: RuleBook, *, candidate: str, run: str
) -> None:
    """Switch the registry as the verdict says, once.

    A candidate that this run has promoted before, by an earlier rule, is left where it is: only a
    rollback takes a drafter out of service.
    """
    event = ending(registry, book)
    if event is not None and event.facts["candidate"] == candidate:
        if event.facts["rule"] == book.hash or event.kind == PROMOTED:
            return
    facts = {
        "rule": book.hash,
        "run": run,
        "incumbent": book.incumbent,
        "candidate": candidate,
        "reasons": verdict.reasons,
    }
    switch = registry.promote if verdict.is_promoted else registry.keep
    switch(candidate, against=book.incumbent, facts=facts)
