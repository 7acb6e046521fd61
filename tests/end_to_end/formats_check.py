"""Does every package load what we export, and do we read what it saves?

    make formats-check                                  # installs the packages beside ours
    make formats-check CHECKPOINT=DIR TARGET=NAME       # and a trained drafter of yours

Drafters of each kind, tiny and random (and the trained ones given), are exported to both layouts,
loaded with `dflash` 0.1.0 and `speculators` 0.9.0 and asked for the same blocks as ours (float32,
CPU). A sliding drafter is asked up to its window; beyond it, `speculators` must differ from us by
exactly the rule of its training. Then drafters that `dflash`, `speculators` and `specforge` 0.2.0
made and saved are read, written back and compared bit by bit.

Prints the table of conversions, with what each cannot hold, and ends in one line of JSON. Exits 1
if a conversion failed that should not, or passed that should not.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import torch
from formats_readers import (
    Answer,
    Question,
    dflash_answer,
    ours,
    ours_as_speculators_trains,
    save_with_dflash,
    save_with_specforge,
    save_with_speculators,
    speculators_answer,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dflash_train.config import TargetConfig
from dflash_train.drafter.checkpoint import read_tensors
from dflash_train.drafter.config import FULL, SLIDING, DrafterConfig
from dflash_train.drafter.model import Drafter
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.release.formats import Format, read_drafter, write_drafter
from dflash_train.release.formats.audit import tensor_differences
from dflash_train.stages.drafters import import_drafter, target_facts, target_head
from dflash_train.testing import LIMITS, VARIANTS, save_tiny_target, tiny_drafter, tiny_target

LIMIT = LIMITS[torch.float32][0]
WINDOW = 24
"""Tokens; the tiny sliding drafters are asked about sequences shorter and longer than that."""
KINDS: dict[str, dict[str, Any]] = {
    "DFlash": {},
    "DFlash 2": VARIANTS["dflash2"],
    "sliding, causal": {"layer_types": [SLIDING] * 2, "sliding_window": WINDOW},
    "sliding, both ways": {
        "layer_types": [SLIDING] * 2, "sliding_window": WINDOW, "is_causal": False,
    },
    "sliding below full": VARIANTS["mixed"] | {"sliding_window": WINDOW},
    "causal": VARIANTS["causal"],
    "scaled": VARIANTS["scaled"],
    "DSpark": VARIANTS["dspark"],
    "DSpark, gated": VARIANTS["dspark_gated"],
    "reduced vocabulary": VARIANTS["reduced"],
}  # fmt: skip
REFUSED = {
    Format.zlab: ("DSpark, gated", "reduced vocabulary"),
    Format.speculators: ("sliding below full", "causal", "scaled"),
}
PACKAGES = {Format.zlab: "dflash 0.1.0", Format.speculators: "speculators 0.9.0"}
NOT_IN_DFLASH = ("DSpark",)
"""Kinds that the layout holds for vLLM, and `dflash` 0.1.0 has no class for."""


@dataclass(kw_only=True)
class Row:
    """One conversion and what came of it."""

    drafter: str
    road: str
    result: str
    passed: bool
    error: float | None = None
    """Largest relative RMS difference to ours; None where nothing was computed."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all conversions of one target share."""

    target: dict[str, Any]
    head: FrozenHead
    folder: Path


def export_rows(name: str, drafter: Drafter, bench: Bench) -> Iterator[Row]:
    """Export one drafter to both layouts and have it loaded."""
    config = drafter.config
    for format, package in PACKAGES.items():
        question = Question.random(config, bench.head, _anchors(config, format))
        road = f"ours -> {format.value} -> {package}"
        folder = bench.folder / "export" / format.value
        must_refuse = name in REFUSED[format]
        try:
            written = write_drafter(
                drafter, folder, format=format, target=bench.target, head=bench.head
            )
        except ValueError as error:
            yield Row(drafter=name, road=road, result=f"refused: {error}", passed=must_refuse)
            continue
        if format is Format.zlab and config.is_shifted:
            result = f"{written.num_tensors} tensors; {' '.join(written.remarks)}"
            yield Row(drafter=name, road=road, result=result, passed=name in NOT_IN_DFLASH)
            continue
        answer = _ask(folder, format, question, config)
        error = _difference(answer.hidden, ours(drafter, question))
        same = answer.settings == _settings(config)
        told = "equal" if same else f"but settings {answer.settings}"
        yield Row(
            drafter=name,
            road=road,
            result=f"{written.num_tensors} tensors, blocks at {question.anchors}, {told}",
            passed=error <= LIMIT and same and not must_refuse,
            error=error,
        )


def _ask(folder: Path, format: Format, question: Question, config: DrafterConfig) -> Answer:
    if format is Format.speculators:
        return speculators_answer(folder, question)
    return dflash_answer(folder, question, config)


def _settings(config: DrafterConfig) -> dict[str, Any]:
    """Give what every reader must take from the file."""
    return {
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": config.target_layer_ids,
        "layer_types": config.layer_types or [FULL] * config.num_hidden_layers,
    }


def window_row(drafter: Drafter, bench: Bench) -> Row:
    """Ask past the window: speculators must show slot k exactly k + 1 more tokens than we do."""
    config = replace(drafter.config, num_hidden_layers=1, layer_types=[SLIDING])
    torch.manual_seed(3)
    single = Drafter(config).eval()
    question = Question.random(config, bench.head, [3 * WINDOW, 5 * WINDOW])
    folder = bench.folder / "export" / "window"
    write_drafter(single, folder, format=Format.speculators, target=bench.target)
    found = speculators_answer(folder, question).hidden
    error = _difference(found, ours_as_speculators_trains(single, question))
    apart = _difference(found, ours(single, question))
    return Row(
        drafter="sliding, causal",
        road="past the window -> speculators 0.9.0",
        result=f"differs from ours by {apart:.0e}, and by its own rule (k + 1 older tokens) not",
        passed=error <= LIMIT < apart,
        error=error,
    )


def import_rows(bench: Bench) -> Iterator[Row]:
    """Read what others made, write it back, and have them load both."""
    for name, content in _foreign_configs().items():
        folder = bench.folder / "theirs" / name
        save = save_with_specforge if name.startswith("specforge") else save_with_dflash
        theirs = save(content, folder)
        yield _there_and_back(name, theirs, bench)
    for name in ("DFlash", "DFlash 2", "sliding, causal", "sliding, both ways", "DSpark",
                 "reduced vocabulary"):  # fmt: skip
        source = bench.folder / "theirs" / "source"
        drafter = tiny_drafter(tiny_target(), **KINDS[name])
        write_drafter(
            drafter, source, format=Format.speculators, target=bench.target, head=bench.head
        )
        theirs = save_with_speculators(source, bench.folder / "theirs" / f"speculators, {name}")
        yield _there_and_back(theirs.name, theirs, bench)


def _there_and_back(name: str, theirs: Path, bench: Bench) -> Row:
    imported = read_drafter(theirs, target=bench.target, head=bench.head)
    config = imported.drafter.config
    kind = Format.speculators if imported.format is Format.speculators else Format.zlab
    back = bench.folder / "back"
    write_drafter(imported.drafter, back, format=kind, metadata=imported.metadata, head=bench.head)
    wrong = tensor_differences(_canonical(read_tensors(back)), _canonical(read_tensors(theirs)))
    question = Question.random(config, bench.head, _anchors(config, kind))
    before, after = (_ask(each, kind, question, config) for each in (theirs, back))
    error = _difference(ours(imported.drafter.float(), question), before.hidden)
    same = (
        torch.equal(before.hidden, after.hidden)
        and before.settings == after.settings == _settings(config)
        and not wrong
    )
    result = f"{imported.format.value}: tensors, settings and answers identical"
    return Row(
        drafter=name,
        road="theirs -> ours -> theirs",
        result=result if same else f"differs: {before.settings}, {after.settings}, {wrong[:3]}",
        passed=same and error <= LIMIT,
        error=error,
    )


def _canonical(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename what z-lab's own class saves under another name than its released files have."""
    return {name.replace("_codebook.weight", "_codebook"): t for name, t in tensors.items()}


def _foreign_configs() -> dict[str, dict[str, Any]]:
    """Give configurations as the packages' users write them: some keys at one place only."""
    shapes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 260,
        "max_position_embeddings": 512, "num_target_layers": 6, "block_size": 4,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    }  # fmt: skip
    ids = {"mask_token_id": 3, "target_layer_ids": [3, 1]}
    slides = {
        "layer_types": [SLIDING, FULL], "use_sliding_window": True,
        "sliding_window": WINDOW, "max_window_layers": 2,
    }  # fmt: skip
    plain = {"architectures": ["DFlashDraftModel"], **shapes}
    selector = {**ids, "block_size": 4, **VARIANTS["dflash2"]}
    return {
        "dflash, DFlash": plain | {"dflash_config": ids},
        "dflash, sliding": plain | slides | {"dflash_config": ids | {"block_size": 4}},
        "dflash, DFlash 2": plain
        | {"architectures": ["DFlash2DraftModel"], "dflash_config": selector},
        "specforge, DFlash": plain | {"dflash_config": ids},
        "specforge, sliding": plain | slides | {"dflash_config": ids},
    }


def _anchors(config: DrafterConfig, format: Format) -> list[int]:
    """Choose anchors, past any window; for speculators, blocks that end inside it."""
    window, last = config.sliding_window or 0, 40
    if format is Format.zlab:
        last += window
    elif window:
        last = window - config.block_size
    return [1, last // 2, last]


def _difference(got: Tensor, want: Tensor) -> float:
    error = (got - want).double().square().mean().sqrt() / want.double().square().mean().sqrt()
    return float(error) if torch.isfinite(error) else float("inf")


def check(checkpoints: Iterable[Path], target: str | None, folder: Path) -> Iterator[Row]:
    """Run every conversion."""
    tiny = TargetConfig(name_or_path=str(save_tiny_target(folder / "target")))
    bench = Bench(target=target_facts(tiny), head=target_head(tiny), folder=folder)
    drafters = {name: tiny_drafter(tiny_target(), **kind) for name, kind in KINDS.items()}
    for name, drafter in drafters.items():
        yield from export_rows(name, drafter, bench)
    yield window_row(drafters["sliding, causal"], bench)
    yield from import_rows(bench)
    for path in checkpoints:
        real = TargetConfig(name_or_path=str(target))
        bench = Bench(target=target_facts(real), head=target_head(real), folder=folder)
        drafter = import_drafter(path, real).drafter
        for row in export_rows(_kind_of(drafter.config), drafter, bench):
            yield replace(row, drafter=f"trained: {row.drafter}")


def _kind_of(config: DrafterConfig) -> str:
    """Name a trained drafter's kind, which says what must be refused."""
    causal = {each.is_causal for each in config.layer_visibility()}
    if config.is_dflash2:
        return "DFlash 2"
    if config.is_shifted:
        return "DSpark, gated" if config.markov_gated else "DSpark"
    if config.draft_vocab_size is not None:
        return "reduced vocabulary"
    if config.sliding_window is None:
        return "causal" if True in causal else "DFlash"
    return "sliding below full" if len(causal) > 1 else "sliding, causal"


def main() -> int:
    """Print the table and the verdict."""
    parser = argparse.ArgumentParser(description="Load our exports elsewhere, and theirs here.")
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[], help="trained drafters")
    parser.add_argument("--target", help="target.name_or_path of the trained drafters")
    parsed = parser.parse_args()
    if parsed.checkpoint and not parsed.target:
        parser.error("--checkpoint needs --target")
    table = Table("drafter", "conversion", "result", "difference", "")
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(check(parsed.checkpoint, parsed.target, Path(scratch)))
    for row in rows:
        error = "" if row.error is None else f"{row.error:.0e}"
        table.add_row(row.drafter, row.road, row.result, error, "" if row.passed else "FAILED")
    Console(width=160).print(table)
    errors = [row.error for row in rows if row.error is not None]
    figures = {
        "conversions": len(rows),
        "computed": len(errors),
        "refused": sum(row.result.startswith("refused") for row in rows),
        "failed": sum(not row.passed for row in rows),
        "largest_difference": float(f"{max(errors):.1e}"),
        "passed": all(row.passed for row in rows),
    }
    print(orjson.dumps(figures).decode())
    return 0 if figures["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
