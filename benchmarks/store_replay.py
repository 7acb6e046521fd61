"""Drafters on stored features: training one on a store, replaying it, comparing two.

Replayed traces stay in a folder under names made of the weights' and the store's hashes, so that an
interrupted bench goes on.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from dflash_inference.evaluate import replay_row
from dflash_inference.statistics import (
    Interval,
    RequestSums,
    acceptance_length,
    relative_difference,
)
from dflash_inference.trace import DecodeTrace, read_traces, write_traces
from dflash_train.config import EvaluateConfig, RecipeConfig
from dflash_train.drafter.checkpoint import WEIGHTS_NAME, load_checkpoint
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.store import FeatureStore
from dflash_train.records.manifest import Manifest, content_hash, file_hash
from dflash_train.stages.walk import run_stage
from dflash_train.stages.workshop import Workshop

_HASH_DIGITS = 16


@dataclass(kw_only=True)
class Comparison:
    """One drafter's pooled acceptance length beside another's, on the same requests."""

    pooled: float
    interval: Interval
    num_requests: int
    relative: float
    """Pooled length over the other's, less 1."""
    relative_interval: Interval
    """95 %, paired: both on the same resamples of conversations."""


def for_steps(config: RecipeConfig, num_steps: int) -> RecipeConfig:
    """Give the recipe of a training of `num_steps`, which keeps what it ends with.

    One validation at the end: which of several checkpoints is the best one is chance, and here only
    the features may differ.
    """
    training = replace(
        config.training,
        max_steps=num_steps,
        minutes=None,
        validate_every=num_steps,
        save_every=max(1, num_steps // 4),
    )
    return replace(config, training=training)


def train_on_store(workshop: Workshop) -> Path:
    """Train by the stage `train`, from the newest train state if there is one; give the weights."""
    run_stage(workshop, "train")
    return workshop.config.run_dir / "checkpoint" / "best"


def replay_store(
    checkpoint: Path, head: FrozenHead, features: Path, folder: Path, *, split: str
) -> list[DecodeTrace]:
    """Replay every answer of one split of a store, unless that was done before.

    Args:
        checkpoint: Folder of the drafter.
        head: The target's.
        features: `features` of a run.
        folder: Where traces are kept.
        split: The split, such as test.
    """
    store = FeatureStore.open(features / split)
    manifest = Manifest.read(features / split)
    assert manifest is not None, "the store has been opened"
    name = content_hash([file_hash(checkpoint / WEIGHTS_NAME), manifest.hash])
    path = folder / f"{name.removeprefix('sha256:')[:_HASH_DIGITS]}.jsonl"
    if not path.exists():
        drafter = load_checkpoint(checkpoint).to(head.embedding_weight.device)
        places = tqdm(range(len(store)), desc="replay", unit="answer", file=sys.stderr)
        with torch.inference_mode():
            traces = [replay_row(drafter, head, store[place], split=split) for place in places]
        write_traces(path, traces)
    return read_traces(path)


def compare(
    traces: list[DecodeTrace], others: list[DecodeTrace], config: EvaluateConfig
) -> Comparison:
    """Compare two replays of the same requests, in any order.

    Args:
        traces: Those of the drafter in question.
        others: Those it is measured by.
        config: Resamples and seed of the bootstrap.
    """
    sums, base = (RequestSums.of(sorted(each, key=_id)) for each in (traces, others))
    assert [trace.id for trace in sorted(traces, key=_id)] == [
        trace.id for trace in sorted(others, key=_id)
    ]
    own = acceptance_length(sums, resamples=config.resamples, seed=config.seed)
    relative = relative_difference(sums, base, resamples=config.resamples, seed=config.seed)
    return Comparison(
        pooled=own.pooled,
        interval=own.interval,
        num_requests=own.num_requests,
        relative=relative.value,
        relative_interval=relative.interval,
    )


def _id(trace: DecodeTrace) -> str:
    return trace.id
