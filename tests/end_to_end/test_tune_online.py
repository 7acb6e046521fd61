"""`tune` without a feature store: the target reads rows while the drafter learns from them."""

import shutil
from pathlib import Path

import pytest

from dflash_train.cli import main
from dflash_train.drafter.checkpoint import drafter_hash, save_checkpoint
from tests.end_to_end.tunings import (
    NEW,
    NEWER,
    NUM_JUDGED,
    SETTINGS,
    TUNE,
    copied,
    files_below,
    make_world,
    served_drafter,
    verdict_of,
)

ONLINE = "data.features=online"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_target_folder: Path) -> Path:
    """A folder with one run whose features are online, and the same one with stored features."""
    folder = make_world(tmp_path_factory.mktemp("world"), tiny_target_folder, ONLINE)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        shutil.copytree("runs/week", "runs/stored")
        assert main(["collect", *SETTINGS, "name=stored", NEW]) == 0
        save_checkpoint(served_drafter(target_layer_ids=[0, 2]), Path("taps"))
    return folder


def test_a_tuning_without_stored_features_ends_in_a_verdict_like_any_other(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(copied(world, tmp_path))
    words = [*TUNE, NEW, "init=served", ONLINE]
    assert main([*words, "--dry-run"]) == 0
    assert f"tune: two drafters on {NUM_JUDGED} answers of the newest window" in (
        capsys.readouterr().out.splitlines()
    )
    assert main([*words, "fail_if_kept=true"]) == 0
    verdict = verdict_of()
    assert drafter_hash(Path("registry/current")) == verdict["candidate"]
    (traffic,) = verdict["gains"]
    assert traffic["num_requests"] == NUM_JUDGED
    assert traffic["low"] > 0.1
    assert not verdict["doctor"]["skipped"]
    shards = [path.name for path in Path("runs/week/features").rglob("*.safetensors")]
    assert shards
    assert all(name.startswith("tokens-") for name in shards)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [ONLINE, "tune.replay_from=[runs/stored]"],
            "tune.replay_from (=runs/stored) is replayed from stored features, and data.features "
            "(=online) keeps none. Set data.features to stored",
        ),
        (
            [ONLINE, "tune.replay_from=[runs/stored]", "tune.replay_share=0"],
            "data.features (=online) keeps none. Set data.features to stored",
        ),
        (
            ["tune.replay_from=[runs/stored,runs/week]"],
            "tune.replay_from (=runs/week) was collected with data.features=online",
        ),
        (
            ["tune.replay_from=[runs/none]"],
            "tune.replay_from (=runs/none) holds no complete features. Give",
        ),
        (
            ["tune.replay_from=[runs/stored]", "data.teacher_top_k=4", "loss.kl=1"],
            "tune.replay_from (=runs/stored) keeps 0 tokens of each distribution of the target, "
            "and this run's losses need data.teacher_top_k (=4). Run its `collect` with that",
        ),
        (
            ["tune.replay_from=[runs/stored]", "init=taps"],
            "tune.replay_from (=runs/stored) holds features of another target: target_layer_ids is "
            "[1, 3] there and [0, 2] here. Leave it out",
        ),
    ],
)
def test_earlier_runs_that_cannot_be_replayed_are_refused_before_the_log_is_read(
    world: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(world)
    before = files_below(world)
    for more in ([], ["--dry-run"]):
        assert main([*TUNE, NEWER, "name=later", "init=served", *words, *more]) == 2
        assert message in capsys.readouterr().err
    assert files_below(world) == before
