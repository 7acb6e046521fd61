"""Does the official package commit what our decoder commits, step by step?

    make official-check        # after `make demo`; installs dflash==0.1.0 beside the environment

Loads the trained checkpoint with the PyPI package `dflash`, lets its `dflash_generate` decode
held-out prompts greedily (float32, CPU) and compares tokens and counts per step with our decoder.
Exits 1 on a difference, or if too few drafted tokens were accepted to prove anything. The last
line of stdout is one line of JSON.
"""

import argparse
import sys
import time
from typing import Any

import orjson
import torch
from dflash import model as official  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.live import choose_prompts
from dflash_inference.trace import DecodeTrace, StepTrace, first_difference
from dflash_train.config import compose
from dflash_train.drafter.checkpoint import load_checkpoint
from dflash_train.features.store import FeatureStore
from dflash_train.stages import Workshop


def official_trace(
    drafter: Any, target: Any, prompt_ids: list[int], *, max_new_tokens: int, stop_ids: list[int]
) -> DecodeTrace:
    """Decode one prompt with the official loop and write it down in our format."""
    result = official.dflash_generate(
        drafter,
        target,
        torch.tensor([prompt_ids]),
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_ids,
        return_stats=True,
    )
    steps, start, end = [], len(prompt_ids), len(prompt_ids) + max_new_tokens
    for committed in result.acceptance_lengths:
        width = min(drafter.block_size, end - start)
        steps.append(
            StepTrace(start=start, width=width, num_accepted=committed - 1, committed=committed)
        )
        start += committed
    output_ids = result.output_ids[0, len(prompt_ids) :].tolist()
    return DecodeTrace(
        prompt_length=len(prompt_ids),
        block_size=drafter.block_size,
        output_ids=output_ids,
        steps=steps,
        finish_reason="stop" if output_ids[-1] in stop_ids else "length",
    )


def main() -> int:
    """Compare and print the verdict."""
    parser = argparse.ArgumentParser(description="Compare with the official package.")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--min-accepted", type=int, default=300)
    parsed = parser.parse_args()
    workshop = Workshop(compose([*parsed.overrides, f"evaluate.live_traffic={parsed.prompts}"]))
    store = FeatureStore.open(workshop.config.run_dir / "features" / "test")
    prompts = choose_prompts(workshop.config.evaluate, {"test": store})
    target = workshop.target
    ours = SpeculativeDecoder(target, load_checkpoint(workshop.checkpoint))
    official._cuda_time = time.perf_counter  # it asks CUDA to synchronise, even on a CPU
    theirs = official.DFlashDraftModel.from_pretrained(workshop.checkpoint, dtype=torch.float32)
    theirs.eval()
    num_equal, num_accepted, num_steps = 0, 0, 0
    for prompt in tqdm(prompts, desc="official package", unit="prompt", file=sys.stderr):
        mine = ours.generate(prompt.token_ids, max_new_tokens=parsed.max_new_tokens)
        other = official_trace(
            theirs,
            target.model,
            prompt.token_ids,
            max_new_tokens=parsed.max_new_tokens,
            stop_ids=sorted(target.stop_token_ids),
        )
        difference = first_difference(mine, other, counts_are_clipped=True)
        if mine.output_ids == other.output_ids and difference is None:
            num_equal += 1
        else:
            print(f"{prompt.row.id}: first difference {difference}", file=sys.stderr)
        num_accepted += sum(step.committed - 1 for step in mine.steps)
        num_steps += len(mine.steps)
    verdict = num_equal == len(prompts) and num_accepted >= parsed.min_accepted
    figures = {
        "checkpoint": str(workshop.checkpoint),
        "prompts": len(prompts),
        "prompts_equal": num_equal,
        "steps": num_steps,
        "accepted_drafts": num_accepted,
        "acceptance_length": round(1 + num_accepted / num_steps, 3),
        "passed": verdict,
    }
    print(orjson.dumps(figures).decode())
    return 0 if verdict else 1


if __name__ == "__main__":
    sys.exit(main())
