"""The figures of protocol gsm8k-1280 for one drafter, and the comparison of two.

Replay gives the exact greedy acceptance of every stored test answer without a target pass. Prompt
lookup on the same answers is what a drafter has to beat, rows it was trained on show how much of
its skill is memory, and a few prompts decoded live prove that replay says what decoding does.
Traces stay in the run's folder `measure/`, so that an interrupted measurement goes on and two
drafters can be compared later, question by question.
"""

import shutil
import statistics
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import torch
from gsm8k_data import Sizes, row_id
from tqdm import tqdm

from dflash_inference.evaluate import describe_drafter, lookup_row, replay_each_row
from dflash_inference.live import decode_live
from dflash_inference.live_check import LIVE_CHECK_FILE, LiveCheck, read_checks
from dflash_inference.statistics import (
    RequestSums,
    acceptance_length,
    length_histogram,
    paired_difference,
    pooled_mean,
    position_acceptance,
)
from dflash_inference.trace import DecodeTrace, read_traces, write_traces
from dflash_train.config import EvaluateConfig, require
from dflash_train.drafter.checkpoint import WEIGHTS_NAME, load_checkpoint
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.store import FeatureRow, FeatureStore
from dflash_train.features.target import Target
from dflash_train.records.manifest import Manifest, content_hash, file_hash, write_bytes
from dflash_train.records.provenance import code_version, machine
from dflash_train.stages.table import stage_named
from dflash_train.stages.walk import KEY_NAME
from dflash_train.stages.workshop import Workshop

FOLDER = "measure"
ABLATION_FOLDER = "measure-ablation"
RESULT_NAME = "result.json"
REPLAY_FILE = "replay-test.jsonl"
TRAINING_TIME_NAME = "training-time.json"
LOOKUP_SIZES = (8, 16)
COST_ROUNDS = 3
DRAFT_CALLS = 50
DRAFT_CONTEXT = 200
DRAFT_PENDING = 2
"""Feature rows that a draft call takes in, about what a verify step commits."""

Figures = dict[str, Any]


def measure(workshop: Workshop, sizes: Sizes) -> Figures:
    """Measure the drafter of a run by the protocol.

    Args:
        workshop: The recipe; its run folder links to the protocol's features.
        sizes: The protocol's rows.

    Returns:
        All figures as plain values; also stored as `measure/result.json`.

    Raises:
        ValueError: The run has no drafter or no features yet.
    """
    folder = workshop.config.run_dir / FOLDER
    features = workshop.config.run_dir / stage_named("collect").folder
    _claim(folder, _key(workshop, sizes, features))
    result = folder / RESULT_NAME
    if result.exists():
        tqdm.write("measure: complete and unchanged, nothing to do", file=sys.stderr)
        return orjson.loads(result.read_bytes())
    figures = _measure(workshop, sizes, folder)
    write_bytes(result, orjson.dumps(figures, option=orjson.OPT_INDENT_2) + b"\n")
    return figures


def compare(
    first: Path, second: Path, config: EvaluateConfig, *, measured: str = FOLDER
) -> Figures:
    """Give the paired difference of two measured drafters on the same answers.

    Args:
        first: A run folder that has been measured.
        second: Another one.
        config: Resamples and seed.
        measured: Folder of the measurement inside each run folder.

    Raises:
        ValueError: A folder has not been measured, or they hold other answers.
    """
    ours, theirs = (_replayed(folder / measured) for folder in (first, second))
    require(
        [(each.id, each.output_ids) for each in ours]
        == [(each.id, each.output_ids) for each in theirs],
        f"compare: {first} and {second} were measured on other answers. Measure both on the same.",
    )
    return {
        "first": str(first),
        "second": str(second),
        "first_acceptance_length": _estimate(ours, config),
        "second_acceptance_length": _estimate(theirs, config),
        "first_minus_second": _difference(ours, theirs, config),
    }


def measure_ablation(workshop: Workshop, sizes: Sizes, data_dir: Path) -> Figures:
    """Replay the drafter of a run over the questions that settings are compared on.

    Args:
        workshop: The recipe; its run folder has a drafter.
        sizes: Which questions these are.
        data_dir: Run folder that holds their features.

    Returns:
        Acceptance length and training facts, also stored as `measure-ablation/result.json`.
    """
    config = workshop.config.evaluate
    folder = workshop.config.run_dir / ABLATION_FOLDER
    features = data_dir / stage_named("collect").folder
    _claim(folder, _key(workshop, sizes, features))
    rows = test_rows(FeatureStore.open(features / "test"), sizes)
    drafter = load_checkpoint(workshop.checkpoint).to(workshop.target.device)
    replayed = _replay(drafter, workshop.target.head, rows, folder / REPLAY_FILE)
    figures = {
        "protocol": sizes.name,
        "name": workshop.config.name,
        "drafter": describe_drafter(drafter),
        "training": _training(workshop),
        "test": _estimate(replayed, config),
    }
    write_bytes(folder / RESULT_NAME, orjson.dumps(figures, option=orjson.OPT_INDENT_2) + b"\n")
    return figures


def compare_all(
    folders: list[Path], config: EvaluateConfig, *, measured: str = FOLDER
) -> list[Figures]:
    """Compare the first run folder with every other: see `compare`."""
    return [compare(folders[0], folder, config, measured=measured) for folder in folders[1:]]


def test_rows(store: FeatureStore, sizes: Sizes) -> list[FeatureRow]:
    """Give the rows that are measured, in order."""
    lines = range(sizes.test_first, sizes.test_first + sizes.test)
    return protocol_rows(store, sizes.test_file, lines)


def protocol_rows(store: FeatureStore, file: str, lines: range) -> list[FeatureRow]:
    """Give the rows of some questions of a file, in order.

    Raises:
        ValueError: A row is not in the store.
    """
    places = {line.id: place for place, line in enumerate(store.lines)}
    wanted = [row_id(file, index) for index in lines]
    missing = [name for name in wanted if name not in places]
    require(
        not missing,
        f"{store.folder} lacks {len(missing)} of {len(lines)} rows, {', '.join(missing[:3])} among "
        "them. Raise data.max_prompt_tokens and run `prepare` again.",
    )
    return [store[places[name]] for name in wanted]


def draft_costs(folders: list[Path], target: Target) -> Figures:
    """Time whole draft calls of several trained drafters, one after the other in rounds.

    Args:
        folders: Run folders; the first one's features give the context.
        target: On the device to be timed.

    Returns:
        Median seconds of a call by run folder.
    """
    store = FeatureStore.open(folders[0] / "features" / "test")
    row = _long_row([store[place] for place in range(len(store))])
    drafters = {
        str(folder): load_checkpoint(folder / "checkpoint" / "best").to(target.device)
        for folder in folders
    }
    rounds = [
        {name: draft_seconds(each, target.head, row)["median_s"] for name, each in drafters.items()}
        for _ in range(COST_ROUNDS)
    ]
    return {name: statistics.median(each[name] for each in rounds) for name in drafters}


def draft_seconds(drafter: Drafter, head: FrozenHead, row: FeatureRow) -> Figures:
    """Time whole draft calls of one request: context rows in, drafted ids out.

    Each call starts from a cache that lacks `DRAFT_PENDING` rows of the context, as after a verify
    step.

    Args:
        drafter: On the device to be timed.
        head: The target's embedding and head, on the same device.
        row: Gives the context; a row shorter than `DRAFT_CONTEXT` gives a shorter one.
    """
    config, parameter = drafter.config, next(drafter.parameters())
    context = min(DRAFT_CONTEXT, len(row.input_ids) - 1)
    features = row.features[:context].to(parameter.device, parameter.dtype)
    anchor_id = row.input_ids[context : context + 1].to(parameter.device)
    output_head = drafter.output_head(head)
    num_slots = config.first_slot + config.num_drafts
    seconds: list[float] = []
    with torch.inference_mode():
        for _ in range(DRAFT_CALLS + 1):
            cache = drafter.new_cache()
            block = block_embeddings(output_head, anchor_id, num_slots=num_slots, config=config)[0]
            known = context - DRAFT_PENDING
            drafter.draft_step(block.to(parameter.dtype), features[:known], cache)
            _synchronize(parameter.device)
            began = time.perf_counter()
            block = block_embeddings(output_head, anchor_id, num_slots=num_slots, config=config)[0]
            hidden = drafter.draft_step(block.to(parameter.dtype), features[known:], cache)
            drafter.draft(hidden, anchor_id, output_head)
            _synchronize(parameter.device)
            seconds.append(time.perf_counter() - began)
    timed = seconds[1:]  # the first call warms up
    return {"median_s": statistics.median(timed), "calls": len(timed), "context": context}


def _measure(workshop: Workshop, sizes: Sizes, folder: Path) -> Figures:
    config = workshop.config.evaluate
    features = workshop.config.run_dir / stage_named("collect").folder
    stores = {split: FeatureStore.open(features / split) for split in ("train", "test")}
    test = test_rows(stores["test"], sizes)
    train = protocol_rows(stores["train"], "train", range(sizes.train_replayed))
    target = workshop.target
    drafter = load_checkpoint(workshop.checkpoint).to(target.device)

    replayed = _replay(drafter, target.head, test, folder / REPLAY_FILE)
    memorised = _replay(drafter, target.head, train, folder / "replay-train.jsonl", split="train")
    lookups = {
        size: [lookup_row(row, split="test", block_size=size) for row in test]
        for size in LOOKUP_SIZES
    }
    if not (folder / LIVE_CHECK_FILE).exists():
        settings = replace(
            config, live_traffic=sizes.live, live_max_new_tokens=workshop.config.data.max_new_tokens
        )
        held_out = {"test": stores["test"]}
        decode_live(settings, target=target, drafter=drafter, stores=held_out, folder=folder)
    num_drafts = drafter.config.num_drafts
    first = replayed[: sizes.stored_test]
    return {
        "protocol": sizes.name,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine() | {"device": str(target.device)},
        "commit": code_version(),
        "target": target.describe(),
        "drafter": describe_drafter(drafter),
        "training": _training(workshop),
        "draft_cost": draft_seconds(drafter, target.head, _long_row(test)),
        "test": _estimate(replayed, config)
        | {"positions": asdict(position_acceptance(replayed, num_drafts=num_drafts))}
        | {"steps_by_length": length_histogram(replayed, num_drafts=num_drafts)},
        f"test_first_{len(first)}": _estimate(first, config),
        "train": _estimate(memorised, config),
        "train_minus_test": _pooled(memorised) - _pooled(replayed),
        "prompt_lookup": {
            f"K={size}": _estimate(traces, config)
            | {f"first_{len(first)}": _estimate(traces[: len(first)], config)}
            | {"drafter_minus_lookup": _difference(replayed, traces, config)}
            for size, traces in lookups.items()
        },
        "live": _live(read_checks(folder / LIVE_CHECK_FILE)),
    }


def _replay(
    drafter: Drafter, head: FrozenHead, rows: list[FeatureRow], path: Path, *, split: str = "test"
) -> list[DecodeTrace]:
    """Replay rows into a file of traces, unless it is there, and read it."""
    if not path.exists():
        bar = tqdm(rows, desc=f"replay {split}", unit="answer", file=sys.stderr)
        with torch.inference_mode():
            traces = list(replay_each_row(drafter, head, bar, split=split))
        write_traces(path, traces)
    return read_traces(path)


def _estimate(traces: list[DecodeTrace], config: EvaluateConfig) -> Figures:
    """Give both means with 95 % intervals, the counts, and the drafts that were accepted."""
    sums = RequestSums.of(traces)
    found = acceptance_length(sums, resamples=config.resamples, seed=config.seed)
    num_accepted = sum(step.num_accepted for trace in traces for step in trace.steps)
    return asdict(found) | {"num_accepted": num_accepted}


def _pooled(traces: list[DecodeTrace]) -> float:
    return pooled_mean(RequestSums.of(traces))


def _difference(
    first: list[DecodeTrace], second: list[DecodeTrace], config: EvaluateConfig
) -> Figures:
    found = paired_difference(
        RequestSums.of(first), RequestSums.of(second), resamples=config.resamples, seed=config.seed
    )
    return asdict(found) | {"verdict": found.verdict}


def _live(checks: list[LiveCheck]) -> Figures:
    """Sum up the live check: requests and steps equal to replay, tokens equal to plain decoding."""
    mismatches = [check.mismatch for check in checks if check.mismatch is not None]
    return {
        "num_requests": len(checks),
        "num_equal_to_replay": sum(check.equals_replay for check in checks),
        "num_steps": sum(check.num_steps for check in checks),
        "num_steps_equal": sum(check.num_steps_equal for check in checks),
        "num_identical_to_plain": len(checks) - len(mismatches),
        "num_near_ties": sum(mismatch.is_near_tie for mismatch in mismatches),
        "num_unexplained": sum(not mismatch.is_near_tie for mismatch in mismatches),
    }


def _training(workshop: Workshop) -> Figures:
    """Give what the training's manifest and clock say; nothing for a checkpoint from elsewhere."""
    run_dir = workshop.config.run_dir
    manifest = Manifest.read(run_dir / stage_named("train").folder)
    if workshop.config.checkpoint is not None or manifest is None:
        return {"checkpoint": str(workshop.checkpoint)}
    clock = run_dir / TRAINING_TIME_NAME
    seconds = orjson.loads(clock.read_bytes()) if clock.exists() else {}
    is_current = seconds.get("key") == manifest.key
    return manifest.details | {"seconds": seconds["seconds"] if is_current else None}


def _long_row(rows: list[FeatureRow]) -> FeatureRow:
    """Give the first row that is long enough for the timed context, else the longest."""
    long_enough = (row for row in rows if len(row.input_ids) > DRAFT_CONTEXT)
    return next(long_enough, max(rows, key=lambda row: len(row.input_ids)))


def _key(workshop: Workshop, sizes: Sizes, features_dir: Path) -> str:
    """Hash what decides the figures: weights, features, rows, statistics."""
    config = workshop.config
    weights = workshop.checkpoint / WEIGHTS_NAME
    require(
        weights.is_file(),
        f"checkpoint (={workshop.checkpoint}) holds no {WEIGHTS_NAME}. Run the step `train` first, "
        "or give checkpoint=DIR.",
    )
    features = Manifest.read(features_dir)
    require(features is not None, f"{features_dir} is not there. Run the step `prepare` first.")
    assert features is not None
    statistic = [config.evaluate.resamples, config.evaluate.seed]
    return content_hash([file_hash(weights), features.hash, asdict(sizes), statistic])


def _claim(folder: Path, key: str) -> None:
    """Keep unfinished or finished work of the same key, remove any other."""
    marker = folder / KEY_NAME
    if not marker.exists() or marker.read_text() != key:
        shutil.rmtree(folder, ignore_errors=True)
        write_bytes(marker, key.encode())


def _replayed(folder: Path) -> list[DecodeTrace]:
    path = folder / REPLAY_FILE
    require(path.is_file(), f"compare: there is no {path}. Measure this run first.")
    return read_traces(path)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
