"""What a tuning starts from: drafters in each layout that can be read, and some that do not fit."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from dflash_train.cli import main
from dflash_train.drafter.checkpoint import drafter_hash, save_checkpoint
from dflash_train.release.formats import Format, detect, write_drafter
from dflash_train.release.registry import Registry
from tests.end_to_end.tunings import (
    NEW,
    TUNE,
    copied,
    files_below,
    make_world,
    served_drafter,
    verdict_of,
)

SHORT = "training.max_steps=20"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_target_folder: Path) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), tiny_target_folder)


@pytest.fixture
def _in_world(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied(world, tmp_path))


def write_zlab(folder: Path) -> None:
    """Write z-lab's layout as its first releases do: keys left out, nothing of ours beside it."""
    write_drafter(served_drafter(), folder, format=Format.zlab)
    (folder / "dflash_train.json").unlink()
    content = orjson.loads((folder / "config.json").read_bytes())
    del content["dflash_config"]["block_size"]
    (folder / "config.json").write_bytes(orjson.dumps(content))


def write_speculators(folder: Path) -> None:
    target = {"name": "target", "architectures": ["LlamaForCausalLM"]}
    write_drafter(served_drafter(), folder, format=Format.speculators, target=target)


LAYOUTS: dict[Format, Callable[[Path], Any]] = {
    Format.zlab: lambda folder: save_checkpoint(served_drafter(), folder),
    Format.specforge_export: write_zlab,
    Format.speculators: write_speculators,
}


@pytest.mark.usefixtures("_in_world")
def test_an_incumbent_of_any_layout_is_tuned_alike_and_serves_as_it_is():
    verdicts = []
    for layout, write in LAYOUTS.items():
        place, registry = Path(layout.value), Registry(Path(f"registry-{layout.value}"))
        write(place)
        words = ["tune.min_requests=999", f"init={place}", f"tune.registry={registry.folder}"]
        assert main([*TUNE, NEW, SHORT, *words]) == 0
        verdict = verdict_of()
        verdicts.append(verdict)
        assert registry.roles.current == verdict["incumbent"] == drafter_hash(place)
        for name in ("config.json", "model.safetensors"):
            serving = registry.folder / "current" / name
            assert serving.read_bytes() == (place / name).read_bytes()
        assert detect(registry.folder / "current") is layout
        assert detect(registry.folder / "candidate") is Format.zlab
        assert not verdict["doctor"]["failed"]
        Path("runs/week/promotion_rule.json").unlink()  # the next one is a tuning of its own
    first, *others = verdicts
    assert first["gains"][0]["low"] > 0
    for other in others:
        assert other["candidate"] == first["candidate"]
        assert other["gains"] == first["gains"]


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """A start or an incumbent that does not fit, and what is said about it."""

    init: Callable[[Path], Any] | None
    message: str
    serving: Callable[[Path], Any] | None = None


def other(**fields: Any) -> Callable[[Path], Any]:
    """Give what writes a drafter of another target."""
    return lambda folder: save_checkpoint(served_drafter(**fields), folder)


def write_pickle(folder: Path) -> None:
    folder.mkdir()
    torch.save({}, folder / "training_state.pt")


MISFITS = {
    "empty": Misfit(init=Path.mkdir, message=r"init \(=start\) .* no config.json\. Give"),
    "pickle": Misfit(init=write_pickle, message=r"init \(=start\) .*training state.* Run `python"),
    "vocabulary": Misfit(
        init=other(vocab_size=300),
        message=r"init \(=start\) .*: vocab_size is 300 there and 260 here\. .*name_or_path",
    ),
    "target": Misfit(
        init=other(num_target_layers=12, target_layer_ids=[1, 9]),
        message=r"init \(=start\) .*: num_target_layers is 12 there and 6 here\. .*name_or_path",
    ),
    "vocabulary, also where another one serves": Misfit(
        init=other(vocab_size=300),
        serving=other(),
        message=r"init \(=start\) .*: vocab_size is 300 there and 260 here\. .*name_or_path",
    ),
    "serving vocabulary": Misfit(
        init=None,
        serving=other(vocab_size=300),
        message=r"tune.registry \(=registry\): its drafter \w{16} contradicts .*: vocab_size is "
        r"300 there and 260 here\. Give a drafter of this target, or",
    ),
    "serving taps": Misfit(
        init=other(),
        serving=other(target_layer_ids=[0, 2]),
        message=r"tune.registry \(=registry\): its drafter \w{16} serves .*init \(=start\) "
        r"becomes: target_layer_ids is \[0, 2\] there and \[1, 3\] here\. Start from",
    ),
}


@pytest.mark.usefixtures("_in_world")
@pytest.mark.parametrize("name", MISFITS)
def test_a_drafter_that_does_not_fit_is_refused_before_anything_is_written(
    name: str, capsys: pytest.CaptureFixture[str]
):
    misfit, words = MISFITS[name], [*TUNE, NEW, "name=other"]
    if misfit.init is not None:
        misfit.init(Path("start"))
        words.append("init=start")
    if misfit.serving is not None:
        misfit.serving(Path("serving"))
        Registry(Path("registry")).adopt(Path("serving"))
    before = files_below(Path.cwd())
    for more in ([], ["--dry-run"]):
        assert main([*words, *more]) == 2
        assert re.search(misfit.message, capsys.readouterr().err)
    assert files_below(Path.cwd()) == before


@pytest.mark.usefixtures("_in_world")
def test_a_serving_drafter_whose_files_were_changed_is_not_tuned(
    capsys: pytest.CaptureFixture[str],
):
    registry = Registry(Path("registry"))
    folder = registry.drafter_folder(registry.adopt(Path("served")))
    save_checkpoint(served_drafter(rms_norm_eps=1e-5), folder)
    assert main([*TUNE, NEW]) == 2
    message = rf"{folder} does not match the hash .* Restore"
    assert re.search(message, capsys.readouterr().err)
