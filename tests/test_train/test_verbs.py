"""Verbs that know no recipe: flags of others mean nothing to them; the command as a module."""

import subprocess
import sys
from pathlib import Path

import pytest

from dflash_train.cli import main


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("sample-traffic", ["out=fleet.jsonl", "requests=3"]),
        ("compare", ["a.jsonl", "b.jsonl"]),
        ("rollback", ["registry=registry"]),
    ],
)
@pytest.mark.parametrize(
    "flag", [["--recipes", "there"], ["--print-recipe"], ["--force"], ["--dry-run"]], ids=str
)
def test_a_flag_that_would_change_nothing_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    words: list[str],
    flag: list[str],
):
    monkeypatch.chdir(tmp_path)
    assert main([verb, *words, *flag]) == 2
    said = capsys.readouterr().err
    assert (f"{flag[0]} means nothing to `{verb}`" in said) == ([verb, *flag] != READING)
    assert not list(tmp_path.iterdir())


READING = ["rollback", "--dry-run"]
"""It shows what the registry's names mean; here there is no registry."""


@pytest.mark.parametrize("module", ["dflash_train", "dflash_train.cli"])
def test_the_command_runs_as_a_module_too(tmp_path: Path, module: str):
    words = [sys.executable, "-m", module, "sample-traffic", "out=fleet.jsonl", "requests=3"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "fleet.jsonl").read_text().splitlines()) >= 3
