from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_train.drafter.checkpoint import load_checkpoint, save_checkpoint, weights_hash
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target
from dflash_train.release.doctor import examine
from dflash_train.release.finding import Status
from dflash_train.testing import VARIANTS, tiny_drafter


@pytest.fixture
def drafter(target32: Target) -> Drafter:
    return tiny_drafter(target32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_comes_back_as_it_was(variant: str, target32: Target, tmp_path: Path):
    drafter = tiny_drafter(target32, **VARIANTS[variant])
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
        (lambda c: c["dflash_config"].update(causal=True), "causal"),
        (lambda c: c["dflash_config"].update(use_swa=True), "use_swa"),
        (
            lambda c: c.update(layer_types=["sliding_attention"] * 2, sliding_window=4),
            "use_sliding_window",
        ),
        (
            lambda c: c.update(layer_types=["sliding_attention"] * 2, use_sliding_window=True),
            r"sliding_window \(=None\)",
        ),
        (lambda c: c.update(architectures=["DFlash2DraftModel"]), "conv_kernel_size"),
        (lambda c: c.update(architectures=["Qwen3DSparkModel"]), "sample_from_anchor"),
        (
            lambda c: c.update(
                architectures=["Qwen3DSparkModel"], sample_from_anchor=True, markov_head_type="rnn"
            ),
            r"markov_head_type \(=rnn\)",
        ),
        (lambda c: c.update(draft_vocab_size=100), "d2t"),
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


PLAIN_TENSORS = 11 * 2 + 3


def test_the_files_of_dflash2_hold_what_its_readers_ask_for(target32: Target, tmp_path: Path):
    save_checkpoint(tiny_drafter(target32, **VARIANTS["dflash2"]), tmp_path)
    content = orjson.loads((tmp_path / "config.json").read_bytes())
    assert content["architectures"] == ["DFlash2DraftModel"]
    wanted = VARIANTS["dflash2"]
    assert {name: content["dflash_config"][name] for name in wanted} == wanted
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    assert len(shapes) == PLAIN_TENSORS + 2 * 4 + 3
    for layer in range(2):
        for part in ("attention_conv", "mlp_conv"):
            assert shapes[f"layers.{layer}.{part}.base_kernel"] == (2, 2, 32)
            assert shapes[f"layers.{layer}.{part}.kernel_projection.weight"] == (2 * 2 * 4, 32)
    assert shapes["candidate_selector.predecessor_codebook"] == (260, 6)
    assert shapes["candidate_selector.successor_codebook"] == (260, 6)
    assert shapes["candidate_selector.hidden_projection.weight"] == (6, 32)


def test_the_files_of_dspark_hold_what_its_readers_ask_for(target32: Target, tmp_path: Path):
    drafter = tiny_drafter(target32, draft_vocab_size=100, **VARIANTS["dspark"])
    save_checkpoint(drafter, tmp_path)
    content = orjson.loads((tmp_path / "config.json").read_bytes())
    assert content["architectures"] == ["Qwen3DSparkModel"]
    assert content["markov_rank"] == 6
    assert content["markov_head_type"] == "vanilla"
    assert content["enable_confidence_head"] is True
    assert content["confidence_head_with_markov"] is True
    assert content["sample_from_anchor"] is True
    assert content["draft_vocab_size"] == 100
    tensors = load_file(tmp_path / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert len(shapes) == PLAIN_TENSORS + 5
    assert shapes["markov_head.markov_w1.weight"] == (260, 6)
    assert shapes["markov_head.markov_w2.weight"] == (100, 6)
    assert shapes["confidence_head.proj.weight"] == (1, 32 + 6)
    assert shapes["confidence_head.proj.bias"] == (1,)
    assert tensors["d2t"].dtype == torch.int64
    assert (torch.arange(100) + tensors["d2t"]).tolist() == list(range(2, 202, 2))


def test_windows_and_causality_are_written_where_servers_read_them(
    target32: Target, tmp_path: Path
):
    save_checkpoint(tiny_drafter(target32, **VARIANTS["mixed"]), tmp_path / "mixed")
    content = orjson.loads((tmp_path / "mixed" / "config.json").read_bytes())
    assert content["layer_types"] == ["full_attention", "sliding_attention"]
    assert content["use_sliding_window"] is True
    assert content["sliding_window"] == 6
    assert "is_causal" not in content
    save_checkpoint(tiny_drafter(target32, **VARIANTS["causal"]), tmp_path / "causal")
    content = orjson.loads((tmp_path / "causal" / "config.json").read_bytes())
    assert content["is_causal"] is True
    assert content["use_sliding_window"] is False
    assert content["sliding_window"] is None
    save_checkpoint(tiny_drafter(target32), tmp_path / "plain")
    content = orjson.loads((tmp_path / "plain" / "config.json").read_bytes())
    assert not {"is_causal", "draft_vocab_size", "markov_rank"} & content.keys()


def test_a_draft_vocabulary_outside_the_targets_is_refused(target32: Target, tmp_path: Path):
    save_checkpoint(tiny_drafter(target32, **VARIANTS["reduced"]), tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    tensors["d2t"][-1] = 500
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="draft_vocab_size"):
        load_checkpoint(tmp_path)


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


def _split_in_two(folder: Path) -> Path:
    """Write the weights as others split large drafters: two parts and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2]}
    parts["model-00002-of-00002.safetensors"] = names[1::2]
    for part, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, folder / part)
    places = {name: part for part, chosen in parts.items() for name in chosen}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_bytes(orjson.dumps(index))
    return folder


def test_weights_in_several_files_are_one_drafter(drafter: Drafter, tmp_path: Path):
    save_checkpoint(drafter, tmp_path / "best")
    whole = weights_hash(tmp_path / "best")
    folder = _split_in_two(tmp_path / "best")
    loaded = load_checkpoint(folder).state_dict()
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, loaded[name]), name
    assert weights_hash(folder) != whole
    examined = {finding.check: finding for finding in examine(folder)}
    assert examined["tensors"].status is Status.ok


def test_a_part_that_is_missing_or_elsewhere_is_named(drafter: Drafter, tmp_path: Path):
    save_checkpoint(drafter, tmp_path / "best")
    folder = _split_in_two(tmp_path / "best")
    (folder / "model-00002-of-00002.safetensors").rename(tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match=r"names model-00002-of-00002\.safetensors, not there"):
        load_checkpoint(folder)
    index = folder / "model.safetensors.index.json"
    index.write_bytes(orjson.dumps({"weight_map": {"norm.weight": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match=r"names \.\./outside"):
        load_checkpoint(folder)
    index.write_bytes(b"[]")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_checkpoint(folder)
