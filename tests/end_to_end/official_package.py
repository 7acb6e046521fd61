"""Does the official package commit what our decoder commits, step by step?

    make official-check        # after `make demo`; installs dflash==0.1.0 beside the environment

    python tests/end_to_end/official_package.py --checkpoint DIR --target DIR --prompts FILE.jsonl \
        --num-prompts 32 --max-new-tokens 128 --demand

Loads a trained plain DFlash or DFlash 2 checkpoint with the PyPI package `dflash`, lets its
`dflash_generate` decode prompts greedily (float32, CPU) and compares tokens, and the accepted
drafts of every step, with our decoder. Without arguments it takes the checkpoint and the held-out
prompts of the recipe's run.

Exits 1 on a difference, or if too few drafted tokens were accepted to prove anything: `--demand`
asks for 500 of them at an acceptance length of 1.5. The last line of stdout is one line of JSON.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import torch
from dflash import model as official  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.live import choose_prompts
from dflash_inference.trace import DecodeTrace, StepTrace, first_difference
from dflash_train.config import EvaluateConfig, compose
from dflash_train.drafter.checkpoint import load_checkpoint
from dflash_train.features.store import FeatureStore
from dflash_train.features.target import load_target
from dflash_train.stages.workshop import Workshop

DEMANDED_ACCEPTED, DEMANDED_LENGTH = 500, 1.5
CLASSES = {
    "DFlashDraftModel": official.DFlashDraftModel,
    "DFlash2DraftModel": official.DFlash2DraftModel,
}


@dataclass(kw_only=True)
class Prompt:
    """One prompt and the name under which a difference is reported."""

    name: str
    token_ids: list[int]


@dataclass(kw_only=True)
class Comparison:
    """What was compared so far."""

    num_prompts: int = 0
    num_equal: int = 0
    """Prompts with the same tokens and the same accepted drafts at each step."""
    num_steps: int = 0
    num_accepted: int = 0
    """Drafted tokens that joined an output, clipped as the official package clips them."""

    @property
    def acceptance_length(self) -> float:
        """Tokens committed per step."""
        return 1 + self.num_accepted / max(1, self.num_steps)

    def add(self, prompt: Prompt, ours: DecodeTrace, theirs: DecodeTrace) -> None:
        """Count one prompt and say on stderr where it differs."""
        # The official loop writes its counts down after clipping.
        difference = first_difference(ours, theirs, counts_are_clipped=True)
        is_equal = ours.output_ids == theirs.output_ids and difference is None
        if not is_equal:
            print(f"{prompt.name}: first difference {difference}", file=sys.stderr)
        self.num_prompts += 1
        self.num_equal += is_equal
        self.num_steps += len(ours.steps)
        self.num_accepted += sum(step.committed - 1 for step in ours.steps)


def read_prompts(path: Path, wanted: int, *, config: EvaluateConfig) -> list[Prompt]:
    """Take prompts from a JSONL file with `prompt_token_ids`, or from a folder of features.

    Raises:
        ValueError: There are fewer than wanted, or a line is no prompt.
    """
    if path.is_file():
        lines = path.read_bytes().splitlines()[:wanted]
        prompts = [_read_prompt(line, path, number) for number, line in enumerate(lines, start=1)]
    else:
        chosen = choose_prompts(
            replace(config, live_traffic=wanted), {"test": FeatureStore.open(path)}
        )
        prompts = [Prompt(name=each.row.id, token_ids=each.token_ids) for each in chosen]
    if len(prompts) < wanted:
        raise ValueError(
            f"--prompts (={path}) holds {len(prompts)} of {wanted} prompts. Lower --num-prompts."
        )
    return prompts


def _read_prompt(line: bytes, path: Path, number: int) -> Prompt:
    try:
        return Prompt(
            name=f"{path.name}:{number}", token_ids=orjson.loads(line)["prompt_token_ids"]
        )
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"--prompts (={path}): line {number} is no JSON object with prompt_token_ids "
            f"({type(error).__name__}). Give one a line."
        ) from error


def load_official(folder: Path) -> Any:
    """Load a checkpoint with the official class that its `config.json` names.

    Raises:
        ValueError: The package has no such class, or would ignore the reduced draft vocabulary.
    """
    content = orjson.loads((folder / "config.json").read_bytes())
    name = content["architectures"][0]
    if name not in CLASSES:
        raise ValueError(
            f"checkpoint (={folder}): architecture {name} is unknown to dflash 0.1.0, which has "
            f"{', '.join(CLASSES)}. Compare it by replay."
        )
    if content.get("draft_vocab_size", content["vocab_size"]) not in (None, content["vocab_size"]):
        raise ValueError(
            f"checkpoint (={folder}): dflash 0.1.0 ignores draft_vocab_size "
            f"(={content['draft_vocab_size']}) and drafts from the whole vocabulary. Compare it by "
            "replay."
        )
    return CLASSES[name].from_pretrained(folder, dtype=torch.float32).eval()


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


def compare(
    prompts: Iterable[Prompt], ours: SpeculativeDecoder, theirs: Any, *, max_new_tokens: int
) -> Comparison:
    """Decode every prompt with both and compare them."""
    official._cuda_time = time.perf_counter  # it asks CUDA to synchronise, even on a CPU
    comparison = Comparison()
    for prompt in tqdm(prompts, desc="official package", unit="prompt", file=sys.stderr):
        mine = ours.generate(prompt.token_ids, max_new_tokens=max_new_tokens)
        other = official_trace(
            theirs,
            ours.target.model,
            prompt.token_ids,
            max_new_tokens=max_new_tokens,
            stop_ids=sorted(ours.target.stop_token_ids),
        )
        comparison.add(prompt, mine, other)
    return comparison


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare with the official package.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    parser.add_argument("--checkpoint", type=Path, help="drafter folder; default: the run's best")
    parser.add_argument("--target", help="target.name_or_path; default: the recipe's")
    parser.add_argument(
        "--prompts", type=Path, help="JSONL file or features folder; default: the run's test split"
    )
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--min-accepted", type=int, default=300, help="drafts, to pass")
    parser.add_argument(
        "--demand",
        action="store_true",
        help=f"pass only with {DEMANDED_ACCEPTED} accepted drafts at length {DEMANDED_LENGTH}",
    )
    return parser.parse_args()


def main() -> int:
    """Compare and print the verdict."""
    parsed = parse_arguments()
    workshop = Workshop(compose(parsed.overrides))
    config = workshop.config
    if parsed.target:
        config.target = replace(config.target, name_or_path=parsed.target, revision=None)
    folder = parsed.checkpoint or workshop.checkpoint
    path = parsed.prompts or config.run_dir / "features" / "test"
    prompts = read_prompts(path, parsed.num_prompts, config=config.evaluate)
    drafter = load_checkpoint(folder)
    theirs = load_official(folder)
    target = load_target(config.target, drafter.config.target_layer_ids)
    found = compare(
        prompts,
        SpeculativeDecoder(target, drafter),
        theirs,
        max_new_tokens=parsed.max_new_tokens,
    )
    fewest = DEMANDED_ACCEPTED if parsed.demand else parsed.min_accepted
    shortest = DEMANDED_LENGTH if parsed.demand else 1.0
    passed = (
        found.num_equal == found.num_prompts
        and found.num_accepted >= fewest
        and found.acceptance_length >= shortest
    )
    figures = {
        "checkpoint": str(folder),
        "architecture": type(theirs).__name__,
        "prompts": found.num_prompts,
        "prompts_equal": found.num_equal,
        "steps": found.num_steps,
        "accepted_drafts": found.num_accepted,
        "acceptance_length": round(found.acceptance_length, 3),
        "passed": passed,
    }
    print(orjson.dumps(figures).decode())
    return 0 if passed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
