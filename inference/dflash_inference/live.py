"""Decode a few held-out prompts live: the proof of what replay claims, and the speed.

Each prompt is decoded in four ways in turn, in one process after a warm-up, so all speeds see the
same machine: plainly, as Transformers does (the oracle, which keeps the two best logits), and on
the decoder's own passes at width 1 (the speed that is the measure of the others), by prompt lookup,
and with the drafter. The live output is then replayed with features of one teacher-forced pass and
compared step by step. The target also decodes all prompts in a batch: how far that agrees with
plain decoding is the noise floor of every token comparison.

The oracle, the teacher-forced pass and replay are always eager. `evaluate.fast` has the decoder's
passes packed and compiled, which rounds sums in another order: what turns by that is listed.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dflash_inference.autoregressive import AutoregressiveDecoder
from dflash_inference.block_length import DraftPolicy, FirstDrafts
from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.live_check import LIVE_CHECK_FILE, LiveCheck, check_live, write_checks
from dflash_inference.lookup_drafts import LookupDrafts
from dflash_inference.trace import DecodeTrace, group_of, steps_of, write_traces
from dflash_train.config import EvaluateConfig
from dflash_train.drafter.model import Drafter
from dflash_train.features.row_source import RowSource
from dflash_train.features.store import FeatureRow
from dflash_train.features.target import Target
from dflash_train.training.replay import replay

LIVE_FILE = "live.jsonl"
PLAIN_FILE = "plain.jsonl"
WIDTH_ONE_FILE = "width1.jsonl"
LOOKUP_FILE = "live_lookup.jsonl"
WAY_FILES = (PLAIN_FILE, WIDTH_ONE_FILE, LOOKUP_FILE, LIVE_FILE)
"""Traces of the ways of decoding, by way; plain decoding first."""
WARM_UP_TOKENS = 8


@dataclass(kw_only=True)
class LivePrompt:
    """A held-out row whose prompt is decoded live."""

    split: str
    row: FeatureRow

    @property
    def token_ids(self) -> list[int]:
        """The prompt."""
        return self.row.input_ids[: self.row.prompt_length].tolist()

    @property
    def stored_ids(self) -> list[int]:
        """The answer that the store holds."""
        return self.row.input_ids[self.row.prompt_length :].tolist()

    def label(self, trace: DecodeTrace) -> DecodeTrace:
        """Give a trace its place among the requests."""
        row = self.row
        group = group_of(row.tenant, split=self.split)
        return replace(trace, id=row.id, group=group, conversation=row.session or row.id)


def choose_prompts(config: EvaluateConfig, stores: Mapping[str, RowSource]) -> list[LivePrompt]:
    """Choose live prompts by seed: traffic in turns from each tenant, evaluation sets at random."""
    prompts: list[LivePrompt] = []
    for split, store in stores.items():
        wanted = config.live_per_set if split.startswith("eval-") else config.live_traffic
        positions = _spread_over_tenants(store, wanted, seed=config.seed)
        prompts += [
            LivePrompt(split=split, row=store[position].until_first_gap()) for position in positions
        ]
    return prompts


def decode_live(
    config: EvaluateConfig,
    *,
    target: Target,
    drafter: Drafter,
    stores: Mapping[str, RowSource],
    folder: Path,
    fast: bool = False,
) -> None:
    """Decode the live prompts in all ways, check them, and write the files of the live part.

    Args:
        config: Which prompts, and how many tokens of each.
        target: The frozen target.
        drafter: The drafter, on the target's device.
        stores: Held-out features by split.
        folder: Where the files go.
        fast: As for `SpeculativeDecoder`; the oracle and the checks stay exact.
    """
    prompts, budget = choose_prompts(config, stores), config.live_max_new_tokens
    if not prompts:  # replay alone: nothing needs a decoder, which some targets have none of
        _write(folder, {name: [] for name in WAY_FILES}, [])
        return
    ways = _Ways(target, drafter, fast=fast)
    for prompt in prompts[:1]:
        ways.decode(prompt.token_ids, budget=WARM_UP_TOKENS)
    decoded: dict[str, list[DecodeTrace]] = {name: [] for name in WAY_FILES}
    checks: list[LiveCheck] = []
    batched = _decode_batch(target, prompts, budget=budget)
    for prompt, batch_ids in zip(
        tqdm(prompts, desc="evaluate live", unit="prompt"), batched, strict=True
    ):
        traces = ways.decode(prompt.token_ids, budget=budget)
        for name, trace in traces.items():
            decoded[name].append(prompt.label(trace))
        live, plain = decoded[LIVE_FILE][-1], decoded[PLAIN_FILE][-1]
        checks.append(
            check_live(
                live,
                plain=plain,
                replayed=replay_live(target, drafter, prompt.token_ids, live, budget=budget),
                batch_ids=batch_ids,
                stored_ids=prompt.stored_ids,
                dtype=target.model.dtype,
            )
        )
    _write(folder, decoded, checks)


def _write(folder: Path, decoded: dict[str, list[DecodeTrace]], checks: list[LiveCheck]) -> None:
    """Write the traces of each way, then the checks."""
    for name, traces in decoded.items():
        write_traces(folder / name, traces)
    write_checks(folder / LIVE_CHECK_FILE, checks)  # last: its presence says all are there


class _Ways:
    """The ways of decoding a prompt, by the file that their traces go to; one target, one pass."""

    def __init__(self, target: Target, drafter: Drafter, *, fast: bool) -> None:
        """Pack and compile once, if that is wanted: the ways differ by who drafts alone."""
        self._plainly = AutoregressiveDecoder(target)
        self._decoder = SpeculativeDecoder(target, drafter, fast=fast)
        num_drafts = drafter.config.num_drafts
        self._policies: dict[str, tuple[DraftPolicy, int]] = {
            WIDTH_ONE_FILE: (FirstDrafts(0), 1),
            LOOKUP_FILE: (LookupDrafts(num_drafts), num_drafts + 1),
            LIVE_FILE: (FirstDrafts(), drafter.config.block_size),
        }

    def decode(self, prompt_ids: list[int], *, budget: int) -> dict[str, DecodeTrace]:
        """Decode a prompt in each way in turn."""
        traces = {PLAIN_FILE: self._plainly.generate(prompt_ids, max_new_tokens=budget)}
        for name, (policy, block_size) in self._policies.items():
            self._decoder.policy = policy
            trace = self._decoder.generate(prompt_ids, max_new_tokens=budget)
            traces[name] = replace(trace, block_size=block_size)
        return traces


def _decode_batch(target: Target, prompts: list[LivePrompt], *, budget: int) -> list[list[int]]:
    """Let the target alone write all answers side by side."""
    if not prompts:
        return []
    rows = target.generate_batch([each.token_ids for each in prompts], max_new_tokens=budget)
    return [row.output_ids for row in rows]


@torch.inference_mode()
def replay_live(
    target: Target, drafter: Drafter, prompt_ids: list[int], live: DecodeTrace, *, budget: int
) -> DecodeTrace:
    """Replay the output of a live request, its features from one teacher-forced pass over it.

    The live output is the target's greedy text as verify saw it. Where plain decoding rounds
    another way, the token comparison says so, and this comparison still covers every step.
    """
    ids = [*prompt_ids, *live.output_ids]
    row = FeatureRow(
        id=live.id,
        tenant=None,
        session=None,
        input_ids=torch.tensor(ids, dtype=torch.int64),
        loss_mask=torch.arange(len(ids)) >= len(prompt_ids),
        features=target.features_of([ids])[0],
        max_length=len(prompt_ids) + budget,
        finish_reason=live.finish_reason,
    )
    chain = replay(drafter, target.head, row)
    steps = steps_of(chain.starts, chain.num_accepted, chain.widths, last_position=chain.end)
    return replace(live, steps=steps, prefill_s=0.0)


def _spread_over_tenants(store: RowSource, num_prompts: int, *, seed: int) -> list[int]:
    """Choose row positions: shuffle each tenant's rows, then take one of each tenant in turns."""
    generator = np.random.default_rng(seed)
    by_tenant: dict[str, list[int]] = defaultdict(list)
    for position in generator.permutation(len(store)).tolist():
        by_tenant[store.lines[position].tenant or ""].append(position)
    turns = [
        (turn, tenant, position)
        for tenant, positions in by_tenant.items()
        for turn, position in enumerate(positions)
    ]
    return [position for _, _, position in sorted(turns)[:num_prompts]]
