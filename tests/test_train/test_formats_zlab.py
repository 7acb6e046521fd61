from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_train.drafter.checkpoint import load_checkpoint, save_checkpoint
from dflash_train.drafter.metadata import METADATA_NAME, CheckpointMetadata
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target
from dflash_train.release.formats import Format, conversion, detect, read_drafter, write_drafter
from dflash_train.release.formats.audit import audit, tensor_differences
from dflash_train.testing import VARIANTS, tiny_drafter

HELD = sorted(VARIANTS.keys() - {"dspark_gated", "reduced", "reduced_dspark"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", HELD)
def test_a_drafter_goes_out_and_comes_back_bit_by_bit(
    variant: str, dtype: torch.dtype, target32: Target, tmp_path: Path
):
    drafter = tiny_drafter(target32, dtype=dtype, **VARIANTS[variant])
    written = write_drafter(drafter, tmp_path / "out", format=Format.zlab)
    assert written.num_tensors == len(drafter.state_dict())
    found = read_drafter(tmp_path / "out")
    assert (found.format, found.notes) == (Format.zlab, [])
    assert found.drafter.config == drafter.config
    assert tensor_differences(found.drafter.state_dict(), drafter.state_dict()) == []


def test_tensors_of_mixed_precision_keep_theirs(target32: Target, tmp_path: Path):
    drafter = tiny_drafter(target32, dtype=torch.bfloat16)
    drafter.norm.float()
    write_drafter(drafter, tmp_path / "out", format=Format.zlab)
    found = read_drafter(tmp_path / "out").drafter
    assert (found.norm.weight.dtype, found.fc.weight.dtype) == (torch.float32, torch.bfloat16)
    assert read_drafter(tmp_path / "out", dtype=torch.float32).drafter.fc.weight.dtype == (
        torch.float32
    )


@pytest.mark.parametrize(
    ("variant", "reason"),
    [("dspark_gated", "markov_gated"), ("reduced", r"draft_vocab_size \(=100\)")],
)
def test_what_no_server_would_read_is_refused_by_name(
    variant: str, reason: str, target32: Target, tmp_path: Path
):
    with pytest.raises(ValueError, match=reason):
        write_drafter(
            tiny_drafter(target32, **VARIANTS[variant]), tmp_path / "out", format=Format.zlab
        )
    assert not (tmp_path / "out").exists()


def test_readers_that_ignore_a_factor_are_named(target32: Target, tmp_path: Path):
    drafter = tiny_drafter(target32, **VARIANTS["scaled"])
    written = write_drafter(drafter, tmp_path / "out", format=Format.zlab)
    assert any("input_embedding_scale" in each for each in written.remarks)


def test_metadata_goes_along(target32: Target, tmp_path: Path):
    known = CheckpointMetadata(target={"name": "tiny"}, thinking=False)
    write_drafter(tiny_drafter(target32), tmp_path / "out", format=Format.zlab, metadata=known)
    found = read_drafter(tmp_path / "out").metadata
    assert found is not None
    assert (found.target, found.thinking) == ({"name": "tiny"}, False)


def _edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = orjson.loads((folder / "config.json").read_bytes())
    change(content)
    (folder / "config.json").write_bytes(orjson.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["rope_parameters"].update(rope_theta=500_000.0),
        lambda c: c.update(is_causal=True),
        lambda c: c["dflash_config"].update(target_layer_ids=[3, 1]),
        lambda c: c["dflash_config"].update(mask_token_id=5),
    ],
)
def test_a_config_that_was_changed_fails_its_golden_forward(
    change: Callable[[dict[str, Any]], None], target32: Target, tmp_path: Path
):
    save_checkpoint(tiny_drafter(target32), tmp_path / "best")
    _edit_config(tmp_path / "best", change)
    load_checkpoint(tmp_path / "best")  # every shape is as it was
    with pytest.raises(ValueError, match="golden forward"):
        read_drafter(tmp_path / "best")


def test_codebooks_under_the_names_of_a_module_are_read(target32: Target, tmp_path: Path):
    drafter = tiny_drafter(target32, **VARIANTS["dflash2"])
    save_checkpoint(drafter, tmp_path / "best")
    path = tmp_path / "best" / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {name.replace("_codebook", "_codebook.weight"): t for name, t in tensors.items()}, path
    )
    found = read_drafter(tmp_path / "best")
    assert tensor_differences(found.drafter.state_dict(), drafter.state_dict()) == []
    assert "codebooks renamed" in found.notes[0]


def test_an_export_that_reads_back_differently_is_no_success(
    target32: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written_right = conversion.write_folder

    def write_wrong(folder: Path, **parts: Any) -> None:
        written_right(folder, **parts)
        (folder / METADATA_NAME).unlink()  # nothing but the audit is to notice
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["norm.weight"][3] += 1e-7
        save_file(tensors, path)

    monkeypatch.setattr(conversion, "write_folder", write_wrong)
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        write_drafter(tiny_drafter(target32), tmp_path / "out", format=Format.zlab)


def test_the_audit_sees_fields_and_number_formats(target32: Target, tmp_path: Path):
    drafter = tiny_drafter(target32)
    save_checkpoint(drafter, tmp_path / "best")
    other = tiny_drafter(target32, is_causal=True)
    other.load_state_dict(drafter.state_dict())
    with pytest.raises(RuntimeError, match="is_causal"):
        audit(other, drafter, tmp_path / "best", stored=drafter.state_dict())
    low = tiny_drafter(target32).to(torch.bfloat16)
    assert "fc.weight" in tensor_differences(low.state_dict(), drafter.state_dict())


def test_a_training_state_is_refused_with_the_way_out(tmp_path: Path):
    torch.save({"draft_state_dict": {}}, tmp_path / "training_state.pt")
    assert detect(tmp_path) is Format.specforge_state
    with pytest.raises(ValueError, match=r"pickle.*specforge\.export\.to_hf"):
        read_drafter(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("pytorch_model.bin", r"pytorch_model\.bin but no model\.safetensors"),
     ("mask_embedding.pt", r"mask_embedding\.pt")],
)  # fmt: skip
def test_other_pickles_are_refused_and_never_opened(
    name: str, message: str, target32: Target, tmp_path: Path
):
    save_checkpoint(tiny_drafter(target32), tmp_path / "best")
    if name == "pytorch_model.bin":
        (tmp_path / "best" / "model.safetensors").unlink()
    (tmp_path / "best" / name).write_bytes(b"not even a pickle")
    with pytest.raises(ValueError, match=message):
        read_drafter(tmp_path / "best")


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"{", "no JSON"), (b"[]", "JSON object"), (b'{"architectures": ["Llama"]}', "no DFlash")],
)
def test_a_folder_of_something_else_is_refused(text: bytes, message: str, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        detect(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        detect(tmp_path)


@pytest.mark.parametrize("format", [Format.specforge_export, Format.specforge_state])
def test_dialects_that_are_only_read_are_not_written(
    format: Format, target32: Target, tmp_path: Path
):
    with pytest.raises(ValueError, match="must be one of zlab, speculators"):
        write_drafter(tiny_drafter(target32), tmp_path / "out", format=format)


def test_a_drafter_that_was_read_drafts_like_the_one_that_was_saved(
    target32: Target, tmp_path: Path
):
    drafter: Drafter = tiny_drafter(target32, **VARIANTS["dspark"])
    write_drafter(drafter, tmp_path / "out", format=Format.zlab)
    found = read_drafter(tmp_path / "out").drafter
    hidden, anchor = torch.randn(4, drafter.config.hidden_size), torch.tensor([7])
    assert torch.equal(
        found.draft(hidden, anchor, target32.head), drafter.draft(hidden, anchor, target32.head)
    )
