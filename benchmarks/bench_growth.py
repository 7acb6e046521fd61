"""How time and memory of one step grow with T, A and V, one at a time from a base point.

One document of T tokens with A anchors, SmolLM2's shapes, K = 16. Logits of all slots would take
4*A*K*V bytes; they never exist, so memory may grow with what autograd keeps of the blocks, which is
A*K times the widths of the layers, and with nothing times V. Two corners show that: growth from one
slot more is the same for the smallest vocabulary as for the largest. Run by `make bench-growth`; it
draws docs/figures/growth.svg and ends in a line of JSON.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.bench_case import Shapes, build_case
from benchmarks.bench_measure import Stepper, describe_machine, kept_mib
from benchmarks.bench_ours import OurStep
from dflash_inference.figures import DRAFTER, FOREIGN, LOOKUP, STYLE

BASE = Shapes(num_documents=1, document_tokens=2048, anchors_per_document=128)
SWEEPS: dict[str, tuple[str, list[int]]] = {
    "T": ("document_tokens", [512, 1024, 2048, 4096, 8192]),
    "A": ("anchors_per_document", [64, 128, 256, 512, 1024]),
    "V": ("vocab_size", [8_192, 16_384, 32_768, 65_536, 151_936]),
}
CORNER_ANCHORS = 512
CORNER_VOCABULARIES = (8_192, 151_936)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One step of one size."""

    num_tokens: int
    num_anchors: int
    vocab_size: int
    seconds: float
    growth_mib: float
    """Growth of peak resident memory during the step."""
    kept_mib: float
    """What autograd keeps of the drafter for the backward pass."""
    logits_mib: float
    """What the logits of all slots would take."""


def measure_point(shapes: Shapes) -> Point:
    """Take one step for the clock and one for memory."""
    step = OurStep(build_case(shapes))
    stepper = Stepper(step)
    return Point(
        num_tokens=shapes.document_tokens,
        num_anchors=shapes.num_blocks,
        vocab_size=shapes.vocab_size,
        seconds=stepper.seconds(),
        growth_mib=stepper.growth_mib(),
        kept_mib=kept_mib(step.hidden, step.parameters),
        logits_mib=4 * shapes.num_blocks * shapes.block_size * shapes.vocab_size / 2**20,
    )


def measure_all(base: Shapes) -> dict[Shapes, Point]:
    """Measure every point of the sweeps and the corners once."""
    wanted = [replace(base, **{field: value}) for field, values in SWEEPS.values()
              for value in values]  # fmt: skip
    wanted += [corner(base, CORNER_ANCHORS, size) for size in CORNER_VOCABULARIES]
    measure_point(base)  # pays for what the libraries set up once
    found: dict[Shapes, Point] = {}
    for shapes in dict.fromkeys(wanted):
        found[shapes] = point = measure_point(shapes)
        print(
            f"  T={point.num_tokens:5} A={point.num_anchors:5} V={point.vocab_size:7}"
            f" {point.seconds:7.2f} s {point.growth_mib:7.0f} MiB, kept {point.kept_mib:.0f}",
            file=sys.stderr,
            flush=True,
        )
    return found


def corner(base: Shapes, num_anchors: int, vocab_size: int) -> Shapes:
    """Give the base with another number of anchors and another vocabulary."""
    return replace(base, anchors_per_document=num_anchors, vocab_size=vocab_size)


def growth_per_slot(base: Shapes, found: dict[Shapes, Point]) -> dict[str, float]:
    """Give the KiB that one slot more costs, by vocabulary, and what its logits would take."""
    fewer = base.anchors_per_document
    slots = (CORNER_ANCHORS - fewer) * base.block_size
    per_slot: dict[str, float] = {}
    for size in CORNER_VOCABULARIES:
        many = found[corner(base, CORNER_ANCHORS, size)]
        few = found[corner(base, fewer, size)]
        per_slot[f"V={size}"] = round(1024 * (many.growth_mib - few.growth_mib) / slots, 1)
        per_slot[f"V={size}, kept"] = round(1024 * (many.kept_mib - few.kept_mib) / slots, 1)
        per_slot[f"V={size}, its logits"] = size * 4 / 1024
    return per_slot


def draw(base: Shapes, found: dict[Shapes, Point], path: Path) -> None:
    """Draw time above memory, one column per sweep."""
    with matplotlib.rc_context({**STYLE, "figure.facecolor": "white"}):
        figure = Figure(figsize=(10.4, 5.4), layout="constrained")
        panels = figure.subplots(2, len(SWEEPS), sharey="row", squeeze=False)
        for column, (letter, (field, values)) in enumerate(SWEEPS.items()):
            points = [found[replace(base, **{field: value})] for value in values]
            above, below = panels[0, column], panels[1, column]
            above.plot(values, [point.seconds for point in points], color=DRAFTER, marker="o")
            _draw_memory(below, values, points)
            for axes in (above, below):
                axes.set_xscale("log", base=2)
                axes.set_yscale("log", base=2)
                axes.set_xticks(values, [f"{value:,}" for value in values], rotation=30)
                axes.minorticks_off()
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            below.set_xlabel(f"{letter}, {field.replace('_', ' ')}")
        panels[0, 0].set_ylabel("seconds per step")
        panels[1, 0].set_ylabel("MiB")
        figure.legend(*panels[1, 0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def _draw_memory(axes: Axes, values: list[int], points: list[Point]) -> None:
    axes.plot(
        values, [point.logits_mib for point in points], color=FOREIGN, linestyle=":",
        label="logits of all slots (never made)",
    )  # fmt: skip
    axes.plot(
        values, [point.growth_mib for point in points], color=DRAFTER, marker="o",
        label="growth of peak memory",
    )  # fmt: skip
    axes.plot(
        values, [point.kept_mib for point in points], color=LOOKUP, linestyle="--",
        label="of it kept for the backward pass",
    )  # fmt: skip


def main() -> None:
    """Measure, draw, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/growth.svg"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--precision", default="medium", help="as launch.mixed_precision=bf16 does")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision(arguments.precision)
    found = measure_all(BASE)
    draw(BASE, found, arguments.figure)
    summary = {
        "bench": "growth",
        "base": asdict(BASE),
        "kib_per_slot": growth_per_slot(BASE, found),
        "points": [asdict(point) for point in found.values()],
        "precision": arguments.precision,
        "figure": str(arguments.figure),
    }
    print(json.dumps(summary | describe_machine(arguments.threads)))


if __name__ == "__main__":
    main()
