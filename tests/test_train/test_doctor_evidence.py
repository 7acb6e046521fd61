"""Doctor with everything beside the checkpoint: target, recipe, stored answers and their report."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_inference.report_file import read_schema
from dflash_train.config import RecipeConfig, TargetConfig
from dflash_train.drafter.checkpoint import load_checkpoint
from dflash_train.drafter.metadata import METADATA_NAME
from dflash_train.features.store import WITHOUT_FEATURES, FeatureStore
from dflash_train.features.target import Target, load_target
from dflash_train.records.chat_template import render_prompt
from dflash_train.records.conversation import Turn
from dflash_train.records.manifest import Manifest, file_hash
from dflash_train.release.doctor import CHECKS, examine
from dflash_train.release.evidence import Decoded
from dflash_train.release.finding import Finding, Status
from dflash_train.stages.examination import Scope, decode_prompts
from dflash_train.stages.walk import run_stage
from dflash_train.stages.workshop import Workshop
from dflash_train.testing import MASK_TOKEN_ID, save_tiny_target
from dflash_train.training.replay import replay_many, replay_rows
from tests.test_train.token_splits import write_tokens

STEPS = 400
Content = dict[str, Any]
Plant = Callable[[Path], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A finished run: its best drafter was trained on the very answers that are its test split."""

    config: RecipeConfig
    target: Target

    @property
    def best(self) -> Path:
        return self.config.run_dir / "checkpoint" / "best"

    def examine(self, folder: Path, **changes: Any) -> dict[str, Finding]:
        given = {
            "target": self.target,
            "recipe": self.config,
            "run_dir": self.config.run_dir,
            "decode": decode_prompts,
        }
        findings = examine(folder, **(given | changes))
        return {finding.check: finding for finding in findings}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, answer_rows, write_split, tiny_recipe) -> Case:
    """Train until most drafts are accepted, with a report of that."""
    root = tmp_path_factory.mktemp("doctor")
    settings = TargetConfig(name_or_path=str(save_tiny_target(root / "target")))
    target = load_target(settings, [1, 3])
    often = {"max_steps": STEPS, "validate_every": STEPS, "save_every": STEPS}
    config = tiny_recipe(root, name="trained", lr=1e-2, num_anchors=16, **often)
    config = replace(config, target=settings)
    rows = [
        row
        for row in answer_rows(target, [5, 9, 7, 12, 6, 8, 11, 4], max_new_tokens=24)
        if MASK_TOKEN_ID not in row.input_ids
    ]
    features = config.run_dir / "features"
    for split in ("train", "validation", "test"):
        write_split(features / split, rows)
    Manifest(stage="collect", recipe_hash="sha256:0", target=target.describe()).write(features)
    run_stage(Workshop(config), "train")
    write_report(config, target)
    return Case(config=config, target=target)


def write_report(config: RecipeConfig, target: Target) -> None:
    """Write what the doctor reads of a report, with true figures."""
    best = config.run_dir / "checkpoint" / "best"
    store = FeatureStore.open(config.run_dir / "features" / "test")
    rows, drafter = [store[place] for place in range(len(store))], load_checkpoint(best)
    pooled = replay_many(drafter, target.head, rows).pooled
    lengths = [trace.acceptance_lengths for trace in replay_rows(drafter, target.head, rows)]
    content = {
        "acceptance_length": {"pooled": pooled, "interval": [pooled - 0.1, pooled + 0.1]},
        "checkpoint": {"inputs": {"checkpoint": file_hash(best / "model.safetensors")}},
        "positions": {"joint": [0.9, 0.8, 0.7]},
        "requests": {
            "test": {
                "id": [row.id for row in rows],
                "tokens": [sum(each) for each in lengths],
                "steps": [len(each) for each in lengths],
            }
        },
    }
    (config.run_dir / "report").mkdir()
    (config.run_dir / "report" / "report.json").write_bytes(orjson.dumps(content))


@pytest.fixture
def copy(case: Case, tmp_path: Path) -> Path:
    """A copy of the sound checkpoint, to be harmed."""
    return Path(shutil.copytree(case.best, tmp_path / "copy"))


def top(**values: Any) -> Plant:
    """Plant values at the top of `config.json`."""
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update(values))


def nested(**values: Any) -> Plant:
    """Plant values in `dflash_config`."""
    return lambda folder: edit_json(
        folder / "config.json", lambda c: c["dflash_config"].update(values)
    )


def known(**values: Any) -> Plant:
    """Plant values in our own metadata; a dict goes into the one that is there."""

    def change(content: Content) -> None:
        for key, value in values.items():
            content[key] = content[key] | value if isinstance(value, dict) else value

    return lambda folder: edit_json(folder / METADATA_NAME, change)


def weight(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Plant:
    """Plant another tensor in the weights, or none."""

    def plant(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        changed = change(tensors.pop(name, torch.zeros(())))
        save_file(
            tensors if changed is None else tensors | {name: changed}, folder / "model.safetensors"
        )

    return plant


def edit_json(path: Path, change: Callable[[Content], object]) -> None:
    content = orjson.loads(path.read_bytes())
    change(content)
    path.write_bytes(orjson.dumps(content))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_theta(theta: float) -> Plant:
    rope = {"rope_type": "default", "rope_theta": theta}
    return top(rope_theta=theta, rope_parameters=rope)


def other_size(size: int) -> Plant:
    return lambda folder: (top(block_size=size)(folder), nested(block_size=size)(folder))


KEYS = "layers.0.self_attn.k_proj.weight"
SLIDES: Content = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8}
FAULTS: list[tuple[str, str, Plant, str]] = [
    ("tap ids one higher", "golden", nested(target_layer_ids=[2, 4]), "order of taps"),
    ("tap ids swapped", "golden", nested(target_layer_ids=[3, 1]), "order of taps"),
    ("tap on the last layer", "taps", nested(target_layer_ids=[1, 5]), "must lie in 0..4"),
    ("RoPE theta changed", "golden", other_theta(5e5), "RoPE"),
    ("RoPE theta changed in one spelling", "rope", top(rope_theta=5e5), "must be equal"),
    ("mask id outside the vocabulary", "mask token", nested(mask_token_id=260), "0..259"),
    ("mask id that the target stops with", "mask token", nested(mask_token_id=2), "an end token"),
    ("missing tensor", "tensors", weight("norm.weight", lambda t: None), "norm.weight"),
    ("extra tensor", "tensors", weight("mask_hidden", lambda t: torch.ones(32)), "mask_hidden"),
    ("wrong dtype of one tensor", "tensors", weight("fc.weight", lambda t: t.half()), "float16"),
    ("other dtype throughout", "tensors", weight("fc.weight", lambda t: t.double()), "float64"),
    ("transposed tensor", "tensors", weight(KEYS, lambda t: t.T.contiguous()), "k_proj"),
    ("causal flag flipped", "golden", top(is_causal=True), "causality"),
    ("causal flag in another place", "attention", nested(causal=True), "dflash_config.causal"),
    ("window without its switch", "attention", top(**SLIDES), "use_sliding_window"),
    ("window that training had not", "golden", top(**SLIDES, use_sliding_window=True), "window"),
    ("block size contradictory", "format", top(block_size=8), "block_size (=8)"),
    ("block size of another drafter", "golden", other_size(8), "comes out"),
    ("target of another depth", "taps", top(num_target_layers=8), "the target's 6"),
    ("target of another vocabulary", "shapes", top(vocab_size=300), "the target's 260"),
    ("tokenizer hash changed", "origin", known(target={"tokenizer": "sha256:0"}), "vocabulary"),
    ("position limit too small", "positions", top(max_position_embeddings=512), "(=512)"),
    ("drafter trained for thinking mode", "thinking", known(thinking=True), "with thinking"),
    ("scaled logits", "golden", nested(output_multiplier=2.0), "scales"),
    ("NaN weight", "tensors", weight("fc.weight", lambda t: t / 0), "NaN"),
    ("weights of another drafter", "golden", weight("fc.weight", lambda t: t.flip(0)), "comes out"),
    ("truncated file", "files", truncate, "cannot be read"),
    ("remote code", "format", top(auto_map={"AutoModel": "x.Y"}), "auto_map"),
    ("metadata of another program", "golden", known(format="other"), "damaged or foreign"),
]  # fmt: skip


def test_a_sound_checkpoint_passes_every_check_with_all_evidence(case: Case):
    findings = case.examine(case.best)
    assert list(findings) == [check.name for check in CHECKS]
    assert {finding.status for finding in findings.values()} == {Status.ok}, findings
    assert "72 of 72 greedy tokens" in findings["decoding"].sentence
    assert "the report allows" in findings["acceptance"].sentence


@pytest.mark.parametrize(
    ("check", "plant", "words"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_a_planted_fault_is_found_by_the_check_that_should_find_it(
    case: Case, copy: Path, check: str, plant: Plant, words: str
):
    plant(copy)
    config = case.config
    if check == "thinking":
        serving = replace(config.data.serving_sampling, enable_thinking=False)
        config = replace(config, data=replace(config.data, serving_sampling=serving))
    found = case.examine(copy, recipe=config, run_dir=None, decode=None)[check]
    assert found.status is Status.failed
    assert words in found.sentence
    assert str(found).endswith((".", "again."))


def test_at_least_eighteen_kinds_of_faults_are_planted():
    assert len({name for name, *_ in FAULTS}) == len(FAULTS) >= 18


@pytest.mark.parametrize(
    ("check", "plant", "words"),
    [
        ("conventions", nested(target_layer_ids=[2, 4]), "Write them one lower: [1, 3]."),
        ("conventions", nested(target_layer_ids=[0, 2]), "Write them one higher: [1, 3]."),
        ("acceptance", other_theta(3.0), "draft otherwise than when they were measured"),
        ("acceptance", top(is_causal=True), "draft otherwise than when they were measured"),
    ],
)
def test_stored_answers_show_what_no_file_of_a_foreign_drafter_tells(
    case: Case, copy: Path, check: str, plant: Plant, words: str
):
    (copy / METADATA_NAME).unlink()
    plant(copy)
    findings = case.examine(copy, recipe=None)
    failed = [name for name, found in findings.items() if found.status is Status.failed]
    assert failed == [check]
    assert words in str(findings[check])


def test_another_free_mask_id_is_found_by_the_golden_forward_and_by_replay(case: Case, copy: Path):
    store = FeatureStore.open(case.config.run_dir / "features" / "test")
    seen = {int(i) for place in range(len(store)) for i in store[place].input_ids}
    rendered = set(render_prompt(case.target.tokenizer, [Turn(role="user", content="Hello")]))
    nested(mask_token_id=min(set(range(4, 260)) - seen - rendered))(copy)
    findings = case.examine(copy, recipe=None)
    assert findings["golden"].status is Status.failed
    assert findings["acceptance"].status is Status.failed


def test_a_report_of_other_weights_is_a_doubt_and_no_failure(case: Case, copy: Path):
    weight("fc.weight", lambda tensor: tensor.flip(0))(copy)
    (copy / METADATA_NAME).unlink()
    found = case.examine(copy, recipe=None)
    assert found["conventions"].status is Status.warning
    assert found["acceptance"].status is Status.warning
    assert "of other weights than these" in found["acceptance"].sentence


def test_features_of_another_target_are_no_evidence(case: Case, tmp_path: Path):
    other = load_target(
        TargetConfig(name_or_path=str(save_tiny_target(tmp_path / "o", seed=1))), []
    )
    found = case.examine(case.best, target=other, recipe=None)
    assert found["origin"].status is Status.warning
    assert found["acceptance"].status is Status.skipped
    assert "was made with another target: name" in found["acceptance"].sentence


@pytest.mark.parametrize("knows_recipe", [True, False])
def test_a_run_without_features_has_its_answers_read_again(
    case: Case, tmp_path: Path, knows_recipe: bool
):
    stored = case.config.run_dir
    shutil.copytree(stored / "report", tmp_path / "report")
    rows = FeatureStore.open(stored / "features" / "test")
    write_tokens(tmp_path / "features" / "test", rows.read(range(len(rows))))
    manifest = Manifest.read(stored / "features")
    assert manifest is not None
    manifest.details |= WITHOUT_FEATURES
    manifest.write(tmp_path / "features")
    recipe = case.config if knows_recipe else None
    want = case.examine(case.best, recipe=recipe)
    assert want["acceptance"].status is Status.ok
    assert case.examine(case.best, recipe=recipe, run_dir=tmp_path) == want


def test_a_drafter_that_the_recipe_does_not_describe_is_named(case: Case):
    recipe = replace(case.config, drafter=replace(case.config.drafter, block_size=8))
    found = case.examine(case.best, recipe=recipe)
    assert found["recipe"].status is Status.failed
    assert "block_size is 4, in the recipe 8" in found["recipe"].sentence


@pytest.mark.parametrize(("is_near_tie", "status"), [(True, Status.ok), (False, Status.failed)])
def test_only_a_near_tie_may_part_decoding_from_the_target(
    case: Case, is_near_tie: bool, status: Status
):
    def parting(*_: object) -> list[Decoded]:
        return [Decoded(num_tokens=24, num_equal=20, num_steps=9, is_near_tie=is_near_tie)]

    found = case.examine(case.best, decode=parting)["decoding"]
    assert found.status is status
    assert "20 of 24" in found.sentence


def test_the_report_has_what_the_doctor_reads():
    properties = read_schema()["properties"]
    assert set(read_schema()["required"]) >= {
        "acceptance_length", "checkpoint", "positions", "requests",
    }  # fmt: skip
    assert {"id", "tokens", "steps"} <= set(
        properties["requests"]["additionalProperties"]["required"]
    )


@pytest.mark.parametrize(
    ("overrides", "scope"),
    [
        (["checkpoint=DIR"], (False, False, False)),
        (["checkpoint=DIR", "target.name_or_path=NAME"], (True, False, False)),
        (["checkpoint=DIR", "target=qwen3"], (True, False, False)),
        (["checkpoint=DIR", "target=qwen3", "name=mine"], (True, False, True)),
        (["checkpoint=DIR", "recipe=qwen3"], (True, True, True)),
        (["recipe=qwen3"], (True, True, True)),
        ([], (True, True, True)),
    ],
)
def test_the_command_says_what_the_checkpoint_is_held_against(
    overrides: list[str], scope: tuple[bool, bool, bool]
):
    target, recipe, run = scope
    assert Scope.of(overrides) == Scope(target=target, recipe=recipe, run=run)
