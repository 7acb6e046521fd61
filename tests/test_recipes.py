"""Every file in recipes/ is one that a user can run."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from dflash_train.config import RecipeConfig, compose, known_recipes, recipes_dir

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
GROUPS = [
    (path.parent.name, path.stem)
    for path in sorted(RECIPES.glob("*/*.yaml"))
    if path.parent.name not in ("recipe", "launch")
]
LAUNCH_FILES = sorted((RECIPES / "launch").glob("*.yaml"))


@pytest.mark.parametrize("name", known_recipes(RECIPES))
def test_every_recipe_composes_and_is_named_as_its_file(name: str) -> None:
    config = compose([f"recipe={name}"], str(RECIPES))
    assert isinstance(config, RecipeConfig)
    assert config.name == name


@pytest.mark.parametrize("name", known_recipes(RECIPES))
def test_every_recipe_starts_with_its_command(name: str) -> None:
    package, command, reason = (RECIPES / "recipe" / f"{name}.yaml").read_text().splitlines()[:3]
    assert package == "# @package _global_"  # hydra reads it at the very top only
    assert command.startswith(f"# dflash-train run recipe={name}")
    assert reason.startswith("# ")


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_group_file_fits_the_schema(group: str, name: str) -> None:
    config = compose([f"{group}={name}"], str(RECIPES))
    chosen = yaml.safe_load((RECIPES / group / f"{name}.yaml").read_text())
    assert chosen
    assert set(chosen) <= set(vars(getattr(config, group)))


def test_recipes_hold_only_yaml() -> None:
    files = [path for path in RECIPES.rglob("*") if path.is_file()]
    assert files
    assert {path.suffix for path in files} == {".yaml"}


def test_a_target_chosen_by_the_user_wins_over_the_recipe() -> None:
    config = compose(["recipe=smollm2", "target=smollm2_hub"], str(RECIPES))
    assert config.target.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_qwen3_is_the_paper() -> None:
    config = compose(["recipe=qwen3"], str(RECIPES))
    assert (config.drafter.block_size, config.loss.decay_gamma) == (16, 7.0)
    assert (config.training.num_anchors, config.optim.lr) == (512, 6e-4)
    assert config.data.max_prompt_tokens + config.data.max_new_tokens == 3072


def test_a_misspelt_key_names_the_known_recipes() -> None:
    with pytest.raises(ValueError, match=r"num_ancors.*qwen3.*smollm2"):
        compose(["recipe=smollm2", "training.num_ancors=3"], str(RECIPES))


def test_recipes_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipes_dir() == RECIPES


def test_the_package_links_to_the_recipes_that_its_wheel_copies() -> None:
    link = ROOT / "dflash_train" / "recipes"
    assert link.is_symlink()
    assert link.resolve() == RECIPES


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_accelerate_reads_every_launch_file(path: Path) -> None:
    config = load_config_from_file(str(path))  # an unknown key raises
    assert isinstance(config, ClusterConfig)
    assert config.num_processes >= 1
    assert f"--config_file recipes/launch/{path.name}" in path.read_text().splitlines()[0]


def test_the_processes_of_a_ddp_launch_see_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "count_ranks.py"
    script.write_text(
        "import pathlib, torch\n"
        "from accelerate import Accelerator\n"
        "accelerator = Accelerator()\n"
        "total = int(accelerator.reduce(torch.ones(1)).item())\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / f'rank-{accelerator.process_index}').write_text(str(total))\n"
        "accelerator.end_training()\n"  # without it gloo's threads abort the exit
    )
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launch = ["-m", "accelerate.commands.launch", "--config_file", RECIPES / "launch" / "ddp.yaml"]
    subprocess.run([sys.executable, *launch, script], check=True, timeout=120)
    assert [path.read_text() for path in sorted(tmp_path.glob("rank-*"))] == ["2", "2"]
