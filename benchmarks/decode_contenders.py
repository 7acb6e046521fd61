"""Who decodes in bench-decode: our decoder in several ways, Transformers, the official package."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import CompileConfig

from dflash_inference.block_length import FirstDrafts
from dflash_inference.cost_table import machine_costs
from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.lookup_drafts import lookup_decoder
from dflash_inference.paying_drafts import PayingDrafts
from dflash_train.config import compose
from dflash_train.drafter.checkpoint import load_checkpoint
from dflash_train.features.target import Target, load_target

Decode = Callable[[list[int]], list[int]]
"""Gives the output of a prompt."""

GENERATE_SETTINGS: dict[str, dict[str, Any]] = {
    "generate, eager": {"attention": "eager"},
    "generate, sdpa": {"attention": "sdpa"},
    "generate, static cache": {"attention": "sdpa", "cache_implementation": "static"},
    "generate, static cache, compiled": {
        "attention": "sdpa",
        "cache_implementation": "static",
        "compile": {},
    },
    "generate, static cache, compiled, frozen": {
        "attention": "sdpa",
        "cache_implementation": "static",
        "compile": {"freezing": True},
    },
}
"""Plain settings of Transformers that are tried; the fastest is the one to beat."""


@dataclass(kw_only=True)
class Contender:
    """One way of decoding, and what it took so far."""

    name: str
    decode: Decode
    seconds: float = 0.0
    outputs: list[list[int]] = field(default_factory=list)

    def take(self, prompt: list[int]) -> None:
        """Decode a prompt and count its time."""
        began = time.perf_counter()
        output = self.decode(prompt)
        self.seconds += time.perf_counter() - began
        self.outputs.append(output)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of wall clock."""
        return sum(map(len, self.outputs)) / self.seconds


def generate_decode(target: Target, setting: dict[str, Any], budget: int) -> Decode:
    """Give Transformers' own greedy decoding in one setting."""
    options: dict[str, Any] = {}
    if "cache_implementation" in setting:
        options["cache_implementation"] = setting["cache_implementation"]
    if "compile" in setting:
        compiled = CompileConfig(
            mode="default", fullgraph=False, options=setting["compile"] or None
        )
        if compiled.options:
            compiled.mode = None  # pyright: ignore[reportAttributeAccessIssue] torch takes one of both
        compiled._compile_all_devices = True  # pyright: ignore[reportAttributeAccessIssue] or GPUs only
        options["compile_config"] = compiled
    else:
        options["disable_compile"] = True

    def decode(prompt: list[int]) -> list[int]:
        target.model.set_attn_implementation(setting["attention"])
        ids = torch.tensor([prompt])
        output = target.model.generate(  # pyright: ignore[reportCallIssue] its stubs name a tensor
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=budget,
            eos_token_id=sorted(target.stop_token_ids),
            pad_token_id=0,
            **options,
        )
        return output[0, len(prompt) :].tolist()

    return decode


def official_decode(folder: Path, target: Target, budget: int) -> Decode:
    """Give the loop of the PyPI package `dflash`."""
    from dflash import model as official  # pyright: ignore[reportMissingImports]

    from tests.end_to_end.official_package import load_official

    official._cuda_time = time.perf_counter  # it asks CUDA to synchronise, even on a CPU
    drafter = load_official(folder)

    def decode(prompt: list[int]) -> list[int]:
        result = official.dflash_generate(
            drafter,
            target.model,
            torch.tensor([prompt]),
            max_new_tokens=budget,
            stop_token_ids=sorted(target.stop_token_ids),
            return_stats=True,
        )
        return result.output_ids[0, len(prompt) :].tolist()

    return decode


def fastest(contenders: list[Contender], prompt: list[int]) -> Contender:
    """Warm every contender up, try each once on a prompt, and give the fastest."""
    for contender in tqdm(contenders, desc="try settings", unit="setting", file=sys.stderr):
        contender.decode(prompt)
        contender.take(prompt)
    return max(contenders, key=lambda each: each.tokens_per_s)


@dataclass(kw_only=True)
class Field:
    """Everybody who takes part."""

    target: Target
    own: Contender
    """The drafter alone, every block whole."""
    paying: Contender
    """The drafter or prompt lookup, as far as the machine's cost table says that it pays."""
    lookup: Contender
    plain: Contender
    """Our passes without drafts."""
    official: Contender
    generate: Contender
    """The fastest of Transformers' settings."""
    settings: list[Contender]
    decoder: SpeculativeDecoder
    """Of `own`."""
    paying_decoder: SpeculativeDecoder

    @property
    def in_turns(self) -> list[Contender]:
        """Those who decode all prompts."""
        return [self.own, self.paying, self.lookup, self.plain, self.official, self.generate]


def gather(parsed: argparse.Namespace, prompt: list[int]) -> Field:
    """Load the models, build every contender and try the settings on one prompt."""
    budget = parsed.max_new_tokens
    drafter = load_checkpoint(parsed.checkpoint)
    num_drafts = drafter.config.num_drafts
    target = load_target(compose(["recipe=gsm8k"]).target, drafter.config.target_layer_ids)
    settings = [
        Contender(name=name, decode=generate_decode(target, setting, budget))
        for name, setting in GENERATE_SETTINGS.items()
    ]
    best = fastest(settings, prompt)
    decoder = SpeculativeDecoder(target, drafter, fast=True)
    shared = decoder.target_pass
    paying = SpeculativeDecoder(target, drafter, target_pass=shared)
    paying.policy = PayingDrafts(
        machine_costs(paying, force=True), num_drafts=num_drafts, num_copied=num_drafts
    )
    plain = SpeculativeDecoder(target, None, target_pass=shared, policy=FirstDrafts(0))
    lookup = lookup_decoder(target, num_drafts=num_drafts, target_pass=shared)

    def ours(name: str, which: SpeculativeDecoder) -> Contender:
        return Contender(
            name=name, decode=lambda ids: which.generate(ids, max_new_tokens=budget).output_ids
        )

    return Field(
        target=target,
        own=ours("ours", decoder),
        paying=ours("ours, what pays", paying),
        lookup=ours("prompt lookup on our passes", lookup),
        plain=ours("no drafts on our passes", plain),
        official=Contender(
            name="dflash 0.1.0", decode=official_decode(parsed.checkpoint, target, budget)
        ),
        generate=Contender(name=best.name, decode=best.decode),
        settings=settings,
        decoder=decoder,
        paying_decoder=paying,
    )
