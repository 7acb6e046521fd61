import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dflash_train.cli import main
from dflash_train.drafter.checkpoint import drafter_hash, load_checkpoint, save_checkpoint
from dflash_train.features.target import Target
from dflash_train.release.registry import HISTORY_NAME, Registry, Roles
from dflash_train.release.resolve import resolve_checkpoint
from dflash_train.testing import tiny_drafter
from tests.test_train.registry_kills import write_drafter

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 11, 23, 5, tzinfo=UTC)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A registry with one current drafter; `second` and `third` lie beside it."""
    for name in ("first", "second", "third"):
        write_drafter(tmp_path / name, name)
    made = Registry(tmp_path / "registry", clock=lambda: NOW)
    made.adopt(tmp_path / "first")
    return made


def beside(registry: Registry, name: str) -> str:
    return registry.store(registry.folder.parent / name)


def test_a_promotion_moves_all_three_names_at_once(registry: Registry):
    first, second = registry.roles.current, beside(registry, "second")
    assert first is not None
    registry.nominate(second, facts={})
    assert registry.roles == Roles(current=first, candidate=second)
    assert drafter_hash(registry.folder / "candidate") == second
    registry.promote(second, against=first, facts={"rule": "sha256:1"})
    assert registry.roles == Roles(current=second, previous=first)
    assert drafter_hash(registry.folder / "current") == second
    assert drafter_hash(registry.folder / "previous") == first
    assert not (registry.folder / "candidate").exists()


def test_a_rollback_exchanges_current_and_previous_and_a_second_one_undoes_it(registry: Registry):
    first, second = registry.roles.current, beside(registry, "second")
    assert first is not None
    registry.promote(second, against=first, facts={})
    registry.roll_back()
    assert registry.roles == Roles(current=first, previous=second)
    assert drafter_hash(registry.folder / "current") == first
    registry.roll_back()
    assert registry.roles == Roles(current=second, previous=first)


def test_nothing_is_rolled_back_before_anything_was_promoted(registry: Registry):
    with pytest.raises(ValueError, match="no previous drafter to go back to"):
        registry.roll_back()


def test_a_damaged_previous_drafter_does_not_get_its_place_back(registry: Registry):
    first, second = registry.roles.current, beside(registry, "second")
    assert first is not None
    registry.promote(second, against=first, facts={})
    (registry.drafter_folder(first) / "model.safetensors").write_text("another")
    with pytest.raises(ValueError, match="does not match the hash"):
        registry.roll_back()
    assert registry.roles.current == second


def test_a_candidate_is_not_promoted_over_a_drafter_that_it_was_not_compared_with(
    registry: Registry,
):
    first, second, third = (
        registry.roles.current,
        beside(registry, "second"),
        beside(registry, "third"),
    )
    assert first is not None
    registry.promote(second, against=first, facts={})
    for verdict in (registry.promote, registry.keep):
        with pytest.raises(ValueError, match="which the candidate was compared with"):
            verdict(third, against=first, facts={})
    assert registry.roles == Roles(current=second, previous=first)


def test_a_registry_is_begun_once(registry: Registry):
    with pytest.raises(ValueError, match=r"is \w+ by now and not none"):
        registry.adopt(registry.folder.parent / "second")


def test_a_kept_candidate_stays_a_candidate(registry: Registry):
    first, second = registry.roles.current, beside(registry, "second")
    assert first is not None
    registry.keep(second, against=first, facts={"reasons": ["it ties"]})
    assert registry.roles == Roles(current=first, candidate=second)


def test_the_history_says_who_switched_what_and_when(registry: Registry):
    first, second = registry.roles.current, beside(registry, "second")
    assert first is not None
    registry.promote(second, against=first, facts={"rule": "sha256:1", "run": "week-1"})
    registry.roll_back()
    lines = (registry.folder / HISTORY_NAME).read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["kind"] for event in events] == ["adopted", "promoted", "rolled back"]
    assert {event["time"] for event in events} == {"2026-11-23T05:00:00Z"}
    assert all("@" in event["who"] for event in events)
    assert events[1]["facts"] == {"rule": "sha256:1", "run": "week-1"}
    assert events[2]["roles"] == {"current": first, "candidate": None, "previous": second}


def test_a_changed_event_is_refused(registry: Registry):
    path = registry.folder / "states" / "000001" / "event.json"
    path.write_bytes(path.read_bytes().replace(b'"kind":"adopted"', b'"kind":"promoted"'))
    with pytest.raises(ValueError, match=r"event\.json is damaged"):
        _ = registry.roles


def test_current_is_a_drafters_folder_that_stays_itself_while_it_is_read(
    tmp_path: Path, target32: Target
):
    for seed in range(2):
        save_checkpoint(tiny_drafter(target32, seed=seed), tmp_path / f"drafter-{seed}")
    registry = Registry(tmp_path / "registry")
    first = registry.adopt(tmp_path / "drafter-0")
    folder = resolve_checkpoint(str(registry.folder / "current"))
    registry.promote(registry.store(tmp_path / "drafter-1"), against=first, facts={})
    assert drafter_hash(folder) == first
    before, now = (load_checkpoint(each) for each in (folder, registry.folder / "current"))
    assert not before.fc.weight.equal(now.fc.weight)


def test_the_command_rolls_back_and_its_dry_run_only_looks(
    registry: Registry, capsys: pytest.CaptureFixture[str]
):
    first, second = registry.roles.current, beside(registry, "second")
    assert first is not None
    registry.promote(second, against=first, facts={})
    command = ["rollback", f"registry={registry.folder}"]
    assert main([*command, "--dry-run"]) == 0
    assert registry.roles.current == second
    assert main(command) == 0
    assert registry.roles.current == first
    assert capsys.readouterr().out.splitlines()[-1] == str(registry.folder / "current")


@pytest.mark.parametrize("words", [["registry=FOLDER"], [], ["registry=FOLDER/none"], ["to=1"]])
def test_a_folder_that_is_no_registry_is_refused_and_left_alone(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["rollback", *(word.replace("FOLDER", str(tmp_path)) for word in words)]) == 2
    assert "rollback:" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_kills_leave_is_a_whole_registry(tmp_path: Path):
    command = [sys.executable, "-m", "tests.test_train.registry_kills", str(tmp_path), "0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["before"] > 50  # file operations of two kinds of switch up to the renamed link
    assert counts["after"] > 5  # and behind it
    assert counts["random"] == 40
    assert counts["switched"] > 0
