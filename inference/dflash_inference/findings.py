"""From the files of a run to the figures of its report: everything that `report.json` holds.

Nothing is computed anywhere else: the Markdown, the page and the last lines on screen all show
what this module found. Every figure comes from traces and manifests, so a report can be made
again without target or drafter.
"""

from pathlib import Path

import orjson

from dflash_inference.eval_sets import eval_set
from dflash_inference.live_check import LIVE_CHECK_FILE, LiveCheck, read_checks
from dflash_inference.report_file import REPORT_FORMAT, REPORT_VERSION
from dflash_inference.request_rows import rows_of, to_columns
from dflash_inference.serving_costs import (
    predict_speed,
    read_concurrency,
    read_cost_table,
    summarize_concurrency,
)
from dflash_inference.slices import (
    BlockShape,
    Findings,
    as_plain,
    compare,
    find_cuts,
    find_slices,
    measure,
    read_temperatures,
)
from dflash_inference.speed import measure_speed, read_ways, speed_setting
from dflash_inference.statistics import (
    draft_use,
    length_histogram,
    position_acceptance,
)
from dflash_inference.trace import TRAFFIC_SPLIT, DecodeTrace, read_traces
from dflash_train.config import EvaluateConfig, RecipeConfig
from dflash_train.features.store import INDEX_NAME, read_index
from dflash_train.records.conversation import read_split
from dflash_train.records.manifest import Manifest

METRICS_NAME = "metrics.jsonl"
DATA_FOLDERS = ("conversations", "regenerated", "features")


def find(config: RecipeConfig) -> Findings:
    """Collect everything a report says about one run.

    Raises:
        ValueError: The stage `evaluate` is not complete, or one of its files is damaged.
    """
    folder = config.run_dir / "traces"
    manifest = Manifest.read(folder)
    if manifest is None:
        raise ValueError(f"{folder} holds no complete traces. Run the stage `evaluate` first.")
    manifest.verify_outputs(folder)
    evaluate = config.evaluate
    traffic = read_traces(folder / f"replay-{TRAFFIC_SPLIT}.jsonl")
    lookup = read_traces(folder / f"lookup-{TRAFFIC_SPLIT}.jsonl")
    foreign = read_traces(folder / f"foreign-{TRAFFIC_SPLIT}.jsonl")
    live_check = summarize_checks(read_checks(folder / LIVE_CHECK_FILE))
    block = _block_shape(manifest, folder)
    headline = measure(traffic, evaluate, block)
    speed = measure_speed(read_ways(folder), evaluate) | speed_setting(manifest.details)
    is_seen = read_seen(config.run_dir)
    slices = find_slices(traffic, lookup, foreign, evaluate, block)
    for each in slices:
        mine = [trace for trace in traffic if trace.group == each["tenant"]]
        each["unseen"] = measure(only_unseen(mine, is_seen), evaluate, block)
    sets = {name: find_eval_set(entry, folder, evaluate, block) for name, entry in evaluate.sets}
    temperatures = read_temperatures(config.run_dir, TRAFFIC_SPLIT)
    labels = {each["tenant"]: each["label"] for each in slices}
    labels |= {name: each["title"] for name, each in sets.items()}
    return {
        "format": REPORT_FORMAT,
        "format_version": REPORT_VERSION,
        "run": config.name,
        "acceptance_length": headline,
        "token_match_rate": live_check["token_match_rate"],
        "tokens_per_second": speed["tokens_per_second"],
        "target": manifest.target,
        "checkpoint": _checkpoint(config, manifest),
        "machine": manifest.details["machine"],
        "prompt_lookup": compare(traffic, lookup, evaluate, block),
        "foreign_features": compare(traffic, foreign, evaluate, block),
        "views": find_views(traffic, is_seen, evaluate, block),
        "slices": slices,
        "cuts": find_cuts(traffic, lookup, temperatures, evaluate, block),
        "labels": labels,
        "eval_sets": sets,
        "positions": as_plain(position_acceptance(traffic, num_drafts=block["num_drafts"])),
        "steps_by_length": length_histogram(traffic, num_drafts=block["num_drafts"]),
        "draft_use": draft_use(traffic),
        "speed": speed,
        "concurrency": find_concurrency(evaluate),
        "predictions": find_predictions(evaluate, headline),
        "live_check": live_check | {"max_new_tokens": manifest.details["live_max_new_tokens"]},
        "training": read_training(config),
        "data": read_data(config.run_dir),
        "provenance": {
            "command": manifest.command,
            "code": manifest.code,
            "versions": manifest.versions,
        },
        "requests": {
            TRAFFIC_SPLIT: to_columns(rows_of(traffic)),
            **{
                f"eval-{name}": to_columns(
                    rows_of(read_traces(folder / f"replay-eval-{name}.jsonl"))
                )
                for name, _ in evaluate.sets
            },
        },
    }


def find_concurrency(config: EvaluateConfig) -> Findings | None:
    """Sum up the measurement of several requests at once; None if the recipe names none."""
    if config.concurrency is None:
        return None
    return summarize_concurrency(read_concurrency(Path(config.concurrency)))


def find_predictions(config: EvaluateConfig, headline: Findings | None) -> list[Findings]:
    """Predict the speed-up on the hardware of each cost table of the recipe."""
    if headline is None:
        return []
    tables = [read_cost_table(Path(place)) for place in config.cost_tables]
    return [
        {
            "hardware": table.hardware,
            "batches": predict_speed(
                table,
                pooled=headline["pooled"],
                interval=headline["interval"],
                width=headline["ceiling"],
            ),
        }
        for table in tables
    ]


def read_seen(run_dir: Path) -> dict[str, bool]:
    """Say of each held-out call of a run whether training held a near-duplicate of its session."""
    records = read_split(run_dir / "conversations", TRAFFIC_SPLIT)
    return {each.id: each.seen_in_train for each in records if each.seen_in_train is not None}


def only_unseen(traces: list[DecodeTrace], is_seen: dict[str, bool]) -> list[DecodeTrace]:
    """Give the traces of sessions that are known to have no near-duplicate in training."""
    return [trace for trace in traces if is_seen.get(trace.id) is False]


def find_views(
    traffic: list[DecodeTrace],
    is_seen: dict[str, bool],
    config: EvaluateConfig,
    block: BlockShape,
) -> Findings:
    """Give both views of held-out traffic: all calls, repetitions included, and what is new.

    `unseen` holds the sessions without a near-duplicate in training; its `acceptance_length` is
    None where there is none, or none with a verify step.
    """
    unseen = only_unseen(traffic, is_seen)
    return {
        "traffic": {
            "answers": len(traffic),
            "acceptance_length": measure(traffic, config, block),
        },
        "unseen": {
            "answers": len(unseen),
            "groups": len({trace.conversation for trace in unseen}),
            "acceptance_length": measure(unseen, config, block),
        },
        "answers_seen": sum(is_seen.get(trace.id) is True for trace in traffic),
        "answers_unknown": sum(trace.id not in is_seen for trace in traffic),
    }


def find_eval_set(entry: str, folder: Path, config: EvaluateConfig, block: BlockShape) -> Findings:
    """Give the figures of one evaluation set, its licence and its origin."""
    known = eval_set(entry)
    name = known.name
    replayed = read_traces(folder / f"replay-eval-{name}.jsonl")
    lookup = read_traces(folder / f"lookup-eval-{name}.jsonl")
    return {
        "title": known.title,
        "origin": known.origin,
        "licence": known.licence,
        "acceptance_length": measure(replayed, config, block),
        "prompt_lookup": compare(replayed, lookup, config, block),
        "positions": as_plain(position_acceptance(replayed, num_drafts=block["num_drafts"])),
        "steps_by_length": length_histogram(replayed, num_drafts=block["num_drafts"]),
    }


def summarize_checks(checks: list[LiveCheck]) -> Findings:
    """Sum up the live checks; rates are None if nothing was decoded live."""
    requests = _plain_list(checks)
    found = [(check.id, check.mismatch) for check in checks if check.mismatch is not None]
    mismatches = [{"id": name} | as_plain(mismatch) for name, mismatch in found]
    return {
        "num_requests": len(checks),
        "num_equal_to_replay": sum(check.equals_replay for check in checks),
        "num_steps": sum(check.num_steps for check in checks),
        "num_steps_equal": sum(check.num_steps_equal for check in checks),
        "token_match_rate": _mean([check.token_match_rate for check in checks]),
        "num_identical": sum(check.mismatch is None for check in checks),
        "num_near_ties": sum(mismatch.is_near_tie for _, mismatch in found),
        "mismatches": mismatches,
        "batch_match_rate": _mean([check.batch_match_rate for check in checks]),
        "num_batch_identical": sum(check.batch_match_rate == 1 for check in checks),
        "stored_match_rate": _mean([check.stored_match_rate for check in checks]),
        "requests": requests,
    }


def read_training(config: RecipeConfig) -> Findings | None:
    """Read the training curve of this run; None if the checkpoint comes from elsewhere."""
    path = config.run_dir / METRICS_NAME
    if config.checkpoint is not None or not path.exists():
        return None
    records = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    return {
        "loss": [
            {"step": record["step"], "loss": record["loss"]}
            for record in records
            if "loss" in record
        ],
        "validation": [
            {
                "step": record["step"],
                "acceptance_length": record["validation"]["acceptance_length"]["pooled"],
            }
            for record in records
            if "validation" in record
        ],
    }


def read_data(run_dir: Path) -> Findings:
    """Read the books of the data stages and the size of each split of features."""
    books: list[Findings] = []
    for folder in DATA_FOLDERS:
        manifest = Manifest.read(run_dir / folder)
        if manifest is not None and manifest.counts is not None:
            dropped = {name: number for name, number in manifest.counts.dropped.items() if number}
            counts = {"read": manifest.counts.read, "kept": manifest.counts.kept}
            books.append({"stage": manifest.stage, **counts, "dropped": dropped})
    splits: list[Findings] = []
    for path in sorted((run_dir / "features").glob(f"*/{INDEX_NAME}")):
        lines = read_index(path.parent)
        tokens = sum(line.num_tokens for line in lines)
        answers = tokens - sum(line.prompt_length for line in lines)
        numbers = {"answers": len(lines), "tokens": tokens, "answer_tokens": answers}
        splits.append({"split": path.parent.name} | numbers)
    return {"books": books, "splits": splits}


def _block_shape(manifest: Manifest, folder: Path) -> BlockShape:
    """Read how far a step of this drafter can get: K tokens, K + 1 in DSpark's shifted layout."""
    drafter = manifest.details["drafter"]
    if "num_drafts" not in drafter:
        raise ValueError(
            f"{folder} was written by an earlier version, which did not note drafter.num_drafts. "
            "Run the stage 'evaluate' again with --force."
        )
    num_drafts = drafter["num_drafts"]
    return {
        "block_size": drafter["block_size"],
        "num_drafts": num_drafts,
        "ceiling": num_drafts + 1,
    }


def _checkpoint(config: RecipeConfig, manifest: Manifest) -> Findings:
    folder = config.checkpoint or str(config.run_dir / "checkpoint" / "best")
    return {"folder": folder, "inputs": manifest.inputs} | manifest.details["drafter"]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _plain_list(results: list[LiveCheck]) -> list[Findings]:
    return [as_plain(result) for result in results]
