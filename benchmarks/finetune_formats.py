"""Drafters of several formats, fine-tuned for some steps on the features of a finished run.

    python -m benchmarks.finetune_formats DIR [DIR ...] --run runs/smollm2 [--steps 50]

Each DIR is a drafter of another origin, in any layout that can be read, for the run's target,
with its taps, mask token and block size. It is replayed on the run's held-out answers, trained
for a few steps from its weights (`init=DIR`) by the run's recipe, and replayed again. Resampled by
conversation, before and after on the same resamples. Everything is kept in the folder
`finetune-formats` of the run, and an interrupted bench goes on. The last line is one JSON object.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_measure import describe_machine
from benchmarks.bench_runs import config_of, load_before, markdown_table, tell
from benchmarks.store_replay import Comparison, compare, for_steps, replay_store, train_on_store
from dflash_train.config import DrafterSettings, RecipeConfig
from dflash_train.drafter.checkpoint import save_checkpoint
from dflash_train.drafter.config import DrafterConfig
from dflash_train.release.formats import Imported
from dflash_train.stages.drafters import import_drafter
from dflash_train.stages.workshop import Workshop
from dflash_train.training.accelerator import threads_per_process

BENCH = "finetune-formats"
HELD_OUT = "test"
VARIANT_KEYS = (
    "num_hidden_layers", "conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k",
    "markov_rank", "has_confidence_head", "draft_vocab_size", "layer_types", "sliding_window",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    options = _options().parse_intermixed_args(arguments)
    load = load_before(BENCH)
    folders = [Path(each) for each in options.words if "=" not in each]
    overrides = [each for each in options.words if "=" in each]
    config = config_of(options.run, overrides)
    torch.set_num_threads(threads_per_process(config.launch))
    given = Workshop(config)
    found = {str(each): fine_tune(given, each, num_steps=options.steps) for each in folders}
    rows = [[name, *_shown(*each)] for name, each in found.items()]
    head = ["drafter", "layout", "before", "after", "after against before", "95 %, paired"]
    print(markdown_table(head, rows))
    about = describe_machine(torch.get_num_threads()) | {"load_before": load}
    print(json.dumps(summary(found) | {"steps": options.steps} | about))


def fine_tune(
    given: Workshop, folder: Path, *, num_steps: int
) -> tuple[Imported, Comparison, Comparison]:
    """Give an imported drafter, its replay, and that of the same after some steps beside it.

    Args:
        given: The finished run.
        folder: The drafter.
        num_steps: Optimiser steps.
    """
    config, name = given.config, f"{folder.parent.name}-{folder.name}"
    imported = import_drafter(folder, config.target)
    bench = config.run_dir / BENCH
    before = bench / "imported" / name
    save_checkpoint(imported.drafter, before)
    tell(BENCH, f"{folder}: {imported.format.value}, {num_steps} steps")
    own = replace(
        for_steps(config, num_steps),
        name=name,
        runs_dir=str(bench),
        checkpoint=None,
        init=str(folder),
        drafter=_settings_of(imported.drafter.config, config.drafter),
    )
    workshop = Workshop(own)
    workshop.target = given.target
    _share_features(config, own)
    after = train_on_store(workshop)
    traces = [
        replay_store(
            each, given.target.head, config.run_dir / "features", bench / "replays", split=HELD_OUT
        )
        for each in (before, after)
    ]
    base, tuned = traces
    return (
        imported,
        compare(base, base, config.evaluate),
        compare(tuned, base, config.evaluate),
    )


def _settings_of(config: DrafterConfig, settings: DrafterSettings) -> DrafterSettings:
    """Give the recipe's settings with the kind of another drafter."""
    return replace(settings, **{key: getattr(config, key) for key in VARIANT_KEYS})


def _share_features(config: RecipeConfig, own: RecipeConfig) -> None:
    """Let a run train on the features of another; nothing is copied."""
    own.run_dir.mkdir(parents=True, exist_ok=True)
    link = own.run_dir / "features"
    if not link.exists():
        link.symlink_to((config.run_dir / "features").resolve(), target_is_directory=True)


def summary(found: dict[str, tuple[Imported, Comparison, Comparison]]) -> dict[str, Any]:
    """Give what the last line holds; the goal is an interval that is not wholly below zero."""
    drafters = {
        name: {
            "layout": imported.format.value,
            "before": before.pooled,
            "after": asdict(after),
            "goal_met": after.relative_interval.high >= 0,
        }
        for name, (imported, before, after) in found.items()
    }
    met = all(each["goal_met"] for each in drafters.values())
    return {"bench": BENCH, "drafters": drafters, "met": met}


def _shown(imported: Imported, before: Comparison, after: Comparison) -> list[str]:
    low, high = after.relative_interval.low, after.relative_interval.high
    return [
        imported.format.value,
        f"{before.pooled:.3f}",
        f"{after.pooled:.3f}",
        f"{after.relative:+.1%}",
        f"{low:+.1%} .. {high:+.1%}",
    ]


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="+", metavar="DIR|key=value", help="drafters; settings")
    parser.add_argument("--run", type=Path, default=Path("runs/smollm2"), help="a finished run")
    parser.add_argument("--steps", type=int, default=50, help="of each training")
    return parser


if __name__ == "__main__":
    main()
