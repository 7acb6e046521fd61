from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from dflash_train.config import RecipeConfig, TuneConfig, compose
from dflash_train.drafter.checkpoint import drafter_hash, save_checkpoint
from dflash_train.drafter.model import Drafter
from dflash_train.features.store import FeatureStore
from dflash_train.features.target import Target
from dflash_train.records.manifest import Manifest
from dflash_train.release.promotion import PromotionRule
from dflash_train.release.registry import Registry
from dflash_train.stages.earlier_runs import (
    earlier_inputs,
    earlier_window,
    earlier_window_inputs,
    with_replayed_rows,
)
from dflash_train.stages.inputs import training_inputs
from dflash_train.stages.tune.rule_book import BOOK_NAME, RuleBook, read_book
from dflash_train.stages.tune.start import begin, plan_tuning
from dflash_train.stages.workshop import Workshop
from dflash_train.testing import save_tiny_target, tiny_drafter
from tests.test_train.conftest import AnswerRows, TinyRecipe, WriteSplit

RULE = PromotionRule(
    min_requests=100, tenant_margin=0.02, fewest_requests=50, resamples=10_000, seed=0
)
BOOK = RuleBook(run="week-0a1b", rule=RULE, incumbent="sha256:1", start="sha256:1")


@pytest.fixture
def recipe(tmp_path: Path, target32: Target) -> RecipeConfig:
    """A recipe of a tiny target on disk, which asks for another drafter than the one in `init`."""
    save_checkpoint(tiny_drafter(target32), tmp_path / "served")
    return compose(
        [
            f"target.name_or_path={save_tiny_target(tmp_path / 'target')}",
            f"runs_dir={tmp_path / 'runs'}",
            f"tune.registry={tmp_path / 'registry'}",
            f"init={tmp_path / 'served'}",
            "name=week",
            "drafter.mask_token_id=3",
            "drafter.num_taps=1",
            "optim.lr=1e-3",
        ]
    )


def without_init(config: RecipeConfig, **tune: Any) -> RecipeConfig:
    return replace(config, init=None, tune=replace(config.tune, **tune))


def test_the_shape_is_the_drafters_and_the_rate_is_lower(recipe: RecipeConfig):
    tuned = plan_tuning(recipe).config
    assert recipe.drafter.block_size == 8
    assert (tuned.drafter.block_size, tuned.drafter.num_hidden_layers) == (4, 2)
    assert recipe.drafter.selector_rank == 128
    assert (tuned.drafter.conv_kernel_size, tuned.drafter.selector_rank) == (None, None)
    assert tuned.drafter.target_layer_ids == [1, 3]
    assert tuned.optim.lr == pytest.approx(3e-4)
    assert tuned.training.patience == 3
    assert recipe.init is not None
    assert Workshop(tuned).initial_drafter(recipe.init).config.block_size == 4


def test_planning_writes_nothing_and_beginning_makes_the_start_current(recipe: RecipeConfig):
    tuning = plan_tuning(recipe)
    assert not Path(recipe.tune.registry).exists()
    assert not recipe.run_dir.exists()
    begin(tuning)
    assert recipe.init is not None
    served = drafter_hash(Path(recipe.init))
    assert tuning.registry.roles.current == tuning.book.incumbent == tuning.book.start == served
    assert read_book(recipe.run_dir) == tuning.book


def test_without_a_start_the_registrys_current_is_tuned(recipe: RecipeConfig):
    begin(plan_tuning(recipe))
    tuning = plan_tuning(without_init(recipe))
    assert tuning.config.init == str(tuning.registry.drafter_folder(tuning.book.incumbent))
    assert not tuning.is_new


def test_a_start_of_ones_own_is_still_compared_with_what_serves(
    recipe: RecipeConfig, tmp_path: Path, target32: Target
):
    begin(plan_tuning(recipe))
    save_checkpoint(tiny_drafter(target32, seed=1), tmp_path / "other")
    book = plan_tuning(replace(recipe, name="next", init=str(tmp_path / "other"))).book
    assert book.incumbent == drafter_hash(tmp_path / "served")
    assert book.start == drafter_hash(tmp_path / "other")


def test_a_drafter_that_does_not_fit_the_target_never_becomes_current(
    recipe: RecipeConfig, tmp_path: Path, target32: Target
):
    shape = tiny_drafter(target32).config
    shape = replace(shape, rope_parameters=shape.rope_parameters | {"rope_theta": 77.0})
    save_checkpoint(Drafter(shape), tmp_path / "other")
    with pytest.raises(ValueError, match="contradicts the recipe: rope_parameters"):
        begin(plan_tuning(replace(recipe, init=str(tmp_path / "other"))))
    assert Registry(Path(recipe.tune.registry)).roles.current is None


def test_a_run_that_was_not_judged_may_change_its_rule_and_one_that_was_says_so(
    recipe: RecipeConfig,
):
    begin(plan_tuning(recipe))
    strict = without_init(recipe, tenant_margin=0.0)
    assert plan_tuning(strict).book.judged_before == []
    before = plan_tuning(without_init(recipe)).book
    facts = {"rule": before.hash, "candidate": before.incumbent}
    registry = Registry(Path(recipe.tune.registry))
    registry.keep(before.incumbent, against=before.incumbent, facts=facts)
    assert plan_tuning(without_init(recipe)).book == before
    assert plan_tuning(strict).book.judged_before == [before.hash]
    assert plan_tuning(without_init(recipe), force=True).book.judged_before == [before.hash]


def test_a_book_is_read_as_it_was_written_and_two_runs_never_share_one(tmp_path: Path):
    BOOK.write(tmp_path)
    assert read_book(tmp_path) == BOOK
    assert replace(BOOK, run="week-9f9f").hash != BOOK.hash
    assert read_book(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("key", ["incumbent", "rule", "promoted_if", "judged_before"])
def test_a_book_that_was_changed_by_hand_is_refused(tmp_path: Path, key: str):
    BOOK.write(tmp_path)
    path = tmp_path / BOOK_NAME
    content = orjson.loads(path.read_bytes())
    changed = {
        "incumbent": "sha256:2",
        "rule": content["rule"] | {"tenant_margin": 0.5},
        "promoted_if": content["promoted_if"][1:],
        "judged_before": ["sha256:9"],
    }
    path.write_bytes(orjson.dumps(content | {key: changed[key]}))
    with pytest.raises(ValueError, match="was changed after it was written"):
        read_book(tmp_path)


@pytest.fixture
def runs(
    tmp_path: Path, target32: Target, answer_rows: AnswerRows, write_split: WriteSplit,
    tiny_recipe: TinyRecipe,
) -> RecipeConfig:  # fmt: skip
    """A run with collected features, and an earlier one, `old`, some of whose calls it has too."""
    config = tiny_recipe(tmp_path, name="new")
    rows = {
        name: [
            replace(row, session=f"{name}{number}")
            for number, row in enumerate(answer_rows(target32, [5, 6, 7, 8], seed=seed))
        ]
        for seed, name in enumerate("abcdef")
    }
    shared = rows["a"][:1]
    splits = {
        "old": {"train": rows["d"] + shared, "validation": rows["e"], "test": rows["f"] + shared},
        "new": {"train": rows["a"], "validation": rows["b"], "test": rows["c"] + rows["d"][:1]},
    }
    for run, parts in splits.items():
        for split, each in parts.items():
            write_split(tmp_path / run / "features" / split, each)
        manifest = Manifest(stage="collect", recipe_hash="r", target=target32.describe())
        manifest.write(tmp_path / run / "features")
    return replace(config, tune=TuneConfig(replay_from=[str(tmp_path / "old")], replay_share=0.9))


def test_calls_that_the_run_holds_itself_are_neither_replayed_nor_measured(runs: RecipeConfig):
    own = FeatureStore.open(runs.run_dir / "features" / "train")
    mixed = with_replayed_rows(Workshop(runs), own, verify=True)
    assert [line.id for line in mixed.lines[:4]] == [line.id for line in own.lines]
    assert {line.id for line in mixed.lines[4:]} == {"row-3-1", "row-3-2", "row-3-3"}
    window = earlier_window(runs, verify=True)
    assert window is not None
    assert {line.id for line in window.lines} == {f"row-5-{number}" for number in range(4)}


def test_what_is_replayed_is_an_input_of_training_and_nothing_is_without_it(
    runs: RecipeConfig, tmp_path: Path
):
    assert set(training_inputs(Workshop(runs))) == {"replayed 0", "replay share"}
    assert set(earlier_window_inputs(Workshop(runs))) == {"earlier 0"}
    for tune in (TuneConfig(), replace(runs.tune, replay_share=0.0)):
        assert training_inputs(Workshop(replace(runs, tune=tune))) == {}
    before = earlier_inputs(Workshop(runs))
    folder = tmp_path / "old" / "features" / "train"
    manifest = Manifest.read(folder)
    assert manifest is not None
    replace(manifest, recipe_hash="sha256:1").write(folder)
    assert earlier_inputs(Workshop(runs)) != before


@pytest.mark.parametrize(
    ("key", "value"), [("revision", "another"), ("target_layer_ids", [0, 3]), ("tokenizer", "x")]
)
def test_features_of_another_target_are_refused_by_what_differs(
    runs: RecipeConfig, tmp_path: Path, key: str, value: Any
):
    folder = tmp_path / "old" / "features"
    manifest = Manifest.read(folder)
    assert manifest is not None
    assert manifest.target is not None
    replace(manifest, target=manifest.target | {key: value}).write(folder)
    with pytest.raises(ValueError, match=rf"another target: {key} is"):
        earlier_inputs(Workshop(runs))
    with pytest.raises(ValueError, match=rf"another target: {key} is"):
        earlier_window_inputs(Workshop(runs))


def test_a_run_cannot_replay_itself(runs: RecipeConfig):
    own = replace(runs, tune=replace(runs.tune, replay_from=[str(runs.run_dir)]))
    with pytest.raises(ValueError, match="is the folder of this run"):
        earlier_inputs(Workshop(own))


def test_without_earlier_runs_there_is_no_earlier_window(runs: RecipeConfig):
    assert earlier_window(replace(runs, tune=TuneConfig()), verify=False) is None
