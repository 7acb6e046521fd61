"""From the files of a run to the figures of its report: everything that `report.json` holds.

Nothing is computed anywhere else: the Markdown, the page and the last lines on screen all show
what this module found. Every figure comes from traces and manifests, so a report can be made
again without target or drafter.
"""

from pathlib import Path
from typing import Any

import orjson

from dflash_inference.eval_sets import eval_set
from dflash_inference.live_check import LIVE_CHECK_FILE, LiveCheck, read_checks
from dflash_inference.statistics import (
    Interval,
    RequestSums,
    acceptance_length,
    by_group,
    length_histogram,
    paired_difference,
    position_acceptance,
)
from dflash_inference.trace import TRAFFIC_SPLIT, DecodeTrace, read_traces
from dflash_train.config import EvaluateConfig, RecipeConfig
from dflash_train.features.store import INDEX_NAME, read_index
from dflash_train.records.conversation import read_split
from dflash_train.records.manifest import Manifest

Findings = dict[str, Any]
BlockShape = dict[str, int]
"""K, most drafts of a step, and the ceiling of the acceptance length (drafts + 1), by name."""
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
    traffic = read_traces(folder / f"replay-{TRAFFIC_SPLIT}.jsonl")
    lookup = read_traces(folder / f"lookup-{TRAFFIC_SPLIT}.jsonl")
    foreign = read_traces(folder / f"foreign-{TRAFFIC_SPLIT}.jsonl")
    checks = read_checks(folder / LIVE_CHECK_FILE)
    live_check = summarize_checks(checks)
    speed = measure_speed(read_traces(folder / "plain.jsonl"), read_traces(folder / "live.jsonl"))
    block = _block_shape(manifest, folder)
    is_seen = read_seen(config.run_dir)
    slices = find_slices(traffic, lookup, foreign, config.evaluate, block)
    for each in slices:
        mine = [trace for trace in traffic if trace.group == each["tenant"]]
        each["unseen"] = measure(only_unseen(mine, is_seen), config.evaluate, block)
    labels = {each["tenant"]: each["label"] for each in slices}
    labels |= {name: eval_set(name).title for name in config.evaluate.eval_sets}
    return {
        "run": config.name,
        "acceptance_length": measure(traffic, config.evaluate, block),
        "token_match_rate": live_check["token_match_rate"],
        "tokens_per_second": speed["tokens_per_second"],
        "target": manifest.target,
        "checkpoint": _checkpoint(config, manifest),
        "machine": manifest.details["machine"],
        "prompt_lookup": compare(traffic, lookup, config.evaluate, block),
        "foreign_features": compare(traffic, foreign, config.evaluate, block),
        "views": find_views(traffic, is_seen, config.evaluate, block),
        "slices": slices,
        "labels": labels,
        "eval_sets": {
            name: find_eval_set(name, folder, config.evaluate, block)
            for name in config.evaluate.eval_sets
        },
        "positions": _plain(position_acceptance(traffic, num_drafts=block["num_drafts"])),
        "steps_by_length": length_histogram(traffic, num_drafts=block["num_drafts"]),
        "speed": speed,
        "live_check": live_check | {"max_new_tokens": manifest.details["live_max_new_tokens"]},
        "training": read_training(config),
        "data": read_data(config.run_dir),
        "provenance": {
            "command": manifest.command,
            "code": manifest.code,
            "versions": manifest.versions,
        },
    }


def measure(
    traces: list[DecodeTrace], config: EvaluateConfig, block: BlockShape
) -> Findings | None:
    """Give both acceptance lengths with intervals, ceiling and counts; None if there is no step."""
    sums = RequestSums.of(traces)
    if sums.num_requests == 0:
        return None
    found = acceptance_length(sums, resamples=config.resamples, seed=config.seed)
    return _plain(found) | block


def compare(
    drafter: list[DecodeTrace], other: list[DecodeTrace], config: EvaluateConfig, block: BlockShape
) -> Findings | None:
    """Give another way of drafting and the paired difference to it, on the requests both have."""
    shared = {trace.id for trace in other}
    drafter = [trace for trace in drafter if trace.id in shared]
    found = measure(other, config, block)
    if found is None:
        return None
    difference = paired_difference(
        RequestSums.of(drafter),
        RequestSums.of(other),
        resamples=config.resamples,
        seed=config.seed,
    )
    return {
        "acceptance_length": found,
        "difference": _plain(difference) | {"verdict": difference.verdict},
    }


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


def find_slices(
    traffic: list[DecodeTrace],
    lookup: list[DecodeTrace],
    foreign: list[DecodeTrace],
    config: EvaluateConfig,
    block: BlockShape,
) -> list[Findings]:
    """Give the figures of each tenant, the largest first; its key is shown, never its name."""
    lookup_groups, foreign_groups = by_group(lookup), by_group(foreign)
    return [
        {
            "label": f"tenant {number}",
            "tenant": tenant,
            "acceptance_length": measure(traces, config, block),
            "prompt_lookup": compare(traces, lookup_groups[tenant], config, block),
            "foreign_features": compare(traces, foreign_groups.get(tenant, []), config, block),
        }
        for number, (tenant, traces) in enumerate(by_group(traffic).items(), start=1)
    ]


def find_eval_set(name: str, folder: Path, config: EvaluateConfig, block: BlockShape) -> Findings:
    """Give the figures of one evaluation set, its licence and its origin."""
    known = eval_set(name)
    replayed = read_traces(folder / f"replay-eval-{name}.jsonl")
    lookup = read_traces(folder / f"lookup-eval-{name}.jsonl")
    return {
        "title": known.title,
        "origin": known.origin,
        "licence": known.licence,
        "acceptance_length": measure(replayed, config, block),
        "prompt_lookup": compare(replayed, lookup, config, block),
    }


def summarize_checks(checks: list[LiveCheck]) -> Findings:
    """Sum up the live checks; rates are None if nothing was decoded live."""
    requests = _plain_list(checks)
    found = [(check.id, check.mismatch) for check in checks if check.mismatch is not None]
    mismatches = [{"id": name} | _plain(mismatch) for name, mismatch in found]
    return {
        "num_requests": len(checks),
        "num_equal_to_replay": sum(check.equals_replay for check in checks),
        "num_steps": sum(check.num_steps for check in checks),
        "num_steps_equal": sum(check.num_steps_equal for check in checks),
        "token_match_rate": _mean([check.token_match_rate for check in checks]),
        "num_identical": sum(check.mismatch is None for check in checks),
        "num_near_ties": sum(mismatch.is_near_tie for _, mismatch in found),
        "mismatches": mismatches,
        "stored_match_rate": _mean([check.stored_match_rate for check in checks]),
        "requests": requests,
    }


def measure_speed(plain: list[DecodeTrace], live: list[DecodeTrace]) -> Findings:
    """Give tokens per second after prefill and where the time of a step goes, in seconds.

    Both decoders saw the same prompts. The token from prefill is not counted, its time neither.
    """
    plain_rate, live_rate = _tokens_per_second(plain), _tokens_per_second(live)
    steps = [step for trace in live for step in trace.steps]
    passes = [step for trace in plain for step in trace.steps]
    step_s = {
        part: _mean([getattr(step, f"{part}_s") for step in steps])
        for part in ("draft", "verify", "bookkeeping")
    }
    plain_s = _mean([step.verify_s for step in passes])
    is_measured = bool(plain_rate and live_rate)
    return {
        "tokens_per_second": {"plain": plain_rate, "speculative": live_rate},
        "speed_up": live_rate / plain_rate if plain_rate and live_rate else None,
        "seconds_per_step": step_s if is_measured else None,
        "seconds_per_plain_token": plain_s,
        # Acceptance length at which speculative decoding breaks even: one step in plain tokens.
        "step_cost": sum(value or 0.0 for value in step_s.values()) / plain_s if plain_s else None,
        "tokens_per_step": _mean([float(step.committed) for step in steps]),
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


def _tokens_per_second(traces: list[DecodeTrace]) -> float | None:
    seconds = sum(trace.decode_s for trace in traces)
    tokens = sum(len(trace.output_ids) - 1 for trace in traces)
    return tokens / seconds if tokens else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _plain(result: Any) -> Findings:
    """Turn a result into JSON values; intervals become `[low, high]`."""
    fields = orjson.loads(orjson.dumps(result))
    for name, value in vars(result).items():
        if isinstance(value, Interval):
            fields[name] = [value.low, value.high]
    return fields


def _plain_list(results: list[LiveCheck]) -> list[Findings]:
    return [_plain(result) for result in results]
