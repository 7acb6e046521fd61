"""Folders as `specforge export` and z-lab's first releases write them: keys are left out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from dflash_train.drafter.checkpoint import save_checkpoint
from dflash_train.drafter.metadata import METADATA_NAME
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target
from dflash_train.release.formats import Format, read_drafter
from dflash_train.release.formats.audit import tensor_differences
from dflash_train.testing import VARIANTS, tiny_drafter

Change = Callable[[dict[str, Any]], Any]


def _release(drafter: Drafter, folder: Path, *changes: Change) -> Path:
    """Write a drafter as SpecForge's export does."""
    save_checkpoint(drafter, folder)
    (folder / METADATA_NAME).unlink()
    content = orjson.loads((folder / "config.json").read_bytes())
    nested = content["dflash_config"]
    for name in ("block_size", "input_embedding_scale", "output_multiplier",
                 "final_logit_softcapping"):  # fmt: skip
        del nested[name]
    content["auto_map"] = {"AutoModel": "dflash.DFlashDraftModel"}
    content["transformers_version"] = "5.19.0"
    for change in changes:
        change(content)
    (folder / "config.json").write_bytes(orjson.dumps(content))
    return folder


@pytest.mark.parametrize("variant", ["plain", "sliding_causal", "mixed", "biased", "causal"])
def test_what_is_left_out_is_filled_by_the_writers_rule(
    variant: str, target32: Target, tmp_path: Path
):
    drafter = tiny_drafter(target32, **VARIANTS[variant])
    found = read_drafter(_release(drafter, tmp_path / "hf"))
    assert found.format is Format.specforge_export
    assert found.metadata is None
    assert found.drafter.config == drafter.config
    assert tensor_differences(found.drafter.state_dict(), drafter.state_dict()) == []
    assert any("auto_map" in note for note in found.notes)


def test_an_old_rope_is_read(target32: Target, tmp_path: Path):
    def age(content: dict[str, Any]) -> None:
        del content["rope_parameters"]
        content["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}

    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    found = read_drafter(_release(tiny_drafter(target32), tmp_path / "hf", age)).drafter
    assert found.config.rope_parameters == rope


def test_the_taps_of_a_file_without_ids_are_z_labs(target32: Target, tmp_path: Path):
    drafter = tiny_drafter(target32)
    folder = _release(
        drafter, tmp_path / "hf", lambda c: c["dflash_config"].pop("target_layer_ids")
    )
    found = read_drafter(folder)
    assert found.drafter.config.target_layer_ids == [1, 3]
    assert any("z-lab's rule gives [1, 3]" in note for note in found.notes)


def _as_specforge_writes(content: dict[str, Any]) -> None:
    names = ("markov_rank", "markov_head_type", "enable_confidence_head",
             "confidence_head_with_markov")  # fmt: skip
    content["architectures"] = ["DSparkDraftModel"]
    content["dflash_config"] |= {name: content.pop(name) for name in names}
    content["dflash_config"] |= {"projector_type": "dspark", "attention_mode": "gqa"}
    del content["sample_from_anchor"]


@pytest.mark.parametrize("variant", ["dspark", "dspark_gated"])
def test_dspark_is_read_from_where_specforge_puts_it(
    variant: str, target32: Target, tmp_path: Path
):
    drafter = tiny_drafter(target32, **VARIANTS[variant])
    found = read_drafter(_release(drafter, tmp_path / "hf", _as_specforge_writes))
    assert found.drafter.config == drafter.config
    assert tensor_differences(found.drafter.state_dict(), drafter.state_dict()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(architectures=["DominoDraftModel"]), "DominoDraftModel"),
        (lambda c: c["dflash_config"].update(projector_type="domino"), r"projector_type \(=domino"),
        (lambda c: c.pop("block_size"), "block_size is missing"),
        (lambda c: c["dflash_config"].update(block_size=9), r"dflash_config\.block_size \(=9\)"),
        (lambda c: c.pop("num_target_layers"), "num_target_layers"),
        (lambda c: c["dflash_config"].pop("mask_token_id"), "mask_token_id"),
        (lambda c: (c.pop("rope_parameters"), c.pop("rope_theta")), "rope_theta is missing"),
        (lambda c: c["rope_parameters"].update(partial_rotary_factor=0.5), "rotary_factor 0.5"),
        (lambda c: c["rope_parameters"].update(mrope_section=[2, 1, 1]), "mrope_section"),
        (lambda c: c.update(hidden_act="gelu"), r"hidden_act \(=gelu\)"),
        (
            lambda c: c.update(layer_types=["sliding_attention"] * 2, sliding_window=4),
            "sliding_window",
        ),
    ],
)
def test_what_readers_fill_differently_is_refused(
    change: Change, message: str, target32: Target, tmp_path: Path
):
    folder = _release(tiny_drafter(target32), tmp_path / "hf", change)
    with pytest.raises(ValueError, match=message):
        read_drafter(folder)
