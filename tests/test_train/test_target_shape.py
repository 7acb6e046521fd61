"""What a recipe writes down about its target, against the target's own files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dflash_train.config import TargetConfig
from dflash_train.features.target_shape import (
    own_target_config,
    planned_target_config,
    written_target_config,
)
from dflash_train.testing import SHAPES, save_tiny_target

UNREACHABLE = "nobody/has-this-target"
LLAMA: dict[str, Any] = {"model_type": "llama", **SHAPES}


def written_as(name: str, **changes: Any) -> TargetConfig:
    return TargetConfig(name_or_path=name, shapes={name: LLAMA | changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_target(tmp_path_factory.mktemp("target")))


def test_a_target_out_of_reach_is_planned_from_the_recipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    planned = planned_target_config(written_as(UNREACHABLE, hidden_size=48))
    assert planned.hidden_size == 48
    assert planned.model_type == "llama"
    assert f"{UNREACHABLE} is out of reach" in capsys.readouterr().err


def test_only_a_plan_takes_what_the_recipe_writes() -> None:
    with pytest.raises(ValueError, match=UNREACHABLE):
        own_target_config(written_as(UNREACHABLE))


def test_a_target_that_is_not_written_down_must_be_reached() -> None:
    elsewhere = replace(written_as("another/target"), name_or_path=UNREACHABLE)
    assert written_target_config(elsewhere) is None
    with pytest.raises(ValueError, match=UNREACHABLE):
        planned_target_config(elsewhere)


def test_a_wheel_is_not_fetched_for_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLASH_HOME", str(tmp_path))
    planned = planned_target_config(written_as("wheel:no-such-wheel==0.1", vocab_size=300))
    assert planned.vocab_size == 300
    assert not list(tmp_path.iterdir())


def test_the_targets_own_files_win_and_a_wrong_number_is_said(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = planned_target_config(written_as(folder, hidden_size=48, vocab_size=260))
    assert planned.hidden_size == 32
    said = capsys.readouterr().err
    assert "hidden_size 32, written as 48" in said
    assert "vocab_size" not in said


def test_a_right_shape_is_silent_although_files_round(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own_target_config(written_as(folder, rms_norm_eps=1e-6 * (1 + 1e-8)))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "word"), [({"hidden_size": 32}, "model_type"), ({"model_type": "unheard"}, "unheard")]
)
def test_a_shape_of_no_known_class_is_refused(shape: dict[str, Any], word: str) -> None:
    config = TargetConfig(name_or_path=UNREACHABLE, shapes={UNREACHABLE: shape})
    with pytest.raises(ValueError, match=rf"target\.shapes.*{word}.*config\.json"):
        planned_target_config(config)
