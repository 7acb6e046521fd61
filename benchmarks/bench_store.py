"""The feature store in float32, bfloat16 and float8_e4m3fn: acceptance length, size and speed.

    make bench-store
    python -m benchmarks.bench_store --run runs/smollm2 [--steps 400] [key=value ...]

The answered records of a finished run go through the stage `collect` once for each number format.
One drafter is replayed on the held-out rows of each store; then one drafter is trained on each, by
the run's recipe from the same seed, and replayed on the float32 rows, which are what a server feeds
it, and on those of its own store. Sizes are those of the files. Everything is kept in the folder
`bench-store` of the run, and an interrupted bench goes on. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_measure import describe_machine
from benchmarks.bench_runs import (
    config_of,
    load_before,
    markdown_table,
    take_over_answers,
    tell,
)
from benchmarks.store_reading import ReadingSpeed, Size, reading_speeds, size_of
from benchmarks.store_replay import (
    Comparison,
    compare,
    for_steps,
    replay_store,
    train_on_store,
)
from benchmarks.tiny_run import write_tiny_run
from dflash_train.config import FeaturesDtype, RecipeConfig
from dflash_train.features.shard import bytes_per_token
from dflash_train.stages.walk import run_stage
from dflash_train.stages.workshop import Workshop
from dflash_train.training.accelerator import threads_per_process

BENCH = "bench-store"
GOALS = {"replay_difference": 0.01, "trained_low": -0.03, "random_of_sequential": 0.5}
"""At most so far from float32 in replay; lower ends of the paired intervals above; at least."""
DTYPES = tuple(each.value for each in FeaturesDtype)
PLAIN = FeaturesDtype.float32.value
"""The store that the others are measured by."""
SPLITS = ["train", "validation", "test"]
HELD_OUT = "test"


@dataclass(kw_only=True)
class Sizes:
    """How much is done."""

    num_steps: int
    """Of each training."""
    num_rounds: int
    """Passes of each kind over each store."""


@dataclass(kw_only=True)
class StoreFigures:
    """What was measured of the store of one number format."""

    size: Size
    formula: int
    """Bytes per token by `bytes_per_token`."""
    replayed: Comparison
    """The given drafter on this store's rows, by itself on the float32 ones."""
    trained_on_plain: Comparison
    """The drafter trained on this store, on float32 rows, by the one trained on float32."""
    trained_on_own: Comparison
    """The same drafter on this store's rows, by the same."""
    reading: ReadingSpeed


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    options = _options().parse_intermixed_args(arguments)
    load, began = load_before(BENCH), time.perf_counter()
    if options.smoke:
        with tempfile.TemporaryDirectory(prefix="bench-store-") as name:
            config = write_tiny_run(Path(name))
            sizes = Sizes(num_steps=2, num_rounds=2)
            figures = measure(config, config.run_dir / BENCH, sizes)
    else:
        config = config_of(options.run, options.overrides)
        config = replace(config, checkpoint=options.checkpoint or config.checkpoint)
        torch.set_num_threads(threads_per_process(config.launch))
        sizes = Sizes(num_steps=options.steps, num_rounds=options.rounds)
        figures = measure(config, options.folder or options.run / BENCH, sizes)
    print(table(figures))
    about = describe_machine(torch.get_num_threads()) | {"load_before": load}
    about |= {"wall_s": round(time.perf_counter() - began), "steps": sizes.num_steps}
    print(json.dumps(summary(figures) | about))


def measure(config: RecipeConfig, folder: Path, sizes: Sizes) -> dict[str, StoreFigures]:
    """Collect, replay, train and read; give the figures by number format.

    Args:
        config: The recipe of a finished run; its checkpoint is the one that is replayed.
        folder: Holds a run folder for each format; what is there already is not done again.
        sizes: How much is done.
    """
    given = Workshop(config)
    workshops = {dtype: _workshop(config, dtype, folder, sizes, given) for dtype in DTYPES}
    trained: dict[str, Path] = {}
    for dtype, workshop in workshops.items():
        tell(BENCH, f"{dtype}: collect")
        take_over_answers(config.run_dir, workshop.config.run_dir, SPLITS)
        run_stage(workshop, "collect")
    for dtype, workshop in workshops.items():
        tell(BENCH, f"{dtype}: train")
        trained[dtype] = train_on_store(workshop)
    features = {name: each.config.run_dir / "features" for name, each in workshops.items()}

    def replay(checkpoint: Path, dtype: str) -> Any:
        return replay_store(
            checkpoint, given.target.head, features[dtype], folder / "replays", split=HELD_OUT
        )

    tell(BENCH, "replay")
    base, trained_base = replay(given.checkpoint, PLAIN), replay(trained[PLAIN], PLAIN)
    settings = config.evaluate
    replayed = {dtype: compare(replay(given.checkpoint, dtype), base, settings) for dtype in DTYPES}
    on_plain = {
        dtype: compare(replay(trained[dtype], PLAIN), trained_base, settings) for dtype in DTYPES
    }
    on_own = {
        dtype: compare(replay(trained[dtype], dtype), trained_base, settings) for dtype in DTYPES
    }
    tell(BENCH, "read")
    rows = {dtype: folder / "train" for dtype, folder in features.items()}
    reading = reading_speeds(rows, num_rounds=sizes.num_rounds)
    return {
        dtype: StoreFigures(
            size=size_of(rows[dtype]),
            formula=_formula(given, dtype),
            replayed=replayed[dtype],
            trained_on_plain=on_plain[dtype],
            trained_on_own=on_own[dtype],
            reading=reading[dtype],
        )
        for dtype in DTYPES
    }


def summary(figures: dict[str, StoreFigures]) -> dict[str, Any]:
    """Give what the last line holds: figures, goals, and which goals are met."""
    trained = [
        comparison.relative_interval.low
        for dtype, each in figures.items()
        if dtype != PLAIN
        for comparison in (each.trained_on_plain, each.trained_on_own)
    ]
    found = {
        "replay_difference": max(abs(each.replayed.relative) for each in figures.values()),
        "trained_low": min(trained),
        "random_of_sequential": min(each.reading.ratio for each in figures.values()),
    }
    met = {
        "replay_difference": found["replay_difference"] <= GOALS["replay_difference"],
        "trained_low": found["trained_low"] > GOALS["trained_low"],
        "random_of_sequential": found["random_of_sequential"] >= GOALS["random_of_sequential"],
    }
    stores = {dtype: asdict(each) for dtype, each in figures.items()}
    return {"bench": "store"} | found | {"goals": GOALS, "met": met, "stores": stores}


def table(figures: dict[str, StoreFigures]) -> str:
    """Give one line for each store and kind of figure."""
    sizes = [
        [
            dtype, f"{each.size.bytes_per_token:.1f}", str(each.formula),
            f"{each.reading.sequential:.0f}", f"{each.reading.random:.0f}",
            f"{each.reading.ratio:.2f}",
        ]
        for dtype, each in figures.items()
    ]  # fmt: skip
    lengths = [
        [what, dtype, *_shown(comparison)]
        for dtype, each in figures.items()
        for what, comparison in (
            ("given drafter, own rows", each.replayed),
            ("trained here, float32 rows", each.trained_on_plain),
            ("trained here, own rows", each.trained_on_own),
        )
    ]
    head = ["store", "bytes/token", "formula", "in order tokens/s", "random", "ratio"]
    length_head = ["drafter", "store", "pooled", "95 %", "against float32", "95 %, paired"]
    return f"{markdown_table(head, sizes)}\n\n{markdown_table(length_head, sorted(lengths))}\n"


def _shown(comparison: Comparison) -> list[str]:
    own, relative = comparison.interval, comparison.relative_interval
    return [
        f"{comparison.pooled:.4f}",
        f"{own.low:.3f} .. {own.high:.3f}",
        f"{comparison.relative:+.2%}",
        f"{relative.low:+.2%} .. {relative.high:+.2%}",
    ]


def _workshop(
    config: RecipeConfig, dtype: str, folder: Path, sizes: Sizes, given: Workshop
) -> Workshop:
    """Give the recipe of one store's run, with the target that is loaded already."""
    data = replace(config.data, features_dtype=FeaturesDtype(dtype))
    own = replace(config, name=dtype, runs_dir=str(folder), checkpoint=None, data=data)
    workshop = Workshop(for_steps(own, sizes.num_steps))
    workshop.target = given.target
    return workshop


def _formula(given: Workshop, dtype: str) -> int:
    return bytes_per_token(
        given.target.features_width,
        dtype=getattr(torch, dtype),
        num_taps=len(given.target.target_layer_ids),
        teacher_top_k=given.config.data.teacher_top_k,
    )


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe=smollm2, ...")
    parser.add_argument("--run", type=Path, default=Path("runs/smollm2"), help="a finished run")
    parser.add_argument("--checkpoint", metavar="DIR", help="drafter to replay; the run's best")
    parser.add_argument("--steps", type=int, default=400, help="of each of the three trainings")
    parser.add_argument("--rounds", type=int, default=3, help="passes of each kind, reading")
    parser.add_argument("--folder", type=Path, help="where the stores go (RUN/bench-store)")
    parser.add_argument("--smoke", action="store_true", help="a tiny random target, in seconds")
    return parser


if __name__ == "__main__":
    main()
