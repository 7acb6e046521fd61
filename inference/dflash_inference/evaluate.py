"""The evaluate stage: held-out answers x ways of drafting -> traces.

Statistics come from exact greedy replay over every stored answer (no target pass); beside it
stand prompt lookup on the same answers and a negative control, replay with the features of
another request. A few prompts are decoded live, in four ways (live.py). Run by
`dflash-train evaluate recipe=NAME`.

Each file is written whole, and one that exists is not made again: the caller has emptied the
folder unless its files were begun with the same recipe and inputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dflash_inference.fast_mode import can_be_fast
from dflash_inference.live import decode_live
from dflash_inference.live_check import LIVE_CHECK_FILE
from dflash_inference.prompt_lookup import prompt_lookup
from dflash_inference.trace import (
    TRAFFIC_SPLIT,
    DecodeTrace,
    StepTrace,
    group_of,
    steps_of,
    write_traces,
)
from dflash_train.config import RecipeConfig
from dflash_train.drafter.model import Drafter
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.row_source import RowSource
from dflash_train.features.store import FeatureRow
from dflash_train.features.target import Target
from dflash_train.records.manifest import FileEntry, Manifest
from dflash_train.records.provenance import machine
from dflash_train.training.replay import replay_each

TRACES_FOLDER = "traces"


def evaluate(
    config: RecipeConfig,
    *,
    target: Target,
    drafter: Drafter,
    stores: Mapping[str, RowSource],
    manifest: Manifest,
) -> Manifest:
    """Write the traces of every split and of the live prompts, then the manifest.

    Args:
        config: The recipe.
        target: The frozen target.
        drafter: The checkpoint to measure, on the target's device.
        stores: Held-out features by split: `test`, and `eval-NAME` for each evaluation set.
        manifest: Prepared by the caller; outputs and details are filled here.
    """
    folder = config.run_dir / TRACES_FOLDER
    for split, store in stores.items():
        _trace_split(folder, split, store, drafter=drafter, head=target.head)
    fast = config.evaluate.fast and can_be_fast(target.device, key="evaluate.fast")
    if not (folder / LIVE_CHECK_FILE).exists():
        decode_live(
            config.evaluate,
            target=target,
            drafter=drafter,
            stores=stores,
            folder=folder,
            fast=fast,
        )
    files = [*sorted(folder.glob("*.jsonl")), folder / LIVE_CHECK_FILE]
    manifest.outputs = [FileEntry.of(path, folder) for path in files]
    manifest.details |= {
        "machine": machine() | {"device": str(target.device)},
        "splits": {split: len(store) for split, store in stores.items()},
        "drafter": describe_drafter(drafter),
        "live_max_new_tokens": config.evaluate.live_max_new_tokens,
        "live_mode": "fast" if fast else "exact",
        "dtype": str(target.model.dtype).removeprefix("torch."),
    }
    manifest.write(folder)
    return manifest


def replay_row(drafter: Drafter, head: FrozenHead, row: FeatureRow, *, split: str) -> DecodeTrace:
    """Replay one stored answer, up to its first redaction."""
    return next(replay_each_row(drafter, head, [row], split=split))


def replay_each_row(
    drafter: Drafter, head: FrozenHead, rows: Iterable[FeatureRow], *, split: str
) -> Iterator[DecodeTrace]:
    """Replay stored answers, up to their first redactions, in order and many side by side."""
    for replayed in replay_each(drafter, head, rows):
        row, chain = replayed.row, replayed.trace
        steps = steps_of(chain.starts, chain.num_accepted, chain.widths, last_position=chain.end)
        yield _stored_trace(row, steps, split=split, block_size=drafter.config.block_size)


def trace_replay(
    path: Path, split: str, rows: RowSource, *, drafter: Drafter, head: FrozenHead
) -> None:
    """Replay every answer of a split into a file of traces, unless it is there already.

    The file is written whole; the caller sees to it that one of an earlier start is of the same
    drafter and rows.
    """

    def by_replay(each: Iterable[FeatureRow]) -> Iterator[DecodeTrace]:
        return replay_each_row(drafter, head, each, split=split)

    _trace_rows(path, _each(rows), by_replay, num_rows=len(rows))


def lookup_row(row: FeatureRow, *, split: str, block_size: int) -> DecodeTrace:
    """Decode one stored answer by prompt lookup, with at most `block_size - 1` drafts a step.

    Like replay it goes up to the answer's first redaction.
    """
    row = row.until_first_gap()
    ids = row.input_ids.tolist()
    prompt_ids, output_ids = ids[: row.prompt_length], ids[row.prompt_length :]
    steps = prompt_lookup(prompt_ids, output_ids, block_size=block_size, max_length=row.max_length)
    return _stored_trace(row, steps, split=split, block_size=block_size)


def foreign_rows(store: RowSource) -> Iterator[FeatureRow]:
    """Give every row with the features of a row of another conversation, as negative control.

    The partner is half the store away, or the next one after it that belongs to another
    conversation; its features are repeated or cut to length. Nothing comes from a store that
    holds one conversation only.
    """
    conversations = [line.session or line.id for line in store.lines]
    num_rows = len(store)
    for position in range(num_rows):
        others = ((position + num_rows // 2 + offset) % num_rows for offset in range(num_rows))
        partner = next((i for i in others if conversations[i] != conversations[position]), None)
        if partner is not None:
            row, donor = store[position], store[partner]
            yield replace(row, features=_stretch(donor.features[:-1], len(row.input_ids)))


def describe_drafter(drafter: Drafter) -> dict[str, Any]:
    """Give the facts about a drafter that a report shows."""
    config = drafter.config
    return {
        "parameters": sum(weight.numel() for weight in drafter.parameters()),
        "num_hidden_layers": config.num_hidden_layers,
        "block_size": config.block_size,
        "num_drafts": config.num_drafts,
        "target_layer_ids": config.target_layer_ids,
    }


def _trace_split(
    folder: Path, split: str, store: RowSource, *, drafter: Drafter, head: FrozenHead
) -> None:
    """Write replay, prompt lookup and, for traffic, the negative control of one split."""

    def by_replay(rows: Iterable[FeatureRow]) -> Iterator[DecodeTrace]:
        return replay_each_row(drafter, head, rows, split=split)

    def by_lookup(rows: Iterable[FeatureRow]) -> Iterator[DecodeTrace]:
        # As many drafts as the drafter makes: DSpark's K against K - 1 would be no fair comparison.
        block_size = drafter.config.num_drafts + 1
        return (lookup_row(row, split=split, block_size=block_size) for row in rows)

    trace_replay(folder / f"replay-{split}.jsonl", split, store, drafter=drafter, head=head)
    path = folder / f"lookup-{split}.jsonl"
    _trace_rows(path, _each(store), by_lookup, num_rows=len(store))
    if split == TRAFFIC_SPLIT:
        path = folder / f"foreign-{split}.jsonl"
        _trace_rows(path, foreign_rows(store), by_replay, num_rows=len(store))


def _each(store: RowSource) -> Iterator[FeatureRow]:
    """Give every row when it is asked for."""
    return (store[position] for position in range(len(store)))


def _trace_rows(
    path: Path,
    rows: Iterable[FeatureRow],
    decode: Callable[[Iterable[FeatureRow]], Iterator[DecodeTrace]],
    *,
    num_rows: int,
) -> None:
    """Write one trace per row, unless an earlier start of this stage has finished the file."""
    if path.exists():
        return
    with torch.inference_mode():
        bar = tqdm(rows, desc=f"evaluate {path.stem}", total=num_rows, unit="answer")
        write_traces(path, list(decode(bar)))


def _stored_trace(
    row: FeatureRow, steps: list[StepTrace], *, split: str, block_size: int
) -> DecodeTrace:
    return DecodeTrace(
        id=row.id,
        group=group_of(row.tenant, split=split),
        conversation=row.session or row.id,
        weight=row.weight,
        prompt_length=row.prompt_length,
        block_size=block_size,
        output_ids=row.input_ids[row.prompt_length :].tolist(),
        steps=steps,
        finish_reason=row.finish_reason,
    )


def _stretch(features: Tensor, num_rows: int) -> Tensor:
    """Repeat or cut `[n, L*E]` to `[num_rows, L*E]`."""
    repeats = -(-num_rows // features.shape[0])
    return features.repeat(repeats, 1)[:num_rows]
