"""The list fits the code as it stands, and the runner tells a caught fault from every other end."""

import ast
import importlib
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
KNOWN_FAULTS = {
    "mask off by one", "label shifted", "tap shifted", "RoPE position shifted",
    "anchor's own feature visible", "neighbour block visible", "document leak", "decay on slot 0",
    "denominator per rank", "RoPE theta changed", "accept one too many",
    "cache cropped one too far", "bonus taken from the wrong row", "loss mask shifted",
    "feature rows swapped",
}  # fmt: skip
"""What the list must hold, whatever else it holds."""

CODE = "def double(x: int) -> int:\n    return 2 * x\n"
TEST = (
    "from code_under_test import double\n\ndef test_{name}():\n    assert double({x}) == 2 * {x}\n"
)
MUTANT = """
[[mutant]]
name = "{name}"
fault = "invented"
file = "code_under_test.py"
original = "{original}"
replacement = "{replacement}"
tests = ["tests/test_positive.py"]
"""
CASES = {
    "caught": ("2 * x", "3 * x", "| tests/test_positive.py::test_positive |"),
    "caught elsewhere": ("2 * x", "2 * abs(x)", "| tests/test_negative.py::test_negative |"),
    "the same": ("2 * x", "x * 2", "| SURVIVED: no test |"),
    "a crash": ("2 * x", "2 * y", "| INVALID: FAILED tests/test_positive.py::test_positive - Name"),
    "no Python": ("2 * x", "2 *", "| INVALID: pytest exit 2"),
    "not there": ("3 * x", "4 * x", "| INVALID: mutant 'not there': its original text stands 0"),
}
"""Mutants by name: original, replacement, and how the table's line goes on after the file."""


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The runner."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("mutants")


def test_every_mutant_changes_what_its_file_does(mutants: ModuleType):
    for mutant in mutants.read_mutants():
        source = (ROOT / mutant.file).read_text()
        broken = mutant.apply(source)
        assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(source)), mutant.name


def test_the_list_holds_every_known_fault_and_names_tests_that_exist(mutants: ModuleType):
    listed = mutants.read_mutants()
    names = [mutant.name for mutant in listed]
    assert len(set(names)) == len(names)
    assert set(names) >= KNOWN_FAULTS
    for mutant in listed:
        assert mutant.tests
        assert all((ROOT / test).is_file() for test in mutant.tests), mutant.name


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A working tree with one function and two tests of it that are not committed."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "code_under_test.py").write_text(CODE)
    for name, x in (("positive", 3), ("negative", -1)):
        (tmp_path / "tests" / f"test_{name}.py").write_text(TEST.format(name=name, x=x))
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "code_under_test.py"], cwd=tmp_path, check=True)
    return tmp_path


def write_list(tree: Path, cases: list[str]) -> Path:
    entries = []
    for name in cases:
        original, replacement, _ = CASES[name]
        entries.append(MUTANT.format(name=name, original=original, replacement=replacement))
    path = tree / "list.toml"
    path.write_text("".join(entries))
    return path


def test_only_a_failed_comparison_counts_as_caught(
    mutants: ModuleType, tree: Path, capsys: pytest.CaptureFixture[str]
):
    assert mutants.main([], root=tree, path=write_list(tree, list(CASES))) == 1
    _, _, *lines, _, summary = capsys.readouterr().out.splitlines()
    for line, (name, (_, _, found)) in zip(lines, CASES.items(), strict=True):
        assert line.startswith(f"| {name} | invented | code_under_test.py {found}")
    assert summary == "2 of 6 mutants caught"
    assert (tree / "code_under_test.py").read_text() == CODE


def test_some_mutants_can_be_chosen_by_name(
    mutants: ModuleType, tree: Path, capsys: pytest.CaptureFixture[str]
):
    path = write_list(tree, ["caught", "the same"])
    assert mutants.main(["--only", "caught"], root=tree, path=path) == 0
    assert capsys.readouterr().out.endswith("1 of 1 mutants caught\n")
    assert mutants.main(["--only", "nothing"], root=tree, path=path) == 2


def test_tests_that_fail_anyway_prove_nothing(mutants: ModuleType, tree: Path):
    (tree / "code_under_test.py").write_text(CODE.replace("2", "5"))
    with pytest.raises(RuntimeError, match=r"unbroken code fails: tests/test_positive\.py"):
        mutants.main([], root=tree, path=write_list(tree, ["caught"]))


def test_a_test_that_fails_for_another_reason_catches_nothing(
    mutants: ModuleType, tree: Path, capsys: pytest.CaptureFixture[str]
):
    (tree / "tests" / "test_unrelated.py").write_text("def test_unrelated():\n    assert 1 == 2\n")
    assert mutants.main([], root=tree, path=write_list(tree, ["the same"])) == 1
    found = "SURVIVED: no test; tests/test_unrelated.py::test_unrelated fails for another reason"
    assert f"| {found} |" in capsys.readouterr().out
