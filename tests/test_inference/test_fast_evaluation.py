"""The live part of `evaluate` on packed passes: the eager oracle judges them, near-ties are listed.

Layers are packed for real and not compiled, which would take a minute and round no differently in
kind; tests of the compiled pass are in test_target_pass.py.
"""

from pathlib import Path

import orjson
import pytest
import torch

from dflash_inference import target_pass
from dflash_inference.evaluate import evaluate
from dflash_inference.live_check import find_mismatch, read_checks
from dflash_inference.packed_linear import can_pack
from dflash_inference.report import read_findings, report, write_sentences
from dflash_inference.trace import read_traces
from dflash_train.config import RecipeConfig
from dflash_train.drafter.model import Drafter
from dflash_train.features.store import FeatureRow, FeatureStore, write_index, write_shard
from dflash_train.features.target import Target
from dflash_train.records.manifest import FileEntry, Manifest
from dflash_train.testing import tiny_drafter, tiny_target

NUM_ROWS, BUDGET = 6, 20


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def rows(target: Target, answer_prompts) -> list[FeatureRow]:
    prompts = [[1, *range(10 * number, 10 * number + 8)] * 2 for number in range(1, NUM_ROWS + 1)]
    return answer_prompts(target, prompts, budget=BUDGET)


@pytest.fixture(scope="module")
def drafter(target: Target, rows: list[FeatureRow], fit_drafter) -> Drafter:
    return fit_drafter(target, tiny_drafter(target), rows, num_steps=40)


@pytest.fixture
def recipe(tmp_path: Path) -> RecipeConfig:
    config = RecipeConfig(name="tiny", runs_dir=str(tmp_path))
    config.evaluate.eval_sets = []
    config.evaluate.resamples = 100
    config.evaluate.live_traffic = NUM_ROWS
    config.evaluate.live_max_new_tokens = BUDGET
    return config


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the targets that are packed; none is compiled, so any program is compiler enough."""
    counted: list[int] = []
    monkeypatch.setattr(target_pass, "compile_layers", lambda stack: counted.append(1))
    monkeypatch.setenv("CXX", "sh")
    return counted


def run_stage(
    config: RecipeConfig, target: Target, drafter: Drafter, rows: list[FeatureRow]
) -> Manifest:
    folder = config.run_dir / "features" / "test"
    path = folder / "00000.safetensors"
    write_index(folder, write_shard(path, rows, dtype=torch.float32))
    books = Manifest(stage="collect", recipe_hash="sha256:0", outputs=[FileEntry.of(path, folder)])
    books.write(folder)
    return evaluate(
        config,
        target=target,
        drafter=drafter,
        stores={"test": FeatureStore.open(folder)},
        manifest=Manifest(stage="evaluate", recipe_hash="sha256:0", target=target.describe()),
    )


@pytest.mark.skipif(not can_pack(torch.device("cpu")), reason="this build of torch cannot pack")
def test_packed_passes_give_the_exact_tokens_and_the_report_says_the_mode(
    recipe: RecipeConfig, target: Target, drafter: Drafter, rows: list[FeatureRow],
    packings: list[int],
) -> None:  # fmt: skip
    assert recipe.evaluate.fast
    manifest = run_stage(recipe, target, drafter, rows)
    assert len(packings) == 1, "one packed copy serves every way of decoding"
    assert (manifest.details["live_mode"], manifest.details["dtype"]) == ("fast", "float32")
    folder = recipe.run_dir / "traces"
    checks = read_checks(folder / "live-check.json")
    assert len(checks) == NUM_ROWS
    assert all(check.mismatch is None or check.mismatch.is_near_tie for check in checks)
    assert sum(check.mismatch is None for check in checks) >= NUM_ROWS - 1
    plain = read_traces(folder / "plain.jsonl")
    for name in ("width1.jsonl", "live_lookup.jsonl"):
        traces = read_traces(folder / name)
        found = [
            find_mismatch(mine, other, dtype=torch.float32)
            for mine, other in zip(plain, traces, strict=True)
        ]
        assert all(mismatch is None or mismatch.is_near_tie for mismatch in found)
    report(recipe, manifest=Manifest(stage="report", recipe_hash="sha256:0"))
    speed = read_findings(recipe)["speed"]
    assert speed["setting"]["mode"] == "fast"
    assert list(speed["ways"]) == ["transformers", "width_one", "prompt_lookup", "drafter"]
    assert (
        "packed and compiled passes, float32, on cpu"
        in write_sentences(read_findings(recipe))["speed"]
    )


def test_without_a_compiler_evaluation_goes_on_exactly_and_says_so(
    recipe: RecipeConfig, target: Target, drafter: Drafter, rows: list[FeatureRow],
    packings: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("CXX", "no-such-compiler")
    recipe.evaluate.live_traffic = 1
    manifest = run_stage(recipe, target, drafter, rows)
    assert packings == []
    assert manifest.details["live_mode"] == "exact"
    said = capsys.readouterr().err
    assert said.count("evaluate.fast (=true) needs a C++ compiler, and no-such-compiler") == 1
    (check,) = orjson.loads((recipe.run_dir / "traces" / "live-check.json").read_bytes())[
        "requests"
    ]
    assert check["equals_replay"]
