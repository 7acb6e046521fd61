"""Private values: what the scrubber finds, what it takes for private, and what a run leaves.

    make bench-privacy
    python -m benchmarks.bench_privacy [--plants 20000] [--seed N] [--workers 2] [--folder DIR]

20,000 labelled private values of 16 kinds, from our own dice and from `faker` in eight locales,
and as many look-alikes. Without a seed one is drawn that nobody has seen; it is in the last line.
The detectors are scored on every text. Then all texts go as logs of ten formats through the real
`ingest` (`privacy_log`, `privacy_road`), and a byte search through everything that it wrote or
printed has to find exactly what the detectors missed. The last line is one JSON object; the exit
code is 1 if a goal is missed. `--show 20` prints misses and mistakes: invented values.
"""

import argparse
import json
import secrets
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.byte_search import ByteSearch
from benchmarks.privacy_log import write_logs
from benchmarks.privacy_road import Road, finds_controls, walk_road
from dflash_data.privacy.detectors import KINDS, find_private
from tests.test_data.privacy_corpus import Sample, Score, make_corpus, score
from tests.test_data.privacy_plants import LOCALES

ALWAYS = (
    "AWS_KEY", "GCP_KEY", "GITHUB_KEY", "OPENAI_KEY", "HF_KEY", "PEM", "JWT", "CARD", "IBAN",
)  # fmt: skip
"""Kinds of which none may be missed."""
RECALL, PRECISION, NUM_KINDS = 0.99, 0.98, 14
SEEDS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a byte search should come upon, by the labels and the detectors alone."""

    searched: frozenset[str]
    """Planted values, all but those that a look-alike happens to hold."""
    left: frozenset[str]
    """Searched values that stand in a text when all findings are taken out of it: the misses."""
    partly: int
    """Misses of which a finding covers a part; the whole value shows nowhere."""


def main() -> int:
    """Make the corpus, score it, take it through ingest, print; 1 if a goal is missed."""
    options = _options()
    samples = list(make_corpus(options.plants, seed=options.seed))
    begin = time.perf_counter()
    total = score(iter(samples))
    seconds = time.perf_counter() - begin
    expected = expect(samples, total)
    _tell(f"seed {options.seed}: {len(samples)} texts scored in {seconds:.0f} s; now ingest")
    with tempfile.TemporaryDirectory(prefix="bench-privacy-", dir=options.folder) as name:
        logs = Path(name) / "logs"
        words = write_logs(logs, samples, seed=options.seed)
        search = ByteSearch({*expected.searched, *words.values()})
        road = walk_road(logs, Path(name) / "searched", search, workers=options.workers)
        has_controls = finds_controls(Path(name) / "control")
    for sample in total.missed[: options.show]:
        print("missed", sample.kind, repr(sample.text)[:160])
    for sample, kind in total.wrong[: options.show]:
        print("wrong ", kind, "in", sample.kind, repr(sample.text)[:160])
    goals = scored_goals(total, options.plants) | searched_goals(
        expected, road, words, has_controls=has_controls
    )
    print(table(total))
    print(road_table(expected, road, words))
    is_met = all(goal["met"] for goal in goals.values())
    about = {"seed": options.seed, "locales": len(LOCALES), "look_alikes": options.plants}
    print(json.dumps({**about, "goals": goals, "met": is_met}))
    return 0 if is_met else 1


def expect(samples: list[Sample], total: Score) -> Expected:
    """Say what a byte search should find, from the detectors' findings in each text alone."""
    private = {sample.value for sample in samples if sample.is_private}
    finder = ByteSearch(private)
    alike = "\n".join(sample.text for sample in samples if not sample.is_private)
    searched = private - finder.find(alike.encode())
    rest = "\n".join(_without_findings(sample.text) for sample in samples if sample.is_private)
    missed = {sample.value for sample in total.missed} & searched
    left = finder.find(rest.encode()) & searched
    return Expected(searched=frozenset(searched), left=frozenset(left), partly=len(missed - left))


def _without_findings(text: str) -> str:
    pieces, end = [], 0
    for finding in find_private(text):
        pieces.append(text[end : finding.start])
        end = finding.end
    return "\0".join([*pieces, text[end:]])


def scored_goals(total: Score, num_plants: int) -> dict[str, dict[str, Any]]:
    """Give the goals that the detectors alone decide."""
    goals = {
        "plants": _goal(total.planted.total(), at_least=num_plants),
        "kinds": _goal(len(total.planted), at_least=NUM_KINDS),
        "precision": _goal(total.right.total() / total.found.total(), at_least=PRECISION),
    }
    for kind in KINDS:
        least = 1.0 if kind in ALWAYS else RECALL
        goals[f"recall/{kind}"] = _goal(total.recall(kind), at_least=least)
        goals[f"precision/{kind}"] = _goal(total.precision(kind), at_least=PRECISION)
    return goals


def searched_goals(
    expected: Expected, road: Road, words: dict[str, str], *, has_controls: bool
) -> dict[str, dict[str, Any]]:
    """Give the goals of the byte search; words are those that must come through."""
    control = set(words.values())
    found, temporary = set(road.found.values), set(road.killed.values)
    return {
        "leaked": _goal(len((found | temporary) - control - expected.left), at_most=0),
        "misses_not_found": _goal(len(expected.left - found), at_most=0),
        "formats_that_came_through": _goal(len(found & control), at_least=len(control)),
        "temporary_files_searched": _goal(road.num_temporary, at_least=1),
        "search_finds_controls": _goal(int(has_controls), at_least=1),
        "gzip_files_searched": _goal(road.found.files["gzip"], at_least=1),
        "finished": _goal(road.exit_codes["finished"], at_most=0),
        "refused": _goal(road.exit_codes["refused"], at_least=1),
    }


def _goal(value: float, *, at_least: float | None = None, at_most: float | None = None) -> Any:
    is_met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    bound = {"at_least": at_least} if at_most is None else {"at_most": at_most}
    return {"value": round(value, 5), **bound, "met": is_met}


def table(total: Score) -> str:
    """Give one line by kind: recall by source and over both, exact ends, precision."""
    lines = ["kind             planted  recall: own   faker     all   exact    found  precision"]
    for kind in KINDS:
        by_source = [
            _share(total.caught_by, total.planted_by, (kind, source)) for source in SOURCES
        ]
        exact = total.exact[kind] / max(1, total.planted[kind])
        lines.append(
            f"{kind:16} {total.planted[kind]:7}     {by_source[0]}  {by_source[1]}"
            f"  {total.recall(kind):6.4f}  {exact:6.4f}  {total.found[kind]:7}"
            f"  {total.precision(kind):9.4f}"
        )
    return "\n".join(lines)


SOURCES = ("own", "faker")


def _share(caught: Any, planted: Any, key: tuple[str, str]) -> str:
    return f"{caught[key] / planted[key]:7.4f}" if planted[key] else "      -"


def road_table(expected: Expected, road: Road, words: dict[str, str]) -> str:
    """Give what the byte search went through and came upon."""
    control = set(words.values())
    books = {name: count for name, count in road.counts.get("dropped", {}).items() if count}
    return "\n".join(
        [
            f"read {road.counts.get('read')}, kept {road.counts.get('kept')}, dropped {books}",
            f"searched for {len(expected.searched)} values: {sum(road.found.files.values())} files "
            f"({dict(sorted(road.found.files.items()))}), {road.found.num_bytes} bytes unpacked; "
            f"after a kill {road.num_temporary} temporary files",
            f"expected {len(expected.left)} ({expected.partly} more are hidden in part), "
            f"found {len(set(road.found.values) - control)} at the end, "
            f"{len(set(road.killed.values) - control)} after the kill",
        ]
    )


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plants", type=int, default=20_000, help="and as many look-alikes")
    parser.add_argument("--seed", type=int, default=None, help="drawn unless given")
    parser.add_argument("--workers", type=int, default=2, help="processes of ingest")
    parser.add_argument("--folder", help="where logs and runs lie meanwhile")
    parser.add_argument("--show", type=int, default=0, help="misses and mistakes to print")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = secrets.randbelow(SEEDS)
    return options


if __name__ == "__main__":
    sys.exit(main())
