from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_train.drafter.checkpoint import load_checkpoint, save_checkpoint
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target
from dflash_train.testing import tiny_drafter


@pytest.fixture
def drafter(target32: Target) -> Drafter:
    return tiny_drafter(target32)


def test_a_checkpoint_comes_back_as_it_was(drafter: Drafter, tmp_path: Path):
    save_checkpoint(drafter, tmp_path / "best")
    loaded = load_checkpoint(tmp_path / "best")
    assert loaded.config == drafter.config
    saved = drafter.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    assert not loaded.training


def test_the_same_drafter_gives_the_same_bytes(drafter: Drafter, tmp_path: Path):
    for name in ("one", "two"):
        save_checkpoint(drafter, tmp_path / name)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_saving_again_replaces_the_folder(drafter: Drafter, tmp_path: Path):
    save_checkpoint(drafter, tmp_path / "best")
    with torch.no_grad():
        drafter.fc.weight += 1.0
    save_checkpoint(drafter, tmp_path / "best")
    assert torch.equal(load_checkpoint(tmp_path / "best").fc.weight, drafter.fc.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_loading_in_low_precision_keeps_the_rotation_exact(drafter: Drafter, tmp_path: Path):
    save_checkpoint(drafter, tmp_path / "best")
    loaded = load_checkpoint(tmp_path / "best", dtype=torch.bfloat16)
    assert loaded.fc.weight.dtype == torch.bfloat16
    positions = torch.tensor([[0, 1, 511, 4000]])
    like = torch.zeros(1)
    for ours, exact in zip(
        loaded.rotary_emb(like, positions), drafter.rotary_emb(like, positions), strict=True
    ):
        assert torch.equal(ours, exact)


def _edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = orjson.loads((folder / "config.json").read_bytes())
    change(content)
    (folder / "config.json").write_bytes(orjson.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(architectures=["LlamaForCausalLM"]), "architectures"),
        (lambda c: c.update(block_size=9), r"block_size \(=9\)"),
        (lambda c: c.update(is_causal=True), "causal"),
        (lambda c: c.update(layer_types=["sliding_attention", "full_attention"]), "sliding"),
        (lambda c: c.pop("dflash_config"), "dflash_config"),
        (lambda c: c["dflash_config"].pop("target_layer_ids"), "target_layer_ids"),
        (lambda c: c["dflash_config"].update(mask_token_id=-1), "mask_token_id"),
        (lambda c: c.update(hidden_size=40), r"another shape.*fc\.weight"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(
    drafter: Drafter, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
):
    save_checkpoint(drafter, tmp_path / "best")
    _edit_config(tmp_path / "best", change)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "best")


def test_missing_unknown_and_damaged_tensors_are_named(drafter: Drafter, tmp_path: Path):
    save_checkpoint(drafter, tmp_path / "best")
    weights = tmp_path / "best" / "model.safetensors"
    tensors = load_file(weights)
    tensors["extra.weight"] = tensors.pop("norm.weight")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"extra\.weight, norm\.weight"):
        load_checkpoint(tmp_path / "best")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_checkpoint(tmp_path / "best")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_checkpoint(tmp_path / "nowhere")
