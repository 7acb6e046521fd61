from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_train.drafter.metadata import METADATA_NAME
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target
from dflash_train.release.formats import (
    Format,
    carries_tables,
    read_drafter,
    write_drafter,
)
from dflash_train.release.formats.audit import plain_form, tensor_differences
from dflash_train.testing import VARIANTS, tiny_drafter

Change = Callable[[dict[str, Any]], Any]
REFUSED = {
    "mixed": r"layer_types.*one flag for all layers",
    "causal": r"is_causal \(=true\) in full layers",
    "scaled": r"input_embedding_scale \(=3.0\).*output_multiplier.*final_logit_softcapping",
}
HELD = sorted(VARIANTS.keys() - REFUSED.keys())
TARGET = {"name": "org/target", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 6}


def _export(drafter: Drafter, folder: Path, target: Target) -> dict[str, Any]:
    write_drafter(drafter, folder, format=Format.speculators, target=TARGET, head=target.head)
    return orjson.loads((folder / "config.json").read_bytes())


def _foreign(drafter: Drafter, folder: Path, target: Target, *changes: Change) -> Path:
    """Write a drafter as the package itself does: no file of ours, no number of target layers."""
    content = _export(drafter, folder, target)
    (folder / METADATA_NAME).unlink()
    del content["transformer_layer_config"]["num_target_layers"]
    for change in changes:
        change(content)
    (folder / "config.json").write_bytes(orjson.dumps(content))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", HELD)
def test_a_drafter_goes_out_and_comes_back_bit_by_bit(
    variant: str, dtype: torch.dtype, target32: Target, tmp_path: Path
):
    drafter = tiny_drafter(target32, dtype=dtype, **VARIANTS[variant])
    _export(drafter, tmp_path / "out", target32)
    found = read_drafter(tmp_path / "out", head=target32.head)
    assert found.format is Format.speculators
    assert plain_form(found.drafter.config) == plain_form(drafter.config)
    assert found.drafter.config.layer_visibility() == drafter.config.layer_visibility()
    assert tensor_differences(found.drafter.state_dict(), drafter.state_dict()) == []


@pytest.mark.parametrize("variant", REFUSED)
def test_what_the_layout_cannot_hold_is_refused_by_name(
    variant: str, target32: Target, tmp_path: Path
):
    with pytest.raises(ValueError, match=REFUSED[variant]):
        _export(tiny_drafter(target32, **VARIANTS[variant]), tmp_path / "out", target32)
    assert not (tmp_path / "out").exists()


def test_dspark_may_mix_kinds_of_layers_as_its_reader_goes_by_them(
    target32: Target, tmp_path: Path
):
    drafter = tiny_drafter(target32, **VARIANTS["mixed"], **VARIANTS["dspark"])
    _export(drafter, tmp_path / "out", target32)
    assert read_drafter(tmp_path / "out").drafter.config == drafter.config


def test_layer_ids_stand_one_higher(target32: Target, tmp_path: Path):
    content = _export(tiny_drafter(target32), tmp_path / "out", target32)
    assert target32.target_layer_ids == [1, 3]
    assert content["aux_hidden_state_layer_ids"] == [2, 4]


@pytest.mark.parametrize(
    ("variant", "kind", "non_causal", "drafts"),
    [
        ("plain", "dflash", True, 3),
        ("sliding_causal", "dflash", False, 3),
        ("sliding_bidirectional", "dflash", True, 3),
        ("dflash2", "dflash2", True, 3),
        ("dspark", "dspark", True, 4),
    ],
)
def test_the_keys_that_readers_default_differently_are_written(
    variant: str, kind: str, non_causal: bool, drafts: int, target32: Target, tmp_path: Path
):
    content = _export(tiny_drafter(target32, **VARIANTS[variant]), tmp_path / "out", target32)
    assert content["speculators_model_type"] == kind
    assert content["sliding_window_non_causal"] is non_causal
    assert content["sample_from_anchor"] is (kind == "dspark")
    assert content["draft_vocab_size"] == 260
    proposal = content["speculators_config"]["proposal_methods"][0]
    assert proposal["speculative_tokens"] == drafts
    assert content["speculators_config"]["verifier"] == {
        "name_or_path": "org/target",
        "architectures": ["LlamaForCausalLM"],
    }


def test_a_reduced_vocabulary_takes_the_targets_rows_along(target32: Target, tmp_path: Path):
    drafter = tiny_drafter(target32, **VARIANTS["reduced"])
    content = _export(drafter, tmp_path / "out", target32)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    ids = drafter.draft_token_ids
    assert ids is not None
    assert content["draft_vocab_size"] == 100
    assert torch.equal(tensors["lm_head.weight"], target32.head.lm_head_weight[ids])
    assert tensors["t2d"].nonzero().flatten().tolist() == ids.tolist()
    with pytest.raises(ValueError, match=r"target\.name_or_path"):
        write_drafter(drafter, tmp_path / "other", format=Format.speculators)


def test_a_file_of_the_package_says_what_it_knows_of_the_target(target32: Target, tmp_path: Path):
    drafter = tiny_drafter(target32)
    folder = _foreign(drafter, tmp_path / "theirs", target32)
    found = read_drafter(folder, target=TARGET)
    assert found.drafter.config == drafter.config
    assert found.metadata is not None
    assert found.metadata.target == {
        "name": "org/target",
        "architectures": ["LlamaForCausalLM"],
    }


def test_keys_that_equal_the_class_defaults_may_be_absent(target32: Target, tmp_path: Path):
    def shorten(content: dict[str, Any]) -> None:
        layers = content["transformer_layer_config"]
        for name in ("hidden_act", "attention_bias", "rms_norm_eps", "layer_types", "model_type",
                     "use_sliding_window", "sliding_window", "max_window_layers",
                     "attention_dropout", "tie_word_embeddings"):  # fmt: skip
            del layers[name]

    drafter = tiny_drafter(target32)
    folder = _foreign(drafter, tmp_path / "theirs", target32, shorten)
    assert read_drafter(folder, target=TARGET).drafter.config == drafter.config


def test_a_bidirectional_drafter_that_vllm_would_serve_causally_is_said(
    target32: Target, tmp_path: Path
):
    folder = _foreign(
        tiny_drafter(target32),
        tmp_path / "theirs",
        target32,
        lambda c: c.update(sliding_window_non_causal=False),
    )
    found = read_drafter(folder, target=TARGET)
    assert not any(each.is_causal for each in found.drafter.config.layer_visibility())
    assert "vLLM serves this file causally" in found.notes[0]


def _carry(folder: Path, **tables: torch.Tensor) -> Path:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {f"{name}.weight": table for name, table in tables.items()}, path)
    return folder


def test_copies_of_the_targets_tables_are_dropped(target32: Target, tmp_path: Path):
    drafter, head = tiny_drafter(target32), target32.head
    folder = _carry(
        _foreign(drafter, tmp_path / "theirs", target32),
        embed_tokens=head.embedding_weight.clone(),
        lm_head=head.lm_head_weight.clone(),
        verifier_norm=torch.ones(32),
    )
    assert carries_tables(folder)
    found = read_drafter(folder, target=TARGET, head=head)
    assert tensor_differences(found.drafter.state_dict(), drafter.state_dict()) == []
    assert "equal to the target's, dropped" in found.notes[0]
    with pytest.raises(ValueError, match=r"carries embed_tokens\.weight, lm_head\.weight"):
        read_drafter(folder, target=TARGET)


def test_tables_of_its_own_are_refused(target32: Target, tmp_path: Path):
    folder = _carry(
        _foreign(tiny_drafter(target32), tmp_path / "theirs", target32),
        lm_head=target32.head.lm_head_weight + 1e-3,
    )
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the target's"):
        read_drafter(folder, target=TARGET, head=target32.head)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("plain", lambda c: c.update(speculators_model_type="eagle3"), r"model_type \(=eagle3\)"),
        ("plain", lambda c: c.pop("aux_hidden_state_layer_ids"), "aux_hidden_state_layer_ids"),
        ("plain", lambda c: c.update(mask_token_id=None), "mask_token_id|garbles"),
        ("plain", lambda c: c.update(sample_from_anchor=True), r"sample_from_anchor \(=True\)"),
        ("plain", lambda c: c["transformer_layer_config"].update(model_type="llama"), "=llama"),
        ("plain", lambda c: c["transformer_layer_config"].update(is_causal=True), "contradicts"),
        ("plain", lambda c: c.update(aux_hidden_state_layer_ids=[2, 6]), "last layer is never"),
        ("sliding_causal", lambda c: c.pop("sliding_window_non_causal"), "vLLM true"),
        (
            "sliding_causal",
            lambda c: c["transformer_layer_config"].update(is_causal=False),
            "contradicts",
        ),
        ("dspark", lambda c: c.update(markov_head_type="rnn"), r"markov_head_type \(=rnn\)"),
        ("dspark", lambda c: c.update(sample_from_anchor=False), "sample_from_anchor"),
    ],
)
def test_what_would_be_misread_is_refused(
    variant: str, change: Change, message: str, target32: Target, tmp_path: Path
):
    drafter = tiny_drafter(target32, **VARIANTS[variant])
    folder = _foreign(drafter, tmp_path / "theirs", target32, change)
    with pytest.raises(ValueError, match=message):
        read_drafter(folder, target=TARGET)


def test_a_target_of_unknown_depth_is_asked_for(target32: Target, tmp_path: Path):
    folder = _foreign(tiny_drafter(target32), tmp_path / "theirs", target32)
    with pytest.raises(ValueError, match=r"how many layers the target has.*target\.name_or_path"):
        read_drafter(folder)


def test_a_shifted_layer_id_fails_the_golden_forward(target32: Target, tmp_path: Path):
    content = _export(tiny_drafter(target32), tmp_path / "out", target32)
    content["aux_hidden_state_layer_ids"] = [1, 3]
    (tmp_path / "out" / "config.json").write_bytes(orjson.dumps(content))
    with pytest.raises(ValueError, match="golden forward"):
        read_drafter(tmp_path / "out")
