"""Our decoder beside the official package and Transformers' `generate`, on one CPU, in turns.

    make bench-decode GSM8K=DIR           # after `make drafter GSM8K=DIR`

Every contender decodes the same prompts greedily in float32, one prompt after the other and all in
turn on each prompt, so a noisy machine hits them alike. Seconds are wall clock of whole requests,
prefill included, after a warm-up that also compiles. `ours` verifies every drafted token, in fast
mode; `what pays` chooses in every step between drafter, prompt lookup and the target alone by this
machine's cost table. The last line is one line of JSON:

- `official_ratio`: tokens per second of `ours` over those of `dflash_generate` 0.1.0.
- `wall_clock_ratio`: `ours` over the fastest setting of `generate` without a drafter; all settings
  tried stand in the line. `what_pays_ratio`: the same of `what pays`.
- `lookup_ratio`: `ours` over prompt lookup on the same fast verify pass; `what_pays_lookup_ratio`.
- `batch8_ratio`: tokens per second of eight requests at once over one at a time, both `what pays`.
- `verify8_over_1`: seconds of a verify pass 8 tokens wide over one of width 1.

Near-ties: outputs are compared with those of the official package, eager float32, and the gap of
the target's two best logits is given where they part.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import torch
from tqdm import tqdm

from benchmarks.bench_measure import describe_machine
from benchmarks.decode_contenders import Contender, gather
from dflash_inference.block_length import FirstDrafts
from dflash_inference.cache import KeyValueCache
from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.request import RequestState
from dflash_inference.sampling import SamplingParams
from dflash_inference.span_attention import Span
from dflash_inference.trace import num_matching_tokens
from dflash_train.features.target import Target
from dflash_train.features.target_folder import dflash_home

PROBED_WIDTHS = (1, 2, 4, 8, 16)
PROBED_CONTEXT = 200
PROBES = 21


def at_once(
    decoder: SpeculativeDecoder, prompts: list[list[int]], budget: int, *, number: int
) -> tuple[Contender, list[RequestState]]:
    """Decode all prompts, so many in flight at any time; give the time and the requests."""
    requests = [
        RequestState.of(prompt, SamplingParams(max_new_tokens=budget)) for prompt in prompts
    ]
    waiting, running = list(requests), []
    began = time.perf_counter()
    with tqdm(total=len(prompts), desc=f"{number} at once", unit="prompt", file=sys.stderr) as bar:
        while waiting or running:
            while waiting and len(running) < number:
                running.append(waiting.pop(0))
            decoder.step(running)
            left = [each for each in running if not each.finish_reason]
            bar.update(len(running) - len(left))
            running = left
    seconds = time.perf_counter() - began
    outputs = [each.output_ids for each in requests]
    name = f"{'ours' if isinstance(decoder.policy, FirstDrafts) else 'what pays'}, {number} at once"
    timed = Contender(name=name, decode=lambda ids: [], seconds=seconds, outputs=outputs)
    return timed, requests


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


@torch.inference_mode()
def near_ties(
    contenders: list[Contender], reference: Contender, *, prompts: list[list[int]], target: Target
) -> list[dict[str, Any]]:
    """List where an output leaves the reference's, with the gap of the target's two best logits."""
    found = []
    for contender in contenders:
        for index, (ours, theirs) in enumerate(
            zip(contender.outputs, reference.outputs, strict=True)
        ):
            if ours == theirs:
                continue
            place = num_matching_tokens(ours, theirs)
            ids = torch.tensor([[*prompts[index], *ours[:place]]], device=target.device)
            best, second = target.model(ids, logits_to_keep=1).logits[0, -1].topk(2).values.tolist()
            found.append(
                {
                    "prompt": index,
                    "who": contender.name,
                    "place": place,
                    "logit_gap": round(best - second, 6),
                }
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
    """Measure everything."""
    load_before = os.getloadavg()[0]
    torch.set_num_threads(parsed.threads)
    prompts, budget = read_prompts(parsed.prompts, parsed.num_prompts), parsed.max_new_tokens
    longest = max(prompts, key=len)  # so that no later prompt wants a larger cache, compiled anew
    field = gather(parsed, longest)
    for contender in field.in_turns:
        contender.decode(longest)
        contender.decode(prompts[0])
    for prompt in tqdm(prompts, desc="in turns", unit="prompt", file=sys.stderr):
        for contender in field.in_turns:
            contender.take(prompt)
    eight, _ = at_once(field.paying_decoder, prompts, budget, number=8)
    one, _ = at_once(field.paying_decoder, prompts, budget, number=1)
    alone, requests = at_once(field.decoder, prompts, budget, number=1)
    widths = verify_ms(field.decoder)
    field.target.model.set_attn_implementation("sdpa")
    checked = [field.own, field.paying, eight, field.plain, field.lookup]
    own = field.own
    return {
        "bench": "decode",
        **describe_machine(parsed.threads),
        "load_before": round(load_before, 2),
        "prompts": len(prompts),
        "tokens_per_s": {
            each.name: round(each.tokens_per_s, 2) for each in [*field.in_turns, eight, one, alone]
        },
        "settings_tried": {each.name: round(each.tokens_per_s, 2) for each in field.settings},
        **where_time_goes(requests),
        "verify_ms": {str(width): round(ms, 2) for width, ms in widths.items()},
        "near_ties": near_ties(checked, field.official, prompts=prompts, target=field.target),
        "official_ratio": _ratio(own, field.official),
        "wall_clock_ratio": _ratio(own, field.generate),
        "what_pays_ratio": _ratio(field.paying, field.generate),
        "lookup_ratio": _ratio(own, field.lookup),
        "what_pays_lookup_ratio": _ratio(field.paying, field.lookup),
        "batch8_ratio": _ratio(eight, one),
        "verify8_over_1": round(widths[8] / widths[1], 3),
    }


def where_time_goes(requests: list[RequestState]) -> dict[str, Any]:
    """Give acceptance length, mean milliseconds of a step's parts and of a prefill."""
    steps = [step for each in requests for step in each.steps]
    parts = {
        "draft": [step.draft_s for step in steps],
        "verify": [step.verify_s for step in steps],
        "bookkeeping": [step.bookkeeping_s for step in steps],
    }
    return {
        "acceptance_length": round(statistics.mean(step.acceptance_length for step in steps), 3),
        "step_ms": {part: round(1e3 * statistics.mean(each), 2) for part, each in parts.items()},
        "prefill_ms": round(1e3 * statistics.mean(each.prefill_s for each in requests), 2),
    }


def _ratio(ours: Contender, other: Contender) -> float:
    return round(ours.tokens_per_s / other.tokens_per_s, 3)


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
