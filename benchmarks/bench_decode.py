"""Our decoder beside the official package and Transformers' `generate`, on one CPU, in turns.

    make bench-decode GSM8K=DIR           # after `make drafter GSM8K=DIR`

Every contender decodes the same prompts greedily in float32, one prompt after the other and all in
turn on each prompt, so a noisy machine hits them alike. Seconds are wall clock of whole requests,
prefill included, after a warm-up that also compiles. The last line is one line of JSON:

- `official_ratio`: tokens per second of our fast mode over those of `dflash_generate` 0.1.0.
- `wall_clock_ratio`: our fast mode over the fastest setting of `generate` without a drafter; all
  settings tried stand in the line.
- `lookup_ratio`: our fast mode over prompt lookup on the same fast verify pass.
- `batch8_ratio`: tokens per second of eight requests at once over one at a time, both fast.
- `verify8_over_1`: seconds of a verify pass 8 tokens wide over one of width 1.

Near-ties: greedy outputs of the contenders are compared with plain decoding in eager float32, and
the gap of the target's two best logits is given where they part.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import torch
from tqdm import tqdm
from transformers import CompileConfig

from benchmarks.bench_measure import describe_machine
from dflash_inference.autoregressive import AutoregressiveDecoder
from dflash_inference.block_length import FirstDrafts
from dflash_inference.cache import KeyValueCache
from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.lookup_drafts import lookup_decoder
from dflash_inference.request import RequestState
from dflash_inference.sampling import SamplingParams
from dflash_inference.span_attention import Span
from dflash_inference.trace import num_matching_tokens
from dflash_train.config import compose
from dflash_train.drafter.checkpoint import load_checkpoint
from dflash_train.features.target import Target, load_target
from dflash_train.features.target_folder import dflash_home

LOOKUP, OFFICIAL = "prompt lookup, fast", "dflash 0.1.0"
PROBED_WIDTHS = (1, 2, 4, 8, 16)
PROBED_CONTEXT = 200
PROBES = 21

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


def batch_seconds(
    decoder: SpeculativeDecoder, prompts: list[list[int]], budget: int, *, at_once: int
) -> tuple[float, list[RequestState]]:
    """Decode all prompts, so many in flight at any time; give the wall clock and the requests."""
    params = SamplingParams(max_new_tokens=budget)
    waiting = [RequestState.of(prompt, params) for prompt in prompts]
    finished: list[RequestState] = []
    running: list[RequestState] = []
    began = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(waiting.pop(0))
        decoder.step(running)
        finished += [each for each in running if each.finish_reason]
        running = [each for each in running if not each.finish_reason]
    return time.perf_counter() - began, finished


def verify_ms(decoder: SpeculativeDecoder) -> dict[int, float]:
    """Give the median milliseconds of a verify pass behind 200 tokens, by its width, in turns."""
    cache = KeyValueCache(capacity=PROBED_CONTEXT + max(PROBED_WIDTHS))
    decoder.target_pass.run([Span(token_ids=[5] * PROBED_CONTEXT, cache=cache)])
    cache.commit(PROBED_CONTEXT)
    seconds: dict[int, list[float]] = {width: [] for width in PROBED_WIDTHS}
    for probe in range(PROBES + 3):
        for width in PROBED_WIDTHS:
            began = time.perf_counter()
            decoder.target_pass.run([Span(token_ids=[5] * width, cache=cache)])
            if probe >= 3:
                seconds[width].append(time.perf_counter() - began)
    return {width: 1e3 * statistics.median(each) for width, each in seconds.items()}


def near_ties(
    contenders: list[Contender],
    prompts: list[list[int]],
    oracle: AutoregressiveDecoder,
    budget: int,
) -> list[dict[str, Any]]:
    """List where an output leaves plain decoding, with the target's logit gap there."""
    found = []
    for index, prompt in enumerate(tqdm(prompts, desc="oracle", unit="prompt", file=sys.stderr)):
        plain = oracle.generate(prompt, max_new_tokens=budget)
        for contender in contenders:
            output = contender.outputs[index]
            if output != plain.output_ids:
                place = num_matching_tokens(output, plain.output_ids)
                gap = plain.top_two[place].gap if place < len(plain.top_two) else None
                found.append(
                    {"prompt": index, "who": contender.name, "place": place, "logit_gap": gap}
                )
    return found


def read_prompts(path: Path, number: int) -> list[list[int]]:
    """Read prompts from a JSONL file with `prompt_token_ids`.

    Raises:
        ValueError: There are fewer than wanted.
    """
    lines = path.read_bytes().splitlines()[:number]
    if len(lines) < number:
        raise ValueError(
            f"--prompts (={path}) holds {len(lines)} of {number}. Lower --num-prompts."
        )
    return [orjson.loads(line)["prompt_token_ids"] for line in lines]


def bench(parsed: argparse.Namespace) -> dict[str, Any]:
    """Measure everything and print tables on the way."""
    load_before = os.getloadavg()[0]
    torch.set_num_threads(parsed.threads)
    drafter = load_checkpoint(parsed.checkpoint)
    config = compose(["recipe=gsm8k"]).target
    target = load_target(config, drafter.config.target_layer_ids)
    prompts, budget = read_prompts(parsed.prompts, parsed.num_prompts), parsed.max_new_tokens
    decoder = SpeculativeDecoder(target, drafter, fast=True)
    plain = SpeculativeDecoder(target, drafter, fast=True, policy=FirstDrafts(0))

    lookup = lookup_decoder(target, num_drafts=drafter.config.num_drafts, fast=True)

    def ours(which: SpeculativeDecoder) -> Decode:
        return lambda prompt: which.generate(prompt, max_new_tokens=budget).output_ids

    tried = [
        Contender(name=name, decode=generate_decode(target, setting, budget))
        for name, setting in GENERATE_SETTINGS.items()
    ]
    best = fastest(tried, prompts[0])
    own = Contender(name="ours, fast", decode=ours(decoder))
    contenders = [
        own,
        Contender(name="ours, fast, no drafts", decode=ours(plain)),
        Contender(name=best.name, decode=best.decode),
        Contender(name=LOOKUP, decode=ours(lookup)),
        Contender(name=OFFICIAL, decode=official_decode(parsed.checkpoint, target, budget)),
    ]
    for contender in contenders:
        contender.decode(prompts[0])
    for prompt in tqdm(prompts, desc="in turns", unit="prompt", file=sys.stderr):
        for contender in contenders:
            contender.take(prompt)
    by_name = {each.name: each for each in contenders}
    eight_s, eight = batch_seconds(decoder, prompts, budget, at_once=8)
    one_s, one = batch_seconds(decoder, prompts, budget, at_once=1)
    at_once = Contender(name="ours, fast, 8 at once", decode=own.decode, seconds=eight_s)
    order = {id_: index for index, id_ in enumerate(map(tuple, prompts))}
    eight.sort(key=lambda each: order[tuple(each.token_ids[: each.prompt_length])])
    at_once.outputs = [each.output_ids for each in eight]
    steps = [step for each in one for step in each.steps]
    widths = verify_ms(decoder)
    target.model.set_attn_implementation("sdpa")
    ties = near_ties([own, at_once], prompts, AutoregressiveDecoder(target), budget)
    return {
        "bench": "decode",
        **describe_machine(parsed.threads),
        "load_before": round(load_before, 2),
        "prompts": len(prompts),
        "acceptance_length": round(sum(s.acceptance_length for s in steps) / len(steps), 3),
        "tokens_per_s": {each.name: round(each.tokens_per_s, 2) for each in contenders},
        "settings_tried": {each.name: round(each.tokens_per_s, 2) for each in tried},
        "step_ms": {
            part: round(1e3 * statistics.mean(seconds), 2)
            for part, seconds in {
                "draft": [s.draft_s for s in steps],
                "verify": [s.verify_s for s in steps],
                "bookkeeping": [s.bookkeeping_s for s in steps],
            }.items()
        },
        "prefill_ms": round(1e3 * statistics.mean(each.prefill_s for each in one), 2),
        "verify_ms": {str(width): round(ms, 2) for width, ms in widths.items()},
        "near_ties": ties,
        "official_ratio": _ratio(own, by_name[OFFICIAL]),
        "wall_clock_ratio": _ratio(own, by_name[best.name]),
        "lookup_ratio": _ratio(own, by_name[LOOKUP]),
        "batch8_ratio": round(at_once.tokens_per_s / (_num_tokens(one) / one_s), 3),
        "verify8_over_1": round(widths[8] / widths[1], 3),
    }


def _ratio(ours: Contender, other: Contender) -> float:
    return round(ours.tokens_per_s / other.tokens_per_s, 3)


def _num_tokens(requests: list[RequestState]) -> int:
    return sum(len(each.output_ids) for each in requests)


def main() -> int:
    """Read the command line, measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cached = dflash_home() / "drafters" / "gsm8k-1280"
    parser.add_argument("--checkpoint", type=Path, default=cached, help=f"default: {cached}")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL, prompt_token_ids")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    print(orjson.dumps(bench(parser.parse_args())).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
