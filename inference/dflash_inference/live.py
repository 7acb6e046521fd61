"""Decode a few held-out prompts live: the proof of what replay claims, and the speed.

Each prompt is decoded plainly and speculatively in turn, in one process after a warm-up, so both
speeds see the same machine. The live output is then replayed with features of one teacher-forced
pass and compared step by step.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dflash_inference.autoregressive import AutoregressiveDecoder
from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.live_check import LIVE_CHECK_FILE, check_live, write_checks
from dflash_inference.trace import DecodeTrace, group_of, steps_of, write_traces
from dflash_train.config import EvaluateConfig
from dflash_train.drafter.model import Drafter
from dflash_train.features.store import FeatureRow, FeatureStore
from dflash_train.features.target import Target
from dflash_train.training.replay import replay

LIVE_FILE = "live.jsonl"
PLAIN_FILE = "plain.jsonl"
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


def choose_prompts(config: EvaluateConfig, stores: dict[str, FeatureStore]) -> list[LivePrompt]:
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
    stores: dict[str, FeatureStore],
    folder: Path,
) -> None:
    """Decode the live prompts both ways, check them, and write the three files of the live part."""
    plain_decoder = AutoregressiveDecoder(target)
    speculative_decoder = SpeculativeDecoder(target, drafter)
    prompts = choose_prompts(config, stores)
    for prompt in prompts[:1]:
        plain_decoder.generate(prompt.token_ids, max_new_tokens=WARM_UP_TOKENS)
        speculative_decoder.generate(prompt.token_ids, max_new_tokens=WARM_UP_TOKENS)
    plain, live, checks = [], [], []
    budget = config.live_max_new_tokens
    for prompt in tqdm(prompts, desc="evaluate live", unit="prompt"):
        plain.append(prompt.label(plain_decoder.generate(prompt.token_ids, max_new_tokens=budget)))
        live.append(
            prompt.label(speculative_decoder.generate(prompt.token_ids, max_new_tokens=budget))
        )
        checks.append(
            check_live(
                live[-1],
                plain=plain[-1],
                replayed=replay_live(target, drafter, prompt.token_ids, live[-1], budget=budget),
                stored_ids=prompt.stored_ids,
                dtype=target.model.dtype,
            )
        )
    write_traces(folder / PLAIN_FILE, plain)
    write_traces(folder / LIVE_FILE, live)
    write_checks(folder / LIVE_CHECK_FILE, checks)  # last: its presence says all three are there


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


def _spread_over_tenants(store: FeatureStore, num_prompts: int, *, seed: int) -> list[int]:
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
