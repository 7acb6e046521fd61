"""The verb `export`, and drafters of other dialects where a folder of ours would do."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from dflash_train.cli import main
from dflash_train.config import TargetConfig
from dflash_train.drafter.checkpoint import save_checkpoint
from dflash_train.drafter.metadata import CheckpointMetadata, read_metadata
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target
from dflash_train.release.formats import Format, read_drafter
from dflash_train.release.formats.audit import tensor_differences
from dflash_train.stages.drafters import import_drafter
from dflash_train.testing import (
    SHAPES,
    VARIANTS,
    save_tiny_target,
    tiny_drafter,
    tiny_llama_config,
    tiny_tokenizer,
)


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("models") / "tiny")


def _export(folder: Path, target: Path, *more: str) -> int:
    return main(["export", f"checkpoint={folder}", f"target.name_or_path={target}", *more])


def _saved(drafter: Drafter, folder: Path) -> Path:
    save_checkpoint(drafter, folder, metadata=CheckpointMetadata(target={"name": "tiny"}))
    return folder


@pytest.mark.parametrize("format", [Format.zlab, Format.speculators])
def test_a_checkpoint_is_exported_from_the_command_line(
    format: Format,
    target32: Target,
    target_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    drafter = tiny_drafter(target32, dtype=torch.bfloat16)
    folder, out = _saved(drafter, tmp_path / "best"), tmp_path / "out"
    assert _export(folder, target_folder, f"format={format.value}", f"out={out}") == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    found = read_drafter(out)
    assert found.format is format
    assert tensor_differences(found.drafter.state_dict(), drafter.state_dict()) == []
    known = read_metadata(out)
    assert known is not None
    assert known.target == {"name": "tiny"}


def test_there_and_back_through_both_layouts_ends_with_the_same_bytes(
    target32: Target, target_folder: Path, tmp_path: Path
):
    start = _saved(tiny_drafter(target32, **VARIANTS["dflash2"]), tmp_path / "zero")
    for number, name in enumerate(["speculators", "zlab"]):
        source, out = tmp_path / ("zero", "one")[number], tmp_path / ("one", "two")[number]
        assert _export(source, target_folder, f"format={name}", f"out={out}") == 0
    for path in start.iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_a_reduced_vocabulary_is_exported_and_imported_with_its_target(
    target32: Target, target_folder: Path, tmp_path: Path
):
    drafter = tiny_drafter(target32, **VARIANTS["reduced"])
    folder, out = _saved(drafter, tmp_path / "best"), tmp_path / "out"
    assert _export(folder, target_folder, "format=speculators", f"out={out}") == 0
    found = import_drafter(out, TargetConfig(name_or_path=str(target_folder)))
    assert tensor_differences(found.drafter.state_dict(), drafter.state_dict()) == []


def test_an_exported_drafter_chats(
    target32: Target, target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, out = _saved(tiny_drafter(target32), tmp_path / "best"), tmp_path / "out"
    assert _export(folder, target_folder, "format=speculators", f"out={out}") == 0
    asked = ["prompt=How many?", "serve.fast=false", "serve.adaptive=false"]
    settings = [f"checkpoint={out}", f"target.name_or_path={target_folder}"]
    assert main(["generate", *settings, *asked, "serve.max_new_tokens=6"]) == 0
    assert "acceptance length" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["out=OUT"], r"export: format \(=\) must be one of zlab, speculators"),
        (["format=gguf", "out=OUT"], "format (=gguf) must be one of"),
        (["format=zlab"], "out must be set"),
        (["format=zlab", "out=BEST"], "holds something else"),
        (["format=zlab", "out=BUSY"], "holds something else"),
    ],
)
def test_what_the_command_lacks_is_said(
    more: list[str],
    message: str,
    target32: Target,
    target_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    folder = _saved(tiny_drafter(target32), tmp_path / "best")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "thesis.tex").touch()
    places = {"OUT": tmp_path / "out", "BEST": folder, "BUSY": tmp_path / "busy"}
    for name, place in places.items():
        more = [argument.replace(name, str(place)) for argument in more]
    assert _export(folder, target_folder, *more) == 2
    assert message.replace("\\", "") in capsys.readouterr().err
    assert (tmp_path / "busy" / "thesis.tex").exists()


def test_an_earlier_export_is_replaced(target32: Target, target_folder: Path, tmp_path: Path):
    folder, out = _saved(tiny_drafter(target32), tmp_path / "best"), tmp_path / "out"
    for name in ("zlab", "speculators"):
        assert _export(folder, target_folder, f"format={name}", f"out={out}") == 0
    assert read_drafter(out).format is Format.speculators


def test_another_target_is_refused(
    target32: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tiny_llama_config()
    config.num_hidden_layers = SHAPES["num_hidden_layers"] + 1
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    folder = _saved(tiny_drafter(target32), tmp_path / "best")
    assert _export(folder, tmp_path / "other", "format=speculators", f"out={tmp_path / 'out'}") == 2
    assert "num_hidden_layers 7, not 6" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_drafter_that_a_layout_cannot_hold_is_refused(
    target32: Target, target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = _saved(tiny_drafter(target32, **VARIANTS["mixed"]), tmp_path / "best")
    assert _export(folder, target_folder, "format=speculators", f"out={tmp_path / 'out'}") == 2
    assert "Use format=zlab" in capsys.readouterr().err
