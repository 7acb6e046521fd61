"""What draft and verify cost on this machine, measured with the decoder's own passes.

Whether speculation pays is a question of seconds: a verify pass 8 tokens wide may cost 1.1 plain
passes or 4, by the machine, the model and the batch. So the passes are timed once, on caches warm
at a stated context length, each width in turn with every other (a busy moment of the machine then
falls on all of them), and the medians are kept:

    decoder = SpeculativeDecoder(target, drafter, fast=True)
    table = machine_costs(decoder)          # seconds of measuring; later runs read the file
    decoder.policy = PayingDrafts(table, num_drafts=7)

`serve` and `generate` do so by themselves (adaptive.py); `dflash-train costs checkpoint=DIR` only
measures. The file lies in `$DFLASH_HOME/cost-tables/`, in the format of the report's cost tables
(serving_costs.py, `evaluate.cost_tables`), and is named by a hash of everything that makes its
figures.
"""

import itertools
import statistics
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import msgspec
import torch
from tqdm import tqdm

from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.request import RequestState, synchronized_seconds
from dflash_inference.sampling import SamplingParams
from dflash_inference.serving_costs import CostRow, CostTable, read_cost_table
from dflash_inference.span_attention import Span
from dflash_train.drafter.attention import ContextKV
from dflash_train.features.target_folder import dflash_home
from dflash_train.records.manifest import content_hash, write_bytes
from dflash_train.records.provenance import machine

BATCHES = (1, 2, 4, 8)
CONTEXT_LENGTH = 256
NUM_TURNS = 7
"""Timings of each pass; their median counts."""


def machine_costs(
    decoder: SpeculativeDecoder,
    *,
    num_drafts: int | None = None,
    batches: tuple[int, ...] = BATCHES,
    context_length: int = CONTEXT_LENGTH,
    force: bool = False,
) -> CostTable:
    """Give the costs of this decoder on this machine, measured once.

    Args: as `costs_file`.
    """
    path = costs_file(
        decoder,
        num_drafts=num_drafts,
        batches=batches,
        context_length=context_length,
        force=force,
    )
    return read_cost_table(path)


def costs_file(
    decoder: SpeculativeDecoder,
    *,
    num_drafts: int | None = None,
    batches: tuple[int, ...] = BATCHES,
    context_length: int = CONTEXT_LENGTH,
    force: bool = False,
) -> Path:
    """Give the file with the costs of this decoder on this machine; measure if there is none.

    Args:
        decoder: Its target and drafter run; its mode (fast or exact) is part of the key.
        num_drafts: Widest draft; None is all that the drafter drafts.
        batches: Requests at once.
        context_length: Tokens in each request's cache.
        force: Measure again although a table is there.
    """
    num_drafts = _num_drafts(decoder) if num_drafts is None else num_drafts
    key = _key(decoder, num_drafts=num_drafts, batches=batches, context_length=context_length)
    path = table_path(key)
    if path.is_file() and not force:
        return path
    rows = measure(decoder, num_drafts=num_drafts, batches=batches, context_length=context_length)
    table = CostTable(hardware=_in_words(key), rows=rows)
    write_bytes(path, msgspec.json.format(msgspec.json.encode(table)) + b"\n")
    return path


def table_path(key: dict[str, object]) -> Path:
    """Give where the table of a key is kept."""
    name = content_hash(key).removeprefix("sha256:")[:16]
    return dflash_home() / "cost-tables" / f"{name}.json"


def measured_widths(num_drafts: int) -> list[int]:
    """Give the widths that are timed: 1, 2, 4, ... and the widest."""
    most = num_drafts + 1
    return sorted({most, *itertools.takewhile(lambda w: w < most, (2**i for i in range(32)))})


@torch.inference_mode()
def measure(
    decoder: SpeculativeDecoder, *, num_drafts: int, batches: tuple[int, ...], context_length: int
) -> list[CostRow]:
    """Time every width at every batch; the first of the turns is a warm-up and does not count."""
    widths = measured_widths(num_drafts)
    requests = [
        _WarmRequest(decoder, num_drafts=num_drafts, length=context_length, seed=seed)
        for seed in range(max(batches))
    ]
    drafts: dict[tuple[int, int], list[float]] = defaultdict(list)
    verifies: dict[tuple[int, int], list[float]] = defaultdict(list)
    for turn in tqdm(range(NUM_TURNS + 1), desc="measure passes", leave=False):
        for batch, width in itertools.product(batches, widths):
            draft_s = _draft_seconds(decoder, requests[:batch], width)
            verify_s = _verify_seconds(decoder, requests[:batch], width)
            if turn:
                drafts[batch, width].append(draft_s)
                verifies[batch, width].append(verify_s)
    return [
        CostRow(
            batch=batch,
            width=width,
            draft_s=statistics.median(drafts[batch, width]),
            verify_s=statistics.median(verifies[batch, width]),
        )
        for batch, width in itertools.product(batches, widths)
    ]


class _WarmRequest:
    """A request behind its prefill, which can be drafted for and verified again and again."""

    def __init__(
        self, decoder: SpeculativeDecoder, *, num_drafts: int, length: int, seed: int
    ) -> None:
        """Prefill invented tokens; keep what one draft eats."""
        vocab_size = len(decoder.target.head.embedding_weight)
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(vocab_size, (length,), generator=generator).tolist()
        params = SamplingParams(max_new_tokens=num_drafts + 2, stop_token_ids=frozenset())
        self.state: RequestState = decoder.new_request(prompt, params)
        decoder.step([self.state])
        self._features = self.state.pending_features[-1:]
        self._context: list[ContextKV] = []
        if decoder.block_drafter is not None:
            decoder.block_drafter.draft([self.state])
            layers = self.state.drafter_cache.layers
            self._context = [ContextKV(layer.k[:-1], layer.v[:-1]) for layer in layers]

    def rewind(self, width: int) -> RequestState:
        """Let one row of features be pending again, and the budget leave room for a width."""
        self.state.drafter_cache.layers = list(self._context)
        self.state.pending_parts = [self._features]
        self.state.params = SamplingParams(max_new_tokens=width)
        return self.state


def _draft_seconds(decoder: SpeculativeDecoder, requests: list[_WarmRequest], width: int) -> float:
    if decoder.block_drafter is None or width == 1:
        return 0.0
    states = [request.rewind(width) for request in requests]
    began = synchronized_seconds(decoder.target.device)
    decoder.block_drafter.draft(states)
    return synchronized_seconds(decoder.target.device) - began


def _verify_seconds(decoder: SpeculativeDecoder, requests: list[_WarmRequest], width: int) -> float:
    spans = [
        Span(token_ids=each.state.token_ids[-width:], cache=each.state.target_cache)
        for each in requests
    ]  # no row is committed: the caches stay as they are
    began = synchronized_seconds(decoder.target.device)
    decoder.target_pass.run(spans)
    return synchronized_seconds(decoder.target.device) - began


def _num_drafts(decoder: SpeculativeDecoder) -> int:
    assert decoder.block_drafter is not None, "without a drafter num_drafts is given"
    return decoder.block_drafter.drafter.config.num_drafts


def _key(
    decoder: SpeculativeDecoder, *, num_drafts: int, batches: tuple[int, ...], context_length: int
) -> dict[str, object]:
    """Name everything that makes the figures. Weights do not: a drafter's shape decides."""
    target, drafter = decoder.target, decoder.block_drafter
    here = machine()
    return {
        "target": [target.name, target.revision, str(target.model.dtype)],
        "attention": str(target.model.config._attn_implementation),
        "drafter": None
        if drafter is None
        else [asdict(drafter.drafter.config), str(drafter.dtype)],
        "mode": "fast" if decoder.target_pass.is_fast else "exact",
        "device": [str(target.device), here["processor"], here["accelerator"]],
        "threads": here["threads"],
        "torch": torch.__version__,
        "num_drafts": num_drafts,
        "batches": list(batches),
        "context_length": context_length,
    }


def _in_words(key: dict[str, object]) -> str:
    """Describe the machine and the setting for a reader."""
    here = machine()
    chip = here["processor"] if here["accelerator"] == "none" else here["accelerator"]
    return (
        f"{chip}, {key['threads']} threads, {key['mode']} mode, torch {key['torch']}, "
        f"context of {key['context_length']} tokens"
    )
