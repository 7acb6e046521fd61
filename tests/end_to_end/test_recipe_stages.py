"""Every recipe, as a user composes it, through every stage on a tiny target of its architecture.

Overridden are the target and sizes alone; `-s` prints the table of recipes by stage.
"""

import weakref
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import torch

from dflash_train.config import RecipeConfig, known_recipes
from dflash_train.drafter.checkpoint import load_checkpoint
from dflash_train.features.store import FeatureStore
from dflash_train.records.manifest import Manifest
from dflash_train.release.equivalence import measure_equivalence
from dflash_train.release.finding import Finding, Status
from dflash_train.stages.examination import Scope, examine_checkpoint
from dflash_train.stages.exporting import export_checkpoint
from dflash_train.stages.walk import run_stage
from dflash_train.stages.workshop import Workshop
from tests.end_to_end.recipe_runs import HELD_OUT, RECIPES, TRAIN, small_overrides, small_recipe

NAMES = known_recipes(RECIPES)
RECURRENT = ("qwen3_5",)
"""Targets that no decoder of ours takes: replay measures their drafters."""
STAGES = ("regenerate", "collect", "train", "replay", "equivalence", "export", "doctor")


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, dict[str, str]]]:
    """What each stage said, by recipe; printed when the last recipe is through."""
    rows: dict[str, dict[str, str]] = {}
    yield rows
    print("\n" + "\n".join([" | ".join(("recipe", *STAGES)), *map(_line, rows, rows.values())]))


def _line(name: str, row: dict[str, str]) -> str:
    return " | ".join([name, *(row.get(stage, "-") for stage in STAGES)])


def walk(config: RecipeConfig, row: dict[str, str]) -> list[Finding]:
    """Run the stages in order and note what each gave; the doctor's findings come last."""
    workshop, run_dir = Workshop(config), config.run_dir
    run_stage(workshop, "regenerate")
    row["regenerate"] = f"{len(TRAIN) + len(HELD_OUT)} answers"
    run_stage(workshop, "collect")
    store = FeatureStore.open(run_dir / "features" / "train")
    assert len(store) == len(TRAIN)
    assert all(torch.isfinite(each.features.float()).all() for each in store)
    row["collect"] = f"{store[0].features.shape[1]} wide"
    target = weakref.ref(workshop.target.model)
    run_stage(workshop, "train")
    assert target() is None, "training holds the target's layers, which it does not read"
    row["train"] = f"{_losses(run_dir)[-1]:.2f}"
    run_stage(workshop, "evaluate")
    row["replay"] = f"{_acceptance(run_dir):.2f}"
    drafter = load_checkpoint(workshop.checkpoint)
    found = measure_equivalence(drafter, workshop.target)
    assert found.holds, found
    row["equivalence"] = f"{found.hidden_error:.0e}"
    row["export"] = _export(config)
    findings = examine_checkpoint(config, Scope(target=True, recipe=True, run=True))
    row["doctor"] = "/".join(
        str(sum(each.status is status for each in findings))
        for status in (Status.ok, Status.warning, Status.skipped, Status.failed)
    )
    return findings


def _losses(run_dir: Path) -> list[float]:
    lines = map(orjson.loads, (run_dir / "metrics.jsonl").read_bytes().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses), losses
    return losses


def _acceptance(run_dir: Path) -> float:
    """Give the best validation replay, which `evaluate` must be able to trace again."""
    manifest, traces = Manifest.read(run_dir / "checkpoint"), Manifest.read(run_dir / "traces")
    assert manifest is not None
    assert traces is not None
    assert manifest.details["best_acceptance_length"] >= 1.0
    return manifest.details["best_acceptance_length"]


def _export(config: RecipeConfig) -> str:
    """Write both dialects; speculators has no place for factors on embeddings and logits."""
    drafter = load_checkpoint(Workshop(config).checkpoint).config
    has_factor = drafter.input_embedding_scale != 1 or drafter.final_logit_softcapping is not None
    written = []
    for dialect in ("zlab", "speculators"):
        out = config.run_dir / "export" / dialect
        if dialect == "speculators" and has_factor:
            with pytest.raises(ValueError, match=r"input_embedding_scale.*format=zlab"):
                export_checkpoint(config, format_name=dialect, out=str(out))
        else:
            written.append(export_checkpoint(config, format_name=dialect, out=str(out)).folder.name)
    return "+".join(written)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_goes_through_every_stage(
    name: str, tmp_path: Path, table: dict[str, dict[str, str]]
) -> None:
    row = table.setdefault(name, {})
    config = small_recipe(name, small_overrides(name, tmp_path))
    findings = {finding.check: finding for finding in walk(config, row)}
    failed = [str(each) for each in findings.values() if each.status is Status.failed]
    assert not failed, _line(name, row)
    assert row.keys() == set(STAGES)
    if name in RECURRENT:
        assert findings["decoding"].status is Status.skipped
        assert "linear_attention" in str(findings["decoding"])
    else:
        assert findings["decoding"].status is Status.ok, str(findings["decoding"])
