"""Protocol gsm8k-1280: train a drafter on SmolLM2's answers to GSM8K, and measure it.

    python benchmarks/gsm8k.py run --gsm8k DIR [recipe=gsm8k] [key=value ...]

Steps: `prepare` (records, missing answers, features), `train`, `measure` (one JSON line), `run`
(the three), `drafter` (train, and keep the best checkpoint in the cache: `make drafter`), `compare
RUN RUN ...` (paired difference of the first to each other), `cost RUN ...` (seconds of a draft
call, the drafters in turns). `ablate` trains and measures on questions of their own, where settings
are chosen; `compare --ablation RUN RUN ...` then compares there. Each resumes what was cut short
and skips what is finished. DIR holds gsm8k/{train,test}.jsonl and, if you have them, the stored
answers in gsm8k_smollm2/. The rules stand in docs/protocols/gsm8k-1280.md.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import torch
from gsm8k_data import PROTOCOL, SMOKE, Sizes, ablation_of, input_hashes, link_data, prepare
from gsm8k_measure import (
    ABLATION_FOLDER,
    FOLDER,
    TRAINING_TIME_NAME,
    compare_all,
    draft_costs,
    measure,
    measure_ablation,
)
from tqdm import tqdm

from dflash_train.cli import exit_code
from dflash_train.config import RecipeConfig, compose, require, to_plain
from dflash_train.features.target_folder import dflash_home
from dflash_train.records.manifest import (
    FileEntry,
    Manifest,
    atomic_path,
    content_hash,
    write_bytes,
)
from dflash_train.records.provenance import code_version, command_line, package_versions
from dflash_train.stages.table import stage_named
from dflash_train.stages.walk import KEY_NAME, run_stage
from dflash_train.stages.workshop import Workshop
from dflash_train.training.accelerator import threads_per_process

STEPS = ("prepare", "train", "measure", "run", "drafter", "ablate", "compare", "cost")
NOT_OF_THE_DRAFTER = ("name", "runs_dir", "checkpoint", "evaluate", "tracking")
"""Recipe groups that do not change the trained weights."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command line and give its exit code: 0 done, 1 a check failed, 2 user error."""
    parsed = _parser().parse_intermixed_args(arguments)
    return exit_code(f"gsm8k {parsed.step}", lambda: _run(parsed))


def train(workshop: Workshop, data_dir: Path) -> None:
    """Train on prepared data, from the newest train state if there is one, and note the seconds.

    The seconds are wall clock of the whole stage, validations and checkpoints included; a resumed
    training has none, since nobody watched all of it.
    """
    run_dir = workshop.config.run_dir
    link_data(run_dir, data_dir)
    marker = run_dir / stage_named("train").folder / KEY_NAME
    begun_before = marker.read_text() if marker.exists() else None
    began = time.perf_counter()
    if run_stage(workshop, "train"):
        seconds = round(time.perf_counter() - began, 1)
        key = marker.read_text()
        clock = {"key": key, "seconds": None if key == begun_before else seconds}
        write_bytes(run_dir / TRAINING_TIME_NAME, orjson.dumps(clock))


def build_drafter(config: RecipeConfig, gsm8k: Path | None, sizes: Sizes) -> Path:
    """Train the protocol's drafter unless the cache has it, and give its folder there.

    Args:
        config: The recipe.
        gsm8k: Folder of questions; None trusts the data of the cached drafter.
        sizes: The protocol's rows.
    """
    folder = dflash_home() / "drafters" / sizes.name
    settings = to_plain(config)
    for name in NOT_OF_THE_DRAFTER:
        del settings[name]
    recipe_hash = content_hash([settings, sizes.name])
    done = Manifest.read(folder)
    if done is not None and done.recipe_hash == recipe_hash:
        if gsm8k is None or done.inputs == input_hashes(gsm8k):
            done.verify_outputs(folder)
            tqdm.write("drafter: complete and unchanged, nothing to do", file=sys.stderr)
            return folder
    data_dir = prepare(config, gsm8k, sizes)
    workshop = Workshop(config)
    train(workshop, data_dir)
    _keep(workshop, folder, recipe_hash, inputs=_data_inputs(sizes))
    return folder


def _run(parsed: argparse.Namespace) -> int:
    sizes = SMOKE if parsed.smoke else PROTOCOL
    config, folders = _compose(parsed)
    torch.set_num_threads(threads_per_process(config.launch))
    if parsed.step == "compare":
        require(len(folders) >= 2, "compare: give the run folders of two measured drafters.")
        measured = ABLATION_FOLDER if parsed.ablation else FOLDER
        for figures in compare_all(folders, config.evaluate, measured=measured):
            _print_line(figures)
        return 0
    if parsed.step == "cost":
        require(bool(folders), "cost: give the run folders of trained drafters.")
        _print_line({"draft_s": draft_costs(folders, Workshop(config).target)})
        return 0
    require(not folders, f"{parsed.step}: {folders and folders[0]} is not of the form key=value.")
    if parsed.step == "drafter":
        print(build_drafter(config, parsed.gsm8k, sizes))
        return 0
    data_dir = prepare(config, parsed.gsm8k, sizes)
    if parsed.step == "prepare":
        print(data_dir)
        return 0
    workshop = Workshop(config)
    if parsed.step in ("train", "run", "ablate") and config.checkpoint is None:
        train(workshop, data_dir)
    if parsed.step == "train":
        print(workshop.checkpoint)
        return 0
    if parsed.step == "ablate":
        held_out = ablation_of(sizes)
        _print_line(measure_ablation(workshop, held_out, prepare(config, parsed.gsm8k, held_out)))
        return 0
    link_data(config.run_dir, data_dir)
    figures = measure(workshop, sizes)
    _print_line(figures)
    live = figures["live"]
    is_exact = live["num_equal_to_replay"] == live["num_requests"] and not live["num_unexplained"]
    return 0 if is_exact else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gsm8k.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="DFLASH_TRACEBACK=1 shows the traceback of an error.",
    )
    parser.add_argument("step", choices=STEPS, metavar="step", help=", ".join(STEPS))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe settings")
    parser.add_argument("--gsm8k", type=Path, metavar="DIR", help="questions and stored answers")
    parser.add_argument("--recipes", metavar="DIR", help="folder of recipes (default ./recipes)")
    parser.add_argument(
        "--ablation", action="store_true", help="compare what `ablate` has measured"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a few rows, to see that everything runs"
    )
    return parser


def _compose(parsed: argparse.Namespace) -> tuple[RecipeConfig, list[Path]]:
    """Give the recipe (`gsm8k` unless named) and the folders among the arguments."""
    overrides = [each for each in parsed.overrides if "=" in each]
    if not any(each.startswith("recipe=") for each in overrides):
        overrides = ["recipe=gsm8k", *overrides]
    folders = [Path(each) for each in parsed.overrides if "=" not in each]
    return compose(overrides, parsed.recipes), folders


def _keep(workshop: Workshop, folder: Path, recipe_hash: str, *, inputs: dict[str, str]) -> None:
    """Copy the best checkpoint into the cache, its manifest last."""
    trained = Manifest.read(workshop.config.run_dir / stage_named("train").folder)
    assert trained is not None
    with atomic_path(folder) as partial:
        shutil.copytree(workshop.checkpoint, partial)
        Manifest(
            stage="drafter",
            recipe_hash=recipe_hash,
            inputs=inputs,
            outputs=[FileEntry.of(path, partial) for path in sorted(partial.iterdir())],
            target=trained.target,
            command=command_line(),
            code=dict(code_version()),
            versions=package_versions(),
            details=trained.details,
        ).write(partial)


def _data_inputs(sizes: Sizes) -> dict[str, str]:
    """Give the hashes of the files from which the prepared data came."""
    answers = dflash_home() / "protocols" / sizes.name / "answers" / stage_named("ingest").folder
    manifest = Manifest.read(answers)
    assert manifest is not None, "prepare has written it"
    return manifest.inputs


def _print_line(figures: dict[str, Any]) -> int:
    print(orjson.dumps(figures).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
