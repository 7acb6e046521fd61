"""`tune` on a run that has ended: the same command, a changed log, `--force`."""

from pathlib import Path
from typing import Any

import pytest

from dflash_train.cli import main
from dflash_train.drafter.checkpoint import drafter_hash
from dflash_train.release.registry import Registry
from dflash_train.training.trainer import Trainer
from tests.end_to_end.tunings import (
    NEW,
    NEWER,
    NUM_JUDGED,
    STRICT,
    TUNE,
    copied,
    files_below,
    make_world,
    verdict_of,
)

REGISTRY = Registry(Path("registry"))
AGAIN = [*TUNE, NEW, "init=registry/current"]
"""The command of the promoted run as it may be given every week: `current` has moved since."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, tiny_target_folder: Path) -> Path:
    """A folder after a tuning whose candidate was better, and kept by a strict rule."""
    folder = make_world(tmp_path_factory.mktemp("kept"), tiny_target_folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        REGISTRY.adopt(Path("served"))
        assert main([*AGAIN, STRICT, "fail_if_kept=true"]) == 3
    return folder


@pytest.fixture(scope="module")
def promoted(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder after the same candidate was promoted by another rule."""
    folder = copied(kept, tmp_path_factory.mktemp("promoted"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert main([*AGAIN, "fail_if_kept=true"]) == 0
    return folder


@pytest.fixture
def _in_promoted(promoted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied(promoted, tmp_path))


@pytest.fixture
def _in_kept(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied(kept, tmp_path))


def cut_at_step(patched: pytest.MonkeyPatch, step: int) -> None:
    original = Trainer.train_step

    def train_step(self: Trainer, window: Any) -> Any:
        if self.state.step == step:
            raise KeyboardInterrupt
        return original(self, window)

    patched.setattr(Trainer, "train_step", train_step)


@pytest.mark.usefixtures("_in_promoted")
def test_a_promoted_run_has_ended_also_where_it_started_from_the_drafter_that_served(
    capsys: pytest.CaptureFixture[str],
):
    before, verdict = files_below(Path.cwd()), verdict_of()
    assert verdict["verdict"] == "promoted"
    assert drafter_hash(Path("registry/current")) == verdict["candidate"]
    assert main(AGAIN) == 0
    assert "tune: complete and unchanged, nothing to do" in capsys.readouterr().err
    assert files_below(Path.cwd()) == before


@pytest.mark.usefixtures("_in_promoted")
def test_a_promoted_run_takes_no_other_log_and_says_so_before_anything_runs(
    capsys: pytest.CaptureFixture[str],
):
    before = files_below(Path.cwd())
    for more in ([], ["--dry-run"]):
        assert main([*TUNE, NEWER, *more]) == 2
        message = capsys.readouterr().err
        assert "name (=week): this tuning was promoted at" in message
        assert "ingest would run again. Give the run another name, or begin again with" in message
    assert files_below(Path.cwd()) == before


@pytest.mark.usefixtures("_in_promoted")
def test_force_begins_again_from_what_serves_and_a_cut_one_goes_on_without_it(
    capsys: pytest.CaptureFixture[str],
):
    first, history = verdict_of(), REGISTRY.history()
    looks = [*first["rule"]["judged_before"], first["rule"]["hash"]]
    words = [*TUNE, NEW]
    assert main([*words, "--force", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"start: {REGISTRY.drafter_folder(first['candidate'])}" in lines
    assert not any("complete and unchanged" in line for line in lines)
    assert verdict_of() == first

    for force in (["--force"], ["--force"]):
        with pytest.MonkeyPatch.context() as patched:
            cut_at_step(patched, 25)
            assert main([*words, *force]) == 130
    errors = capsys.readouterr().err
    assert "this run was judged before, and is judged again: the verdict will say so" in errors
    assert "run it again to go on" in errors
    assert REGISTRY.history() == history

    assert main(words) == 0
    errors, verdict = capsys.readouterr().err, verdict_of()
    assert "ingest: complete and unchanged" in errors
    assert "train: running" in errors
    assert verdict["incumbent"] == first["candidate"]
    assert verdict["rule"]["judged_before"] == looks
    assert any("judged 2 time(s) before" in remark for remark in verdict["remarks"])
    events = REGISTRY.history()
    assert [event.kind for event in events[len(history) :]] == ["nominated", verdict["verdict"]]
    assert events[-1].facts["rule"] == verdict["rule"]["hash"]

    assert main(words) == 0
    assert REGISTRY.history() == events
    assert verdict_of() == verdict


@pytest.mark.usefixtures("_in_promoted")
def test_force_that_leads_to_the_serving_drafter_again_says_so_and_leaves_it_in_service():
    events, roles = REGISTRY.history(), REGISTRY.roles
    # So small a share of the tuned weights changes no bit of those that serve.
    none_of_it = [f"init={REGISTRY.folder / 'current'}", "tune.blends=[1e-30]"]
    assert main([*TUNE, NEW, *none_of_it, "--force"]) == 0
    verdict = verdict_of()
    assert verdict["candidate"] == verdict["incumbent"] == roles.current
    assert verdict["verdict"] == "kept"
    assert any("is the incumbent itself" in remark for remark in verdict["remarks"])
    assert REGISTRY.roles == roles
    assert REGISTRY.history() == events


@pytest.mark.usefixtures("_in_kept")
def test_a_changed_log_is_trained_on_and_judged_again_and_the_verdict_says_so():
    first, events = verdict_of(), REGISTRY.history()
    assert main([*TUNE, NEWER, "fail_if_kept=true"]) == 0
    verdict = verdict_of()
    assert verdict["candidate"] != first["candidate"]
    assert verdict["gains"][0]["num_requests"] == NUM_JUDGED
    assert verdict["rule"]["judged_before"] == [first["rule"]["hash"]]
    assert any("judged 1 time(s) before" in remark for remark in verdict["remarks"])
    history = REGISTRY.history()
    assert history[: len(events)] == events
    assert [event.kind for event in history[len(events) :]] == ["nominated", "promoted"]
    assert REGISTRY.roles.current == verdict["candidate"]


@pytest.mark.usefixtures("_in_kept")
@pytest.mark.parametrize(("words", "undone"), [([NEWER], "ingest"), ([NEW], "tune")])
def test_a_kept_run_is_not_judged_again_against_a_drafter_that_serves_no_more(
    words: list[str], undone: str, capsys: pytest.CaptureFixture[str]
):
    roles = REGISTRY.roles
    assert roles.current is not None
    assert roles.candidate is not None
    REGISTRY.promote(roles.candidate, against=roles.current, facts={"rule": "of another run"})
    before = files_below(Path.cwd())
    assert main([*TUNE, *words]) == 2
    message = capsys.readouterr().err
    assert "name (=week)" in message
    assert "against a drafter that is not registry/current any more" in message
    assert f"{undone} would run again. Give the run another name" in message
    assert files_below(Path.cwd()) == before
