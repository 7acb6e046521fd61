"""The pictures of a report, as SVG that stands inside the page.

Drawn by matplotlib without pyplot and without any outside reference; text stays text and takes
the page's own typeface.
"""

import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

Findings = dict[str, Any]

DRAFTER, LOOKUP, FOREIGN = "#1f5fbf", "#c2621a", "#8a929e"
INK, MUTED, RULE = "#1c2430", "#5f6b7a", "#dfe3e8"
WAY_NAMES = {
    "transformers": "Transformers",
    "width_one": "this decoder, plain",
    "prompt_lookup": "prompt lookup",
    "drafter": "drafter",
}
"""What the ways of decoding live are called, in pictures and tables."""
STYLE: dict[Any, Any] = {  # its keys are a Literal of every rcParam
    "svg.fonttype": "none",
    "svg.hashsalt": "dflash-train",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def draw(findings: Findings) -> dict[str, str]:
    """Draw every picture that has data, as SVG by name."""
    with matplotlib.rc_context(STYLE):
        pictures = {
            "lengths": draw_lengths(findings),
            "positions": draw_positions(findings),
            "histogram": draw_histogram(findings),
        }
        if findings["training"] is not None and findings["training"]["loss"]:
            pictures["training"] = draw_training(findings)
        if findings["speed"]["speed_up"] is not None:
            pictures["time"] = draw_time(findings)
        if findings["concurrency"] is not None:
            pictures["concurrency"] = draw_concurrency(findings["concurrency"])
    return pictures


def draw_lengths(findings: Findings) -> str:
    """Draw acceptance length with its interval: all traffic, each tenant, each evaluation set."""
    rows = [("all traffic", findings), *((each["label"], each) for each in findings["slices"])]
    rows += [(each["title"], each) for each in findings["eval_sets"].values()]
    rows = [(label, row) for label, row in rows if row["acceptance_length"] is not None]
    figure, axes = _new_figure(width=10.4, height=0.9 + 0.55 * len(rows))
    for place, (_, row) in enumerate(rows):
        _mark(axes, row["acceptance_length"], place - 0.17, color=DRAFTER, marker="o", size=8)
        for name, color, marker, shift in (
            ("prompt_lookup", LOOKUP, "D", 0.08),
            ("foreign_features", FOREIGN, "s", 0.29),
        ):
            other = row.get(name)
            if other is not None:
                _mark(axes, other["acceptance_length"], place + shift, color=color, marker=marker)
    axes.axhline(0.5, color=RULE, linewidth=1.2)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("tokens committed per verify step (pooled, 95 % interval)")
    axes.set_xlim(left=min(0.95, axes.get_xlim()[0]))
    for label, color, marker in (
        ("drafter", DRAFTER, "o"),
        ("prompt lookup", LOOKUP, "D"),
        ("drafter, features of another request", FOREIGN, "s"),
    ):
        axes.plot([], [], color=color, marker=marker, linestyle="none", label=label)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, handletextpad=0.2)
    return _to_svg(figure)


def draw_positions(findings: Findings) -> str:
    """Draw joint and conditional acceptance by the draft's place after the anchor."""
    positions = findings["positions"]
    places = range(1, len(positions["joint"]) + 1)
    figure, axes = _new_figure(width=5.1, height=3.1)
    for name, color, marker, style in (
        ("conditional", LOOKUP, "D", "--"),
        ("joint", DRAFTER, "o", "-"),
    ):
        points = [
            (place, y) for place, y in zip(places, positions[name], strict=True) if y is not None
        ]
        axes.plot(
            [place for place, _ in points],
            [y for _, y in points],
            color=color,
            marker=marker,
            markersize=5,
            linestyle=style,
            clip_on=False,
            label="kept, once the draft before is kept" if name == "conditional" else "kept",
        )
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_xticks(list(places))
    axes.set_xlabel("draft, counted from the anchor")
    axes.set_ylabel("share of steps")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, handletextpad=0.5)
    return _to_svg(figure)


def draw_histogram(findings: Findings) -> str:
    """Draw the share of steps by tokens committed."""
    counts = findings["steps_by_length"]
    total = sum(counts)
    figure, axes = _new_figure(width=5.1, height=3.1)
    lengths = range(1, len(counts) + 1)
    bars = axes.bar(lengths, [count / total for count in counts], color=DRAFTER, width=0.72)
    axes.bar_label(bars, [_percent(count, total) for count in counts], color=MUTED, padding=2)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_ylim(0, max(counts) / total * 1.14)
    axes.set_xticks(list(lengths))
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("tokens per step")
    axes.set_ylabel("share of steps")
    return _to_svg(figure)


def _percent(count: int, total: int) -> str:
    """Round to whole percents, but never something down to nothing."""
    return "<1%" if 0 < count < 0.005 * total else f"{count / total:.0%}"


def draw_training(findings: Findings) -> str:
    """Draw loss above validation acceptance length, on one axis of steps."""
    training = findings["training"]
    figure = Figure(figsize=(5.1, 3.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    loss, validation = training["loss"], training["validation"]
    steps = [point["step"] for point in loss]
    above.plot(steps, [point["loss"] for point in loss], color=DRAFTER)
    above.set_ylabel("loss")
    below.plot(
        [point["step"] for point in validation],
        [point["acceptance_length"] for point in validation],
        color=DRAFTER,
        marker="o",
        markersize=4,
    )
    below.set_ylabel("tokens per step")
    below.set_xlabel("optimiser step (below: replay of validation answers)")
    for axes in (above, below):
        axes.yaxis.set_major_locator(MaxNLocator(4))
    return _to_svg(figure)


def draw_time(findings: Findings) -> str:
    """Draw the milliseconds of an output token in each way of decoding, by what they went to."""
    ways = {
        way: each
        for way, each in findings["speed"]["ways"].items()
        if each["seconds_per_token"] is not None
    }
    figure, axes = _new_figure(width=5.1, height=1.5 + 0.42 * len(ways))
    colors = {"draft": LOOKUP, "verify": DRAFTER, "bookkeeping": INK}
    left = [0.0] * len(ways)
    for part, color in colors.items():
        values = [1000 * each["seconds_per_token"][part] for each in ways.values()]
        label = {"verify": "target pass"}.get(part, part)
        axes.barh(range(len(ways)), values, left=left, color=color, height=0.55, label=label)
        left = [before + value for before, value in zip(left, values, strict=True)]
    for place, total in enumerate(left):
        axes.annotate(
            f"{total:.1f}",
            (total, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
        )
    axes.set_yticks(range(len(ways)), [WAY_NAMES[way] for way in ways])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    axes.set_xlim(right=1.13 * max(left))
    axes.set_xlabel("milliseconds per output token")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.02, 1.0), ncols=3, handlelength=0.9, columnspacing=1.2
    )
    return _to_svg(figure)


def draw_concurrency(found: Findings) -> str:
    """Draw the speed-up against requests at once, and the line below which nothing is gained."""
    figure, axes = _new_figure(width=5.1, height=3.1)
    points = found["points"]
    places = [point["concurrency"] for point in points]
    axes.axhline(1, color=FOREIGN, linewidth=1.4, linestyle="--")
    axes.plot(places, [point["speed_up"] for point in points], color=DRAFTER, marker="o",
              markersize=5, clip_on=False)  # fmt: skip
    for point in points:
        axes.annotate(
            f"{point['speed_up']:.2f}",
            (point["concurrency"], point["speed_up"]),
            xytext=(0, 7 if point["speed_up"] >= 1 else -15),  # clear of the line at 1
            textcoords="offset points",
            ha="center",
            fontweight="bold",
            color=DRAFTER,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.minorticks_off()
    axes.set_ylim(0, 1.2 * max(1.0, *(point["speed_up"] for point in points)))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.set_xlabel("requests at once")
    axes.set_ylabel("speed-up")
    return _to_svg(figure)


def _new_figure(*, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _mark(
    axes: Axes, found: Findings, place: float, *, color: str, marker: str, size: float = 5
) -> None:
    """Put a mean and its interval on the line at `place`."""
    axes.plot(found["interval"], [place, place], color=color, linewidth=2, solid_capstyle="round")
    axes.plot([found["pooled"]], [place], marker=marker, markersize=size, color=color)
    if marker == "o":
        axes.annotate(
            f"{found['pooled']:.2f}",
            (found["interval"][1], place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold",
            color=color,
        )


def _to_svg(figure: Figure) -> str:
    """Give the bare `<svg>` element: no prolog, no metadata, no name-space addresses."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
