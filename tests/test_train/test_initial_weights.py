import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from dflash_train.config import DrafterSettings, RecipeConfig, TargetConfig
from dflash_train.drafter.checkpoint import load_checkpoint, read_config, save_checkpoint
from dflash_train.drafter.config import SLIDING
from dflash_train.drafter.metadata import METADATA_NAME
from dflash_train.features.target import Target
from dflash_train.records.manifest import Manifest
from dflash_train.release.formats import Format, write_drafter
from dflash_train.stages.walk import run_stage
from dflash_train.stages.workshop import Workshop
from dflash_train.testing import VARIANTS, save_tiny_target, tiny_drafter
from dflash_train.training.initial_weights import contradictions

Begin = Callable[..., RecipeConfig]


@pytest.fixture
def begin(tmp_path: Path, target32: Target, answer_rows, write_split, tiny_recipe) -> Begin:
    """Collect features once and give a function that makes recipes which train on them."""
    features = tmp_path / "features"
    write_split(features / "train", answer_rows(target32, [5, 9, 7, 12, 6, 8]))
    write_split(features / "validation", answer_rows(target32, [6, 10, 5], seed=1))
    Manifest(stage="collect", recipe_hash="sha256:0", target={"name": "tiny"}).write(features)
    target = TargetConfig(name_or_path=str(save_tiny_target(tmp_path / "target")))

    def recipe(name: str, *, drafter: dict[str, Any] | None = None, **settings: Any):
        config = tiny_recipe(tmp_path, name=name, max_steps=settings.pop("max_steps", 4))
        link = config.run_dir / "features"
        if not link.exists():
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(features)
        shape = replace(config.drafter, **(drafter or {}))
        return replace(config, target=target, drafter=shape, **settings)

    return recipe


def saved(target: Target, folder: Path, **settings: Any) -> str:
    save_checkpoint(tiny_drafter(target, **settings), folder)
    return str(folder)


def first_loss(config: RecipeConfig) -> float:
    line = (config.run_dir / "metrics.jsonl").read_bytes().splitlines()[0]
    return orjson.loads(line)["loss"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_starts_from_the_very_weights_of_init(
    begin: Begin, target32: Target, tmp_path: Path, variant: str
):
    init = saved(target32, tmp_path / "given", seed=5, **VARIANTS[variant])
    drafter = Workshop(begin("tuned", init=init, drafter=VARIANTS[variant])).new_drafter()
    want = load_checkpoint(tmp_path / "given").state_dict()
    assert drafter.state_dict().keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in drafter.state_dict().items())
    assert all(parameter.requires_grad for parameter in drafter.parameters())


def test_a_drafter_of_another_dialect_gives_the_same_start(
    begin: Begin, target32: Target, tmp_path: Path
):
    given = tiny_drafter(target32, seed=5)
    write_drafter(given, tmp_path / "given", format=Format.speculators)
    drafter = Workshop(begin("tuned", init=str(tmp_path / "given"))).new_drafter()
    want = given.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in drafter.state_dict().items())


def test_a_tuned_drafter_begins_far_below_the_loss_of_a_fresh_one(begin: Begin):
    earlier = begin("earlier", max_steps=40)
    run_stage(Workshop(earlier), "train")
    init = str(earlier.run_dir / "checkpoint" / "last")
    fresh, tuned = begin("fresh"), begin("tuned", init=init)
    for config in (fresh, tuned):
        run_stage(Workshop(config), "train")
    assert first_loss(tuned) < 0.8 * first_loss(fresh)


def test_other_weights_under_the_same_name_make_the_run_stale(
    begin: Begin, target32: Target, tmp_path: Path
):
    config = begin("tuned", init=saved(target32, tmp_path / "given"))
    assert run_stage(Workshop(config), "train")
    assert not run_stage(Workshop(config), "train")
    moved = replace(config, init=str(shutil.copytree(tmp_path / "given", tmp_path / "moved")))
    assert not run_stage(Workshop(moved), "train")
    saved(target32, tmp_path / "given", seed=1)
    assert run_stage(Workshop(config), "train")


def test_a_reduced_vocabulary_stays_the_one_that_its_weights_were_trained_for(
    begin: Begin, target32: Target, tmp_path: Path
):
    shape = VARIANTS["reduced_dspark"]
    config = begin("tuned", init=saved(target32, tmp_path / "given", **shape), drafter=shape)
    run_stage(Workshop(config), "train")
    tuned, given = (
        load_checkpoint(folder).draft_token_ids
        for folder in (config.run_dir / "checkpoint" / "last", tmp_path / "given")
    )
    assert tuned is not None
    assert given is not None
    assert torch.equal(tuned, given)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"mask_token_id": 0}, "drafter.mask_token_id is 3 there and 0 here"),
    ({"block_size": 8}, "drafter.block_size is 4 there and 8 here"),
    ({"target_layer_ids": [3, 1]}, "drafter.target_layer_ids is [1, 3] there and [3, 1] here"),
    ({"target_layer_ids": [2, 4]}, "drafter.target_layer_ids is [1, 3] there and [2, 4] here"),
    ({"num_hidden_layers": 3}, "drafter.num_hidden_layers is 2 there and 3 here"),
    ({"intermediate_size": 48}, "drafter.intermediate_size is 64 there and 48 here"),
    ({"is_causal": True}, "drafter.is_causal is None there and True here"),
    ({"layer_types": [SLIDING] * 2, "sliding_window": 6}, "drafter.sliding_window is None there"),
    ({"markov_rank": 4}, "drafter.markov_rank is None there and 4 here"),
]


@pytest.mark.parametrize(("shape", "words"), REFUSALS)
def test_a_drafter_that_contradicts_the_recipe_is_refused_by_name(
    begin: Begin, target32: Target, tmp_path: Path, shape: dict[str, Any], words: str
):
    init = saved(target32, tmp_path / "given")
    with pytest.raises(ValueError, match=r"^init \(=") as caught:
        Workshop(begin("tuned", init=init, drafter=shape)).new_drafter()
    assert words in str(caught.value)
    assert str(caught.value).endswith("to its values, or start from another drafter.")


def test_another_rotation_or_target_is_refused_by_name(
    begin: Begin, target32: Target, tmp_path: Path
):
    saved(target32, tmp_path / "given")
    (tmp_path / "given" / METADATA_NAME).unlink()  # as if another toolkit had trained it
    path = tmp_path / "given" / "config.json"
    whole = orjson.loads(path.read_bytes())
    other_rope = {"rope_type": "default", "rope_theta": 5e5}
    for change, words in (
        ({"rope_parameters": other_rope}, "rope_parameters is {'rope_type': 'default', 'rope_"),
        ({"num_target_layers": 7}, "num_target_layers is 7 there and 6 here"),
        ({"vocab_size": 300}, "vocab_size is 300 there and 260 here"),
    ):
        path.write_bytes(orjson.dumps(whole | change))
        config = begin("tuned", init=str(tmp_path / "given"))
        with pytest.raises(ValueError, match="a drafter of this target") as caught:
            Workshop(config).new_drafter()
        assert words in str(caught.value)


def test_spellings_of_the_same_config_do_not_contradict(target32: Target, tmp_path: Path):
    saved(target32, tmp_path / "given")
    found = read_config(tmp_path / "given")
    spelt = replace(
        found,
        layer_types=["full_attention"] * 2,
        rope_parameters={"rope_theta": 10_000, "type": "default", "factor": None},
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
    )
    assert contradictions(found, spelt) == []


def test_a_start_that_is_missing_or_that_the_run_would_remove_is_refused(
    begin: Begin, tmp_path: Path
):
    config = begin("tuned", init=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"init \(=.*nothing\).* is not a folder"):
        run_stage(Workshop(config), "train")
    run_stage(Workshop(begin("tuned")), "train")
    best = config.run_dir / "checkpoint" / "best"
    with pytest.raises(ValueError, match="Give the run another name"):
        run_stage(Workshop(replace(config, init=str(best))), "train")
    assert (best / "model.safetensors").is_file()


def test_every_setting_that_a_contradiction_names_is_a_key_of_the_recipe(target32: Target):
    found = tiny_drafter(target32).config
    listed = contradictions(found, replace(found, block_size=8, hidden_size=64))
    assert [(each.name, each.is_setting) for each in listed] == [
        ("hidden_size", False),
        ("block_size", True),
    ]
    assert DrafterSettings(mask_token_id=3, block_size=8).block_size == listed[1].wanted
