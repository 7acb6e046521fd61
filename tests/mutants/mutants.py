"""Break the code on purpose, one known fault at a time, and name the test that notices each.

A test suite is as good as the faults it finds. `mutants.toml` lists the faults that cost people a
trained drafter without any error message. Each is planted alone in a copy of the working tree,
where the tests that should find it run first and, if they all pass, all others but the end-to-end
ones. A fault counts as caught if a test's comparison fails; a mutant that merely crashes proves
nothing.

    make mutants            all of them; the table is the result, exit 1 if one is not caught
    make mutants ONLY=mask  those with this word in their name
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutants.toml")
SOURCE_ROOTS = (".", "data_pipelines", "inference", "kernels")
ALL_BUT_END_TO_END = ["tests", "--ignore=tests/end_to_end", "--ignore=tests/mutants"]
MARKERS = "not slow and not soak and not gpu"
TIME_LIMIT_S = 900
_FAILURE = re.compile(r"^(?:FAILED|ERROR) (?P<test>\S+::.+?)(?: - (?P<error>.*))?$", re.MULTILINE)
_COMPARISON = re.compile(r"AssertionError|assert |Failed: ")
"""How a failed comparison begins; any other exception is a crash."""


class Status(Enum):
    """What became of a mutant."""

    caught = "caught"
    survived = "SURVIVED"
    invalid = "INVALID"
    """It crashes instead of computing something wrong, or its text is not in the file."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One fault: a piece of a file and what it is replaced by."""

    name: str
    fault: str
    """What goes wrong, for the reader."""
    file: str
    original: str
    """Exact text, once in the file."""
    replacement: str
    tests: list[str]
    """Test files that should find the fault, quickest first."""

    def apply(self, source: str) -> str:
        """Give the broken source.

        Raises:
            ValueError: The original is not there exactly once.
        """
        found = source.count(self.original)
        if found != 1:
            raise ValueError(
                f"mutant {self.name!r}: its original text stands {found} times in {self.file}, not "
                "once. Bring tests/mutants/mutants.toml up to date with the code."
            )
        return source.replace(self.original, self.replacement)


@dataclass(frozen=True, kw_only=True)
class TestRun:
    """How one pytest process ended."""

    __test__ = False  # not a test class, whatever its name says to pytest

    returncode: int | None
    """None: stopped after `TIME_LIMIT_S`."""
    output: str

    @property
    def is_passed(self) -> bool:
        """Tell whether every test passed."""
        return self.returncode == 0

    @property
    def is_caught(self) -> bool:
        """Tell whether a test's comparison failed."""
        failure = _FAILURE.search(self.output)
        if self.returncode != 1 or failure is None:
            return False
        return _COMPARISON.match(failure["error"] or "AssertionError") is not None

    def describe(self) -> str:
        """Give the first failing test, or what happened instead."""
        failure = _FAILURE.search(self.output)
        if self.returncode is None:
            return f"no end after {TIME_LIMIT_S} s"
        if failure is None:
            return f"pytest exit {self.returncode}: {self.output.strip().splitlines()[-1:]}"
        return failure["test"] if self.is_caught else failure[0]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One line of the table."""

    mutant: Mutant
    status: Status
    caught_by: str
    """First failing test; else the reason."""
    seconds: float


def read_mutants(path: Path = LIST) -> list[Mutant]:
    """Read the list."""
    return [Mutant(**entry) for entry in tomllib.loads(path.read_text())["mutant"]]


def copy_tree(root: Path, copy: Path) -> None:
    """Copy what git tracks, and new files that it does not ignore, as they are on disk."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        source, goal = root / name, copy / name
        if source.is_symlink() or source.is_file():  # a deleted file is still listed
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, goal, follow_symlinks=False)


def run_tests(copy: Path, tests: list[str]) -> TestRun:
    """Run tests of the copy, on the copy's code, up to the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", MARKERS, *tests]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(copy / place) for place in SOURCE_ROOTS),
        "PYTHONDONTWRITEBYTECODE": "1",  # a stale .pyc would hide a mutant of the same length
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # ours needs none; seconds per process
        "COLUMNS": "1000",  # whole messages in pytest's summary
    }
    try:
        result = subprocess.run(
            command,
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return TestRun(returncode=None, output="")
    return TestRun(returncode=result.returncode, output=result.stdout + result.stderr)


class Laboratory:
    """A copy of the tree in which mutants are planted, one after the other."""

    def __init__(self, copy: Path) -> None:
        """Use a finished copy."""
        self.copy = copy

    def check_health(self, tests: list[str]) -> None:
        """Run tests on the copy as it is; a failure there would be every mutant's.

        Raises:
            RuntimeError: One fails.
        """
        run = run_tests(self.copy, tests)
        if not run.is_passed:
            raise RuntimeError(f"the unbroken code fails: {run.describe()}\n{run.output[-2000:]}")

    def examine(self, mutant: Mutant) -> Outcome:
        """Plant a mutant, run its tests and then the rest, and take it out again."""
        started = time.perf_counter()
        try:
            with self._planted(mutant):
                run = run_tests(self.copy, mutant.tests)
        except ValueError as error:
            return Outcome(mutant=mutant, status=Status.invalid, caught_by=str(error), seconds=0.0)
        status, caught_by = _judge(run)
        if status is Status.survived:
            say(f"  {mutant.name}: not found by its own tests; running the others")
            status, caught_by = self._search_suite(mutant)
        seconds = time.perf_counter() - started
        return Outcome(mutant=mutant, status=status, caught_by=caught_by, seconds=seconds)

    def _search_suite(self, mutant: Mutant) -> tuple[Status, str]:
        """Look for a test that the list does not name.

        It has to fail twice, and to pass on the unbroken copy: tests far from the fault fail now
        and then for reasons of their own.
        """
        with self._planted(mutant):
            status, test = _judge(run_tests(self.copy, ALL_BUT_END_TO_END))
            if status is not Status.caught:
                return status, test
            again = run_tests(self.copy, [test])
        if again.is_caught and run_tests(self.copy, [test]).is_passed:
            return status, test
        return Status.survived, f"no test; {test} fails for another reason"

    @contextmanager
    def _planted(self, mutant: Mutant) -> Iterator[None]:
        path = self.copy / mutant.file
        sound = path.read_text()
        path.write_text(mutant.apply(sound))
        try:
            yield
        finally:
            path.write_text(sound)


def run_mutants(mutants: list[Mutant], root: Path) -> list[Outcome]:
    """Examine mutants of a working tree in a copy of it.

    Raises:
        RuntimeError: The tests fail without any mutant.
    """
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy_tree(root, Path(folder))
        laboratory = Laboratory(Path(folder))
        tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        say(f"mutants: the unbroken code first, {len(tests)} test files")
        laboratory.check_health(tests)
        outcomes = []
        for number, mutant in enumerate(mutants, start=1):
            outcome = laboratory.examine(mutant)
            outcomes.append(outcome)
            say(
                f"{number}/{len(mutants)} {mutant.name}: {outcome.status.value}, "
                f"{outcome.caught_by} ({outcome.seconds:.0f} s)"
            )
    return outcomes


def _judge(run: TestRun) -> tuple[Status, str]:
    """Say what a test run on a planted mutant means, and which test it was."""
    if run.is_passed:
        return Status.survived, "no test"
    return Status.caught if run.is_caught else Status.invalid, run.describe()


def write_table(outcomes: list[Outcome]) -> str:
    """Lay the outcomes out as a Markdown table."""
    lines = ["| mutant | what breaks | file | caught by | s |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        mutant, is_caught = outcome.mutant, outcome.status is Status.caught
        found = outcome.caught_by if is_caught else f"{outcome.status.value}: {outcome.caught_by}"
        cells = (mutant.name, mutant.fault, mutant.file, found, f"{outcome.seconds:.0f}")
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def say(message: str) -> None:
    """Report progress."""
    print(message, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None, *, root: Path = ROOT, path: Path = LIST) -> int:
    """Run the mutants and print the table; 1 if one was not caught."""
    parser = argparse.ArgumentParser(description="Break the code; see which test notices.")
    parser.add_argument("--only", default="", help="those with this text in their name")
    only = parser.parse_args(arguments).only
    mutants = [mutant for mutant in read_mutants(path) if only in mutant.name]
    if not mutants:
        say(f"--only (={only}) is in the name of no mutant in {path.name}.")
        return 2
    outcomes = run_mutants(mutants, root)
    caught = sum(outcome.status is Status.caught for outcome in outcomes)
    print(write_table(outcomes))
    print(f"\n{caught} of {len(outcomes)} mutants caught")
    return 0 if caught == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
