import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dflash_train.cli import main
from dflash_train.drafter.checkpoint import save_checkpoint, write_folder
from dflash_train.drafter.config import SLIDING, DrafterConfig
from dflash_train.drafter.metadata import METADATA_NAME
from dflash_train.drafter.model import ContextCache, Drafter
from dflash_train.features.target import Target
from dflash_train.release.doctor import CHECKS, examine
from dflash_train.release.equivalence import measure_equivalence
from dflash_train.release.finding import Finding, Status
from dflash_train.release.formats import Format, write_drafter
from dflash_train.testing import save_tiny_target, tiny_drafter

Content = dict[str, Any]
Tensors = dict[str, Tensor]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"attention_bias": True, "output_multiplier": 0.5, "final_logit_softcapping": 30.0},
    "sliding": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
    "narrow window": {
        "layer_types": ["sliding_attention"] * 2, "sliding_window": 3, "is_causal": False,
    },
    "dflash2": {
        "conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 4, "selector_top_k": 5,
    },
    "dspark": {"markov_rank": 4, "markov_gated": True, "has_confidence_head": True},
    "reduced vocabulary": {"draft_vocab_size": 100},
}  # fmt: skip


def random_drafter(config: DrafterConfig) -> Drafter:
    """Build a drafter none of whose weights is still at its initialisation."""
    torch.manual_seed(0)
    drafter = Drafter(config).eval()
    with torch.no_grad():
        for weight in drafter.parameters():
            weight += torch.randn_like(weight) * 0.1
    if config.draft_vocab_size is not None:
        drafter.set_draft_vocabulary(torch.arange(config.draft_vocab_size) * 2 + 3)
    return drafter


@pytest.fixture
def checkpoint(target32: Target, tmp_path: Path) -> Path:
    """A checkpoint without a fault."""
    folder = tmp_path / "best"
    save_checkpoint(random_drafter(tiny_drafter(target32).config), folder)
    return folder


def edit_config(folder: Path, change: Callable[[Content], object]) -> None:
    path = folder / "config.json"
    content = orjson.loads(path.read_bytes())
    change(content)
    path.write_bytes(orjson.dumps(content))


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def by_status(findings: list[Finding], status: Status) -> list[Finding]:
    return [finding for finding in findings if finding.status is status]


def the_one(findings: list[Finding], status: Status) -> Finding:
    """Give the only finding of a status; nothing but `status` and what it skips may differ."""
    (found,) = by_status(findings, status)
    rest = {finding.status for finding in findings} - {status}
    assert rest <= {Status.ok, Status.skipped}, [str(finding) for finding in findings]
    return found


def test_a_good_checkpoint_passes_every_check(checkpoint: Path, target32: Target):
    findings = examine(checkpoint, target32)
    assert [finding.check for finding in findings] == [check.name for check in CHECKS]
    by_check = {finding.check: finding.status for finding in findings}
    assert {name for name, status in by_check.items() if status is Status.skipped} == {
        "origin", "recipe", "thinking", "decoding", "conventions", "acceptance",
    }  # fmt: skip
    assert set(by_check.values()) == {Status.ok, Status.skipped}


def test_a_checkpoint_alone_is_checked_as_far_as_its_files_tell(checkpoint: Path, target32: Target):
    findings = examine(checkpoint)
    assert {finding.status for finding in findings} == {Status.ok, Status.skipped}
    skipped = {finding.check: finding.sentence for finding in by_status(findings, Status.skipped)}
    assert set(skipped) == {
        "origin", "recipe", "thinking", "equivalence", "decoding", "conventions", "acceptance",
    }  # fmt: skip
    assert all(": add " in sentence for sentence in skipped.values())
    found = {finding.check: finding.sentence for finding in examine(checkpoint, target32)}
    assert "target's" in found["rope"]
    assert "target's" not in "".join(finding.sentence for finding in by_status(findings, Status.ok))


CONFIG_FAULTS: list[tuple[str, Callable[[Content], object], str]] = [
    ("layout", lambda c: c.update(speculators_model_type="dflash"), "speculators"),
    ("format", lambda c: c.update(architectures=["LlamaForCausalLM"]), "architectures"),
    ("format", lambda c: c.pop("architectures"), "architectures"),
    ("format", lambda c: c.update(model_type="llama"), "model_type"),
    ("format", lambda c: c.update(auto_map={"AutoModel": "x"}), "auto_map"),
    ("format", lambda c: c.update(block_size=9), "block_size (=9)"),
    ("format", lambda c: c["dflash_config"].pop("block_size"), "dflash_config.block_size (=None)"),
    ("taps", lambda c: c.update(num_target_layers=7), "num_target_layers (=7)"),
    ("taps", lambda c: c["dflash_config"].update(target_layer_ids=[1, 5]), "0..4"),
    ("taps", lambda c: c["dflash_config"].update(target_layer_ids=[1, 1]), "distinct"),
    ("taps", lambda c: c["dflash_config"].update(target_layer_ids=[1]), "64 columns"),
    ("taps", lambda c: c["dflash_config"].pop("target_layer_ids"), "target_layer_ids (=None)"),
    ("mask token", lambda c: c["dflash_config"].update(mask_token_id=2), "an end token"),
    ("mask token", lambda c: c["dflash_config"].update(mask_token_id=1), "the start token"),
    ("mask token", lambda c: c["dflash_config"].update(mask_token_id=0), "the padding token"),
    ("mask token", lambda c: c["dflash_config"].update(mask_token_id=76), "rendered"),
    ("mask token", lambda c: c["dflash_config"].update(mask_token_id=260), "0..259"),
    ("mask token", lambda c: c["dflash_config"].update(mask_token_id="<mask>"), "must be int"),
    ("mask token", lambda c: c["dflash_config"].update(mask_token_id=True), "must be int"),
    ("shapes", lambda c: c.update(vocab_size=256), "vocab_size (=256)"),
    ("shapes", lambda c: c.pop("head_dim"), "head_dim"),
    ("shapes", lambda c: c.update(num_key_value_heads=3), "multiple"),
    ("rope", lambda c: c.update(rope_theta=1e6), "rope_theta (=1000000.0)"),
    ("rope", lambda c: c.update(rope_scaling={"rope_type": "linear", "factor": 2.0}), "scaling"),
    ("rope", lambda c: c.update(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ("rope", lambda c: c["rope_parameters"].update(mrope_section=[1, 1, 2]), "mrope_section"),
    ("rope", lambda c: c.pop("rope_parameters"), "rope_parameters (=None)"),
    ("attention", lambda c: c.update(layer_types=["full_attention"]), "layer_types"),
    ("attention", lambda c: c.update(layer_types=["chunked"] * 2), "layer_types"),
    ("attention", lambda c: c.update(sliding_window=16), "sliding_window (=16)"),
    ("attention", lambda c: c.update(layer_types=["sliding_attention"] * 2), "window (=None)"),
    (
        "attention",
        lambda c: c.update(layer_types=["sliding_attention"] * 2, sliding_window=16),
        "use_sliding_window (=false)",
    ),
    ("attention", lambda c: c["dflash_config"].update(causal=True), "dflash_config.causal"),
    ("scales", lambda c: c["dflash_config"].update(input_embedding_scale=0.0), "above 0"),
    ("scales", lambda c: c["dflash_config"].update(final_logit_softcapping=-1.0), "above 0"),
    ("scales", lambda c: c["dflash_config"].pop("output_multiplier"), "output_multiplier (=None)"),
    ("reading", lambda c: c.pop("rms_norm_eps"), "rms_norm_eps"),
    ("tensors", lambda c: c.update(intermediate_size=48), "gate_proj"),
]


@pytest.mark.parametrize(("check", "change", "words"), CONFIG_FAULTS)
def test_a_fault_in_the_config_fails_its_check_and_no_other(
    checkpoint: Path, target32: Target, check: str, change: Callable[[Content], object], words: str
):
    edit_config(checkpoint, change)
    found = the_one(examine(checkpoint, target32), Status.failed)
    assert found.check == check
    assert words in found.sentence


def fill(name: str, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].fill_(value)


TENSOR_FAULTS: list[tuple[str, Callable[[Tensors], object], str]] = [
    ("tensors", lambda t: t.pop("norm.weight"), "norm.weight"),
    ("tensors", lambda t: t.update({"mask_hidden": torch.ones(32)}), "mask_hidden"),
    ("tensors", lambda t: t.update({"lm_head.weight": torch.ones(260, 32)}), "lm_head.weight"),
    ("tensors", lambda t: t.update({"norm.weight": torch.ones(31)}), "norm.weight"),
    ("tensors", lambda t: t["fc.weight"][0].fill_(float("nan")), "fc.weight holds NaN"),
    ("tensors", fill("layers.1.self_attn.q_proj.weight", 0.0), "never trained"),
    ("tensors", fill("layers.0.self_attn.k_norm.weight", 1e6), "k_norm.weight has a mean size"),
    ("tensors", lambda t: t.update({"norm.weight": t["norm.weight"].bfloat16()}), "bfloat16"),
    ("taps", lambda t: t.update({"fc.weight": torch.ones(32, 96)}), "96 columns"),
]


@pytest.mark.parametrize(("check", "change", "words"), TENSOR_FAULTS)
def test_a_fault_in_the_weights_fails_its_check_and_no_other(
    checkpoint: Path, target32: Target, check: str, change: Callable[[Tensors], object], words: str
):
    edit_tensors(checkpoint, change)
    found = the_one(examine(checkpoint, target32), Status.failed)
    assert found.check == check
    assert words in found.sentence


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("model.safetensors", None),
        ("model.safetensors", b"none"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_failed_check(
    checkpoint: Path, target32: Target, name: str, content: bytes | None
):
    (checkpoint / name).unlink()
    if content is not None:
        (checkpoint / name).write_bytes(content)
    findings = examine(checkpoint, target32)
    found = the_one(findings, Status.failed)
    assert found.check == "files"
    assert name in found.sentence
    assert len(by_status(findings, Status.skipped)) == len(CHECKS) - 1


CONFIG_DOUBTS: list[tuple[str, Callable[[Content], object], str]] = [
    ("positions", lambda c: c.update(max_position_embeddings=128), "contexts of at most 128"),
    ("mask token", lambda c: c["dflash_config"].update(mask_token_id=200), "ordinary text"),
    (
        "rope",
        lambda c: (c.update(rope_theta=5e5), c["rope_parameters"].update(rope_theta=5e5)),
        "recipe that trained it",
    ),
    ("scales", lambda c: c["dflash_config"].update(input_embedding_scale=2.0), "by which the"),
    ("scales", lambda c: c["dflash_config"].update(output_multiplier=2.0), "not read by every"),
    ("scales", lambda c: c["dflash_config"].update(final_logit_softcapping=30.0), "vLLM"),
]


@pytest.mark.parametrize(("check", "change", "words"), CONFIG_DOUBTS)
def test_what_works_here_and_maybe_not_elsewhere_is_a_warning(
    checkpoint: Path, target32: Target, check: str, change: Callable[[Content], object], words: str
):
    (checkpoint / METADATA_NAME).unlink()  # as if another toolkit had written it
    edit_config(checkpoint, change)
    found = the_one(examine(checkpoint, target32), Status.warning)
    assert found.check == check
    assert words in str(found)


def test_a_shipped_mask_vector_must_be_the_row_of_the_mask_id(checkpoint: Path, target32: Target):
    row = target32.head.embedding_weight[3]
    path = checkpoint / "mask_embedding.pt"
    torch.save({"mask_token_id": 3, "embedding": row}, path)
    assert not by_status(examine(checkpoint, target32), Status.warning)
    torch.save(row + 1.0, path)
    assert the_one(examine(checkpoint, target32), Status.warning).check == "mask token"
    for wrong in ({"mask_token_id": 4, "embedding": row}, row[:-1], {"embedding": row}):
        torch.save(wrong, path)
        assert the_one(examine(checkpoint, target32), Status.failed).check == "mask token"
    path.write_bytes(b"no pickle")
    assert the_one(examine(checkpoint, target32), Status.failed).check == "mask token"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_served_as_it_was_trained(variant: str, target32: Target, tmp_path: Path):
    config = dataclasses.replace(tiny_drafter(target32).config, **VARIANTS[variant])
    save_checkpoint(random_drafter(config), tmp_path / "best")
    findings = {finding.check: finding for finding in examine(tmp_path / "best", target32)}
    assert not by_status(list(findings.values()), Status.failed)
    assert findings["equivalence"].status is Status.ok
    assert "float64" in findings["equivalence"].sentence


@pytest.mark.parametrize("variant", ["plain", "dflash2", "dspark", "all sliding"])
@pytest.mark.parametrize("has_target", [True, False])
def test_a_sound_drafter_in_the_speculators_layout_passes(
    variant: str, has_target: bool, target32: Target, tmp_path: Path
):
    shapes = VARIANTS | {"all sliding": {"layer_types": [SLIDING] * 2, "sliding_window": 6}}
    config = dataclasses.replace(tiny_drafter(target32).config, **shapes[variant])
    write_drafter(random_drafter(config), tmp_path / "given", format=Format.speculators)
    findings = examine(tmp_path / "given", target32 if has_target else None)
    assert not by_status(findings, Status.failed)
    found = {finding.check: finding for finding in findings}
    assert "speculators layout" in found["layout"].sentence
    assert found["golden"].status is Status.ok


def test_a_reduced_vocabulary_in_the_speculators_layout_needs_its_target(
    target32: Target, tmp_path: Path
):
    config = dataclasses.replace(tiny_drafter(target32).config, draft_vocab_size=100)
    write_drafter(
        random_drafter(config), tmp_path / "given", format=Format.speculators, head=target32.head
    )
    assert not by_status(examine(tmp_path / "given", target32), Status.failed)
    alone = {finding.check: finding for finding in examine(tmp_path / "given")}
    assert alone["layout"].status is Status.skipped
    assert "Set target.name_or_path to the target" in alone["layout"].sentence


def test_a_damaged_file_in_the_speculators_layout_is_one_failed_check(
    target32: Target, tmp_path: Path
):
    write_drafter(tiny_drafter(target32), tmp_path / "given", format=Format.speculators)
    edit_config(tmp_path / "given", lambda c: c.update(aux_hidden_state_layer_ids=[3, 5]))
    found = the_one(examine(tmp_path / "given", target32), Status.failed)
    assert found.check == "layout"
    assert "does not compute what it computed when it was saved" in found.sentence


def test_a_foreign_file_that_leaves_keys_out_is_completed_with_a_warning(
    checkpoint: Path, target32: Target
):
    def leave_out(content: Content) -> None:
        content["auto_map"] = {"AutoModel": "dflash.DFlashDraftModel"}
        for key in ("block_size", "input_embedding_scale", "output_multiplier"):
            del content["dflash_config"][key]

    (checkpoint / METADATA_NAME).unlink()
    edit_config(checkpoint, leave_out)
    found = the_one(examine(checkpoint, target32), Status.warning)
    assert found.check == "layout"
    assert "auto_map was dropped" in found.sentence
    assert "export format=zlab" in found.remedy


def test_a_pickled_training_state_is_refused(tmp_path: Path):
    (tmp_path / "training_state.pt").write_bytes(b"pickle")
    assert the_one(examine(tmp_path), Status.failed).check == "files"


def test_what_a_dialect_cannot_hold_is_said_and_no_fault(target32: Target, tmp_path: Path):
    config = dataclasses.replace(tiny_drafter(target32).config, **VARIANTS["scaled"])
    save_checkpoint(random_drafter(config), tmp_path / "best")
    found = {finding.check: finding for finding in examine(tmp_path / "best", target32)}
    assert found["round trip"].status is Status.ok
    assert "through zlab. format=speculators cannot hold" in found["round trip"].sentence


@pytest.mark.parametrize("noise", [1e-7, 1.0])
def test_a_conversion_that_changes_a_number_is_found(
    noise: float, checkpoint: Path, target32: Target, monkeypatch: pytest.MonkeyPatch
):
    def write_other(folder: Path, *, tensors: Tensors, **rest: Any) -> None:
        changed = tensors | {"norm.weight": tensors["norm.weight"] + noise}
        write_folder(folder, tensors=changed, **rest)

    monkeypatch.setattr("dflash_train.release.formats.conversion.write_folder", write_other)
    found = the_one(examine(checkpoint, target32), Status.failed)
    assert found.check == "round trip"


def test_a_reduced_vocabulary_must_be_ascending_ids_of_the_target(target32: Target, tmp_path: Path):
    config = dataclasses.replace(tiny_drafter(target32).config, draft_vocab_size=100)
    for number, offset in enumerate((-50, 1000)):
        folder = tmp_path / str(number)
        save_checkpoint(random_drafter(config), folder)
        edit_tensors(folder, lambda tensors, add=offset: tensors["d2t"][-1].add_(add))
        found = the_one(examine(folder, target32), Status.failed)
        assert found.check == "tensors"
        assert "draft" in found.sentence


def test_a_dspark_config_must_say_where_it_samples(target32: Target, tmp_path: Path):
    config = dataclasses.replace(tiny_drafter(target32).config, markov_rank=4)
    save_checkpoint(random_drafter(config), tmp_path / "best")
    edit_config(tmp_path / "best", lambda c: c.pop("sample_from_anchor"))
    assert the_one(examine(tmp_path / "best", target32), Status.failed).check == "format"


@pytest.mark.parametrize(
    ("variant", "unfaithful"),
    [("sliding", ["llama.cpp"]), ("narrow window", ["SGLang", "llama.cpp"])],
)
def test_engines_that_would_apply_another_mask_are_named(
    variant: str, unfaithful: list[str], target32: Target, tmp_path: Path
):
    config = dataclasses.replace(tiny_drafter(target32).config, **VARIANTS[variant])
    save_checkpoint(random_drafter(config), tmp_path / "best")
    found = the_one(examine(tmp_path / "best", target32), Status.warning)
    assert found.check == "attention"
    assert f"{', '.join(unfaithful)} would" in found.sentence
    assert not set(unfaithful) & set(found.remedy.rstrip(".").split(" with ")[1].split(", "))


def test_a_decode_step_that_parts_from_training_is_found(
    checkpoint: Path, target32: Target, monkeypatch: pytest.MonkeyPatch
):
    draft_step = Drafter.draft_step

    def one_row_late(
        drafter: Drafter, block_embeddings: Tensor, new_features: Tensor, cache: ContextCache
    ) -> Tensor:
        return draft_step(drafter, block_embeddings, new_features.roll(1, dims=0), cache)

    monkeypatch.setattr(Drafter, "draft_step", one_row_late)
    found = the_one(examine(checkpoint, target32), Status.failed)
    assert found.check == "equivalence"


def test_large_drafters_are_compared_in_float32(target32: Target, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dflash_train.release.equivalence.MOST_FLOAT64", 0)
    found = measure_equivalence(tiny_drafter(target32), target32)
    assert found.dtype is torch.float32
    assert found.holds
    assert found.anchors == [1, 48, 95]


def test_the_command_prints_one_line_per_check_and_says_by_its_exit_code(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    target = f"target.name_or_path={save_tiny_target(tmp_path / 'target')}"
    command = ["doctor", f"checkpoint={checkpoint}", target]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    words = [line.split()[0] for line in lines[:-1]]
    assert (words.count("ok"), words.count("skipped")) == (len(CHECKS) - 5, 5)
    assert lines[-1] == f"0 of {len(CHECKS)} checks failed, 5 skipped"
    edit_config(checkpoint, lambda c: c["dflash_config"].update(mask_token_id=2))
    assert main(command) == 1
    (failed,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed")]
    assert "Train with a token that the target never emits." in failed


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["checkpoint=nowhere"], "checkpoint (=nowhere) is not a folder"),
        (["target.name_or_path=./nowhere"], "target.name_or_path (=./nowhere)"),
    ],
)
def test_a_command_that_the_user_can_fix_is_no_finding(
    checkpoint: Path, tmp_path: Path, overrides: list[str], words: str,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    target = f"target.name_or_path={save_tiny_target(tmp_path / 'target')}"
    assert main(["doctor", f"checkpoint={checkpoint}", target, *overrides]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.out == ""
