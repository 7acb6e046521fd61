"""Small runs under any launch: a program for torchrun and `accelerate launch`, and for tests.

    torchrun --nproc-per-node 2 -m tests.test_train.launched_runs FOLDER NAME ...

FOLDER holds the feature splits that `RUNS` name. Each run leaves its metrics and states, and the
weights as every rank holds them.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import orjson
import torch

from dflash_train.config import (
    DrafterSettings,
    LaunchConfig,
    LossConfig,
    OptimConfig,
    Precision,
    RecipeConfig,
    TargetConfig,
    TrainingConfig,
    Weighting,
)
from dflash_train.drafter.checkpoint import save_checkpoint
from dflash_train.features.store import FeatureStore
from dflash_train.testing import MASK_TOKEN_ID, VARIANTS, tiny_drafter, tiny_target
from dflash_train.training.accelerator import build_accelerator
from dflash_train.training.batching import Pack
from dflash_train.training.optimizer_step import StepResult
from dflash_train.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
ROW_TOKENS = 20
"""Tokens of each row of the split `even`."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What differs between the runs."""

    variant: str = "plain"
    weighting: Weighting = Weighting.decay
    split: str = "uneven"
    pack_tokens: int = 40
    accumulation_steps: int = 1
    max_steps: int = 4
    dtype: torch.dtype = torch.float64
    ema_decay: float | None = None
    launch: LaunchConfig = field(default_factory=lambda: LaunchConfig(num_threads=1))
    folder: str | None = None
    """Where to run; None takes the run's name."""
    stop: Callable[[Trainer], None] | None = None
    """Called before every step; what it raises ends the run."""


class PowerCutError(Exception):
    """Ends a run where no signal does."""


def cut_at_step_2(trainer: Trainer) -> None:
    """Fail on every rank at once, after the state of step 2."""
    if trainer.state.step == 2:
        raise PowerCutError


def signal_the_last_rank_twice(trainer: Trainer) -> None:
    """Do what a scheduler and the launcher below it do, to one rank only."""
    accelerator = trainer.accelerator
    if trainer.state.step == 1 and accelerator.is_last_process:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


DPACE = Weighting.dpace
TWO_RANKS = {
    "plain": Run(),
    "dflash2": Run(variant="dflash2", weighting=DPACE),
    "dspark": Run(variant="dspark", weighting=DPACE),
    "averaged": Run(ema_decay=0.9),
    "two ranks x 2 rows": Run(split="even", pack_tokens=2 * ROW_TOKENS, max_steps=50),
    "two ranks x 1 row x 2": Run(
        split="even", pack_tokens=ROW_TOKENS, accumulation_steps=2, max_steps=50
    ),
    "cut": Run(folder="two to one", stop=cut_at_step_2),
    "goes on on two": Run(folder="one to two"),
    "signalled": Run(folder="signalled", stop=signal_the_last_rank_twice),
    "signalled again": Run(folder="signalled"),
}
ONE_RANK = {
    "one rank x 1 row x 4": Run(
        split="even", pack_tokens=ROW_TOKENS, accumulation_steps=4, max_steps=50
    ),
    "one rank x 4 rows": Run(split="even", pack_tokens=4 * ROW_TOKENS, max_steps=50),
    "cut on one": Run(folder="one to two", accumulation_steps=2, stop=cut_at_step_2),
    "goes on on one": Run(folder="two to one"),
}
ENGINES = {
    f"engine-{variant}{'-recomputed' if recomputes else ''}": Run(
        variant=variant,
        weighting=DPACE,
        accumulation_steps=2,
        max_steps=20,
        dtype=torch.float32,
        launch=LaunchConfig(num_threads=1, activation_checkpointing=recomputes),
    )
    for variant in ("plain", "dflash2", "dspark")
    for recomputes in (False, True)
} | {
    "engine-averaged": Run(max_steps=20, dtype=torch.float32, ema_decay=0.9),
    "engine-whole": Run(max_steps=20, dtype=torch.float32),
    "engine-cut": Run(max_steps=20, dtype=torch.float32, folder="engine", stop=cut_at_step_2),
    "engine-goes-on": Run(max_steps=20, dtype=torch.float32, folder="engine"),
}
GPU_RUNS = {
    f"gpu-{variant}-{precision.value}": Run(
        variant=variant,
        max_steps=20,
        dtype=torch.float32,
        launch=LaunchConfig(num_threads=1, mixed_precision=precision),
    )
    for variant in ("plain", "dflash2", "dspark")
    for precision in Precision
}
ON_ONE_GPU = {f"{name} alone": replace(run, accumulation_steps=2) for name, run in GPU_RUNS.items()}
MOVED = {
    "gpu-cut": Run(max_steps=20, dtype=torch.float32, folder="gpu", stop=cut_at_step_2),
    "gpu-goes-on": Run(max_steps=20, dtype=torch.float32, folder="gpu"),
}
RUNS = TWO_RANKS | ONE_RANK | ENGINES | GPU_RUNS | ON_ONE_GPU | MOVED


def by_torch(num_processes: int) -> list[str]:
    """Give the beginning of a command that starts processes on this machine's CPU."""
    return ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]


def by_accelerate(launch_file: str, num_processes: int) -> list[str]:
    """Give the beginning of a command that starts processes by a file of `recipes/launch`."""
    path = ROOT / "recipes" / "launch" / f"{launch_file}.yaml"
    return [
        "accelerate.commands.launch", "--config_file", str(path),
        "--num_processes", str(num_processes),
    ]  # fmt: skip


def launch_runs(
    launcher: list[str],
    folder: Path,
    names: Iterable[str],
    *,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Fit named runs in processes of their own and give what these said on stderr."""
    program = ["-m", "tests.test_train.launched_runs", str(folder), *names]
    return launch([*launcher, *program], environment=environment)


def launch(arguments: list[str], *, environment: Mapping[str, str] | None = None) -> str:
    """Run `python -m ARGUMENTS` from the root of the repository, one thread per process.

    Args:
        arguments: A launcher, from `by_torch` or `by_accelerate`, and its program.
        environment: Variables that this launch needs beside those of the tests.

    Returns:
        What it wrote to stderr.
    """
    defaults = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", *arguments],
        env=os.environ | defaults | dict(environment or {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


def recipe(folder: Path, run: Run, name: str) -> RecipeConfig:
    """Give the recipe of a run."""
    return RecipeConfig(
        name=run.folder or name,
        runs_dir=str(folder),
        target=TargetConfig(name_or_path="tiny"),
        drafter=DrafterSettings(mask_token_id=MASK_TOKEN_ID),
        training=TrainingConfig(
            max_steps=run.max_steps,
            num_anchors=4,
            pack_tokens=run.pack_tokens,
            accumulation_steps=run.accumulation_steps,
            ema_decay=run.ema_decay,
            validate_every=run.max_steps,
            save_every=2,
            log_every=1,
        ),
        loss=LossConfig(weighting=run.weighting),
        optim=OptimConfig(lr=3e-3),
        launch=run.launch,
    )


def fit(folder: Path, run: Run, name: str) -> None:
    """Run to the end, or to what `stop` raises, and keep the weights of this rank."""
    config = recipe(folder, run, name)
    accelerator = build_accelerator(config.launch)
    target, store = tiny_target(dtype=run.dtype), FeatureStore.open(folder / run.split)
    trainer = Trainer(
        config,
        accelerator=accelerator,
        drafter=tiny_drafter(target, dtype=run.dtype, **VARIANTS[run.variant]),
        head=target.head,
        train=store,
        validation=store,
        run_dir=config.run_dir,
    )
    if run.stop is not None:
        call_before_steps(trainer, run.stop)
    try:
        trainer.fit()
        drafter = trainer.deployable
        save_checkpoint(drafter, folder / f"{name}-rank-{accelerator.process_index}")
    except (PowerCutError, KeyboardInterrupt) as stopped:
        (folder / f"{name}-stopped-{accelerator.process_index}").write_text(repr(stopped))
    finally:
        accelerator.free_memory()


def call_before_steps(trainer: Trainer, stop: Callable[[Trainer], None]) -> None:
    """Call `stop` before each optimiser step of this trainer."""
    train_step = trainer.train_step

    def stopping(window: list[Pack]) -> StepResult:
        stop(trainer)
        return train_step(window)

    trainer.train_step = stopping


def losses(folder: Path, name: str) -> list[float]:
    """Read the loss of each step from a run's metrics."""
    lines = (folder / name / "metrics.jsonl").read_bytes().splitlines()
    return [line["loss"] for line in map(orjson.loads, lines) if "loss" in line]


def even_rows(rows: list, num_tokens: int = ROW_TOKENS) -> list:
    """Cut rows to one length, so that packs of 1, 2 and 4 rows hold the same ones in order."""
    return [
        replace(
            row,
            input_ids=row.input_ids[:num_tokens],
            loss_mask=row.loss_mask[:num_tokens],
            features=row.features[:num_tokens],
        )
        for row in rows
    ]


def main(folder: str, *names: str) -> None:
    """Fit the named runs, one after the other."""
    for name in names:
        fit(Path(folder), RUNS[name], name)
    build_accelerator(RUNS[names[0]].launch).end_training()  # gloo aborts a process without it


if __name__ == "__main__":
    main(*sys.argv[1:])
