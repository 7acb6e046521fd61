"""One optimiser step of ours beside the plain twin, speculators 0.9.0 and SpecForge 0.2.0.

All train the same weights on the same blocks at SmolLM2's shapes, on this machine's CPU in float32,
each in its own process and in its fastest setting, which a trial finds first: the precision of
float32 products for everyone, attention and chunk size for the rivals. Then all are measured in
turns. Nothing else may run meanwhile. Run by `make bench-train`; the last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path

import torch

from benchmarks.bench_case import Shapes, build_case
from benchmarks.bench_losses import compare_losses, loss_table
from benchmarks.bench_measure import describe_machine

ROOT = Path(__file__).resolve().parents[1]
OPTIONS: dict[str, dict[str, list[str]]] = {
    "ours": {"precision": ["highest", "medium"]},
    "twin": {"precision": ["highest", "medium"]},
    "speculators": {"precision": ["highest", "medium"], "attention": ["sdpa", "eager"]},
    "specforge": {
        "precision": ["highest", "medium"],
        "attention": ["sdpa", "eager"],
        "chunk-blocks": ["128", "0", "16"],
    },
}
"""Settings of each contender; the first value of each is where the trial starts."""

Setting = dict[str, str]


@dataclass(kw_only=True)
class Measurement:
    """Steps of one contender in one setting; medians."""

    setting: Setting
    seconds: float
    growth_mib: float
    loss: float
    """Loss of the first step, from the shared weights."""


class Bench:
    """Starts contenders in processes of their own."""

    def __init__(self, *, rivals: Path, shapes: str, threads: int, folder: Path) -> None:
        """Remember where rivals are installed and what all processes share.

        Args:
            rivals: Folder with `speculators` and `specforge`, one installed tree each.
            shapes: JSON that replaces fields of `Shapes`.
            threads: Threads of every process.
            folder: Place for the cross entropies per slot.
        """
        self.rivals, self.shapes, self.threads, self.folder = rivals, shapes, threads, folder

    def run(
        self, contender: str, setting: Setting, *, steps: int, keeps_slots: bool = False
    ) -> list[Measurement]:
        """Measure steps one by one.

        Raises:
            RuntimeError: The process failed; its own message is in this one.
        """
        command = [sys.executable, "-m", "benchmarks.bench_worker", "--contender", contender]
        command += ["--steps", str(steps), "--threads", str(self.threads), "--shapes", self.shapes]
        command += [word for key, value in setting.items() for word in (f"--{key}", value)]
        if keeps_slots:
            command += ["--slot-losses", str(self.slots_path(contender))]
        done = subprocess.run(
            command, cwd=ROOT, env=self._environment(contender), capture_output=True, text=True
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            raise RuntimeError(f"{contender} {describe(setting)}: {last}")
        result = json.loads(done.stdout.splitlines()[-1])
        return [
            Measurement(
                setting=setting,
                seconds=seconds,
                growth_mib=result["growth_mib"],
                loss=result["loss"],
            )
            for seconds in result["seconds"]
        ]

    def slots_path(self, contender: str) -> Path:
        """Give the file of a contender's cross entropies per slot."""
        return self.folder / f"{contender}.pt"

    def _environment(self, contender: str) -> dict[str, str]:
        places = [str(self.rivals / contender), os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(place for place in places if place)
        return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(self.threads)}


def try_settings(bench: Bench, contender: str) -> list[Measurement]:
    """Try one option after the other, each from the fastest setting so far, one step each.

    A setting that does not fit in memory is reported and left out.
    """
    options = OPTIONS[contender]
    first = {name: values[0] for name, values in options.items()}
    tried = bench.run(contender, first, steps=1, keeps_slots=True)
    for name, values in options.items():
        start = fastest(tried).setting
        for value in values[1:]:
            try:
                tried += bench.run(contender, start | {name: value}, steps=1)
            except RuntimeError as error:
                say(f"  left out: {error}")
    for trial in tried:
        say(f"  {contender:12} {describe(trial.setting):44} {trial.seconds:7.2f} s")
    return tried


def measure(
    bench: Bench, settings: dict[str, Setting], *, rounds: int, steps: int
) -> dict[str, Measurement]:
    """Measure all contenders in turns, so that a slow minute of the machine hits everyone."""
    seen: dict[str, list[Measurement]] = {contender: [] for contender in settings}
    for number in range(rounds):
        for contender, setting in settings.items():
            seen[contender] += bench.run(contender, setting, steps=steps)
            say(f"  round {number + 1}: {contender:12} {seen[contender][-1].seconds:7.2f} s")
    return {
        contender: Measurement(
            setting=settings[contender],
            seconds=statistics.median(each.seconds for each in measurements),
            growth_mib=statistics.median(each.growth_mib for each in measurements),
            loss=measurements[0].loss,
        )
        for contender, measurements in seen.items()
    }


def summarise(
    results: dict[str, Measurement], trials: dict[str, list[Measurement]], *, block_tokens: int
) -> dict[str, object]:
    """Give the ratios of the final line and a row per contender.

    `memory_ratio` is over the leanest rival in its fastest setting, as the speed is;
    `memory_ratio_any_setting` over the leanest setting that the trial saw, however slow.
    """
    ours = results["ours"]
    rivals = [result for name, result in results.items() if name != "ours"]
    tried = [trial for name, each in trials.items() if name != "ours" for trial in each]
    return {
        "bench": "train",
        "speed_ratio": round(fastest(rivals).seconds / ours.seconds, 3),
        "memory_ratio": round(ours.growth_mib / min(each.growth_mib for each in rivals), 3),
        "memory_ratio_any_setting": round(
            ours.growth_mib / min(each.growth_mib for each in [*rivals, *tried]), 3
        ),
        "contenders": {
            name: asdict(result) | {"block_tokens_per_s": round(block_tokens / result.seconds, 1)}
            for name, result in results.items()
        },
        "trials": {name: [asdict(trial) for trial in each] for name, each in trials.items()},
    }


def fastest(measurements: list[Measurement]) -> Measurement:
    """Give the one with the shortest step."""
    return min(measurements, key=lambda each: each.seconds)


def describe(setting: Setting) -> str:
    """Write a setting on one line."""
    return " ".join(f"{key}={value}" for key, value in setting.items())


def rival_versions(rivals: Path) -> dict[str, str]:
    """Read the versions of the installed rivals."""
    return {
        name: next(d.version for d in distributions(path=[str(rivals / name)]) if d.name == name)
        for name in ("speculators", "specforge")
    }


def say(message: str) -> None:
    """Report progress."""
    print(message, file=sys.stderr, flush=True)


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rivals", type=Path, required=True, help="where the rivals are installed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--shapes", default="{}", help="JSON that replaces fields of Shapes")
    return parser.parse_args()


def main() -> None:
    """Try settings, measure in turns, explain the losses, print the JSON line."""
    arguments = read_arguments()
    load, started = os.getloadavg()[0], time.perf_counter()
    if load > 0.5:
        say(f"bench-train: the machine is busy (load {load:.1f}); these figures mean little")
    shapes = Shapes(**json.loads(arguments.shapes))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            rivals=arguments.rivals,
            shapes=arguments.shapes,
            threads=arguments.threads,
            folder=Path(folder),
        )
        say("trial: one step in each setting")
        trials = {contender: try_settings(bench, contender) for contender in OPTIONS}
        settings = {contender: fastest(trials[contender]).setting for contender in OPTIONS}
        results = measure(bench, settings, rounds=arguments.rounds, steps=arguments.steps)
        slots = {contender: torch.load(bench.slots_path(contender)) for contender in OPTIONS}
    losses = {contender: tried[0].loss for contender, tried in trials.items()}
    compared = compare_losses(build_case(shapes), losses=losses, slots=slots)
    summary = summarise(results, trials, block_tokens=shapes.num_blocks * shapes.block_size)
    print(result_table(results), loss_table(compared), sep="\n\n", end="\n\n")
    about = describe_machine(arguments.threads) | {"rivals": rival_versions(arguments.rivals)}
    about |= {"load_before": load, "wall_s": round(time.perf_counter() - started)}
    explained = {name: asdict(row) for name, row in compared.items()}
    print(json.dumps(summary | {"losses": explained, "shapes": asdict(shapes)} | about))


def result_table(results: dict[str, Measurement]) -> str:
    """Give the measured contenders as lines of text."""
    lines = ["contender     s/step  growth MiB  fastest setting"]
    lines += [
        f"{name:12} {each.seconds:7.2f}  {each.growth_mib:10.0f}  {describe(each.setting)}"
        for name, each in results.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
