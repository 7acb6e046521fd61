"""What `regenerate` would cost, before it starts: calls are counted, the rest stands on a sample.

    dflash-train regenerate recipe=smollm2 --dry-run

Every call that waits for an answer is counted; a few, drawn evenly from all, are rendered, and
every answer is taken to be as long as its budget: the estimate is an upper bound. Time is measured
on one batch of them, twice: answers of one token, which is the prompt's work, and of a few, which
gives the price of a step. Servers have their own time and keep no features. Nothing is written.
"""

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dflash_data.collect.forward import stored_token_bytes
from dflash_data.regenerate.plan import longest_prompt, read_requests
from dflash_train.config import DataConfig, RecipeConfig
from dflash_train.features.target import Target
from dflash_train.features.target_text import WrittenTarget
from dflash_train.records.chat_template import render_request
from dflash_train.records.conversation import Conversation

_SAMPLED_CALLS = 256
_SAMPLED_STEPS = 16


@dataclass(kw_only=True)
class RegenerationEstimate:
    """What answering a run's open calls takes, at most."""

    num_calls: int = 0
    """Calls that wait for an answer; the few that will be dropped are among them."""
    prompt_tokens: int = 0
    """Of all calls, from the mean of the sample."""
    answer_tokens: int = 0
    """If every answer uses its budget."""
    disk_bytes: int | None = None
    """Features of prompts and answers; None where servers answer."""
    seconds: float | None = None
    """On one process like this one; None where servers answer."""

    def lines(self) -> list[str]:
        """Give it as lines to print."""
        lines = [
            f"calls: {self.num_calls} to answer",
            f"tokens: {self.prompt_tokens} in prompts, up to {self.answer_tokens} in answers",
        ]
        if self.disk_bytes is not None:
            lines.append(f"disk: up to {self.disk_bytes} bytes of features")
        if self.seconds is not None:
            lines.append(f"time: up to {self.seconds:.0f} s on one process")
        return lines


def estimate_regeneration(config: RecipeConfig, *, target: WrittenTarget) -> RegenerationEstimate:
    """Count the calls to answer and measure a sample of them.

    Args:
        config: The recipe; `conversations` of the run folder is read.
        target: The loaded target; where servers answer, its tokenizer is enough.
    """
    data = config.data
    num_calls, sample = _draw(sorted((config.run_dir / "conversations").glob("*.jsonl.gz")), data)
    lengths = [longest_prompt(record, target, data) for record in sample]
    known = [length for length in lengths if length is not None]
    mean = sum(known) / max(1, len(known))
    estimate = RegenerationEstimate(
        num_calls=num_calls,
        prompt_tokens=round(num_calls * mean),
        answer_tokens=num_calls * data.max_new_tokens,
    )
    if isinstance(target, Target) and not data.endpoints.urls:
        num_tokens = estimate.prompt_tokens + estimate.answer_tokens
        estimate.disk_bytes = num_tokens * stored_token_bytes(target, data)
        first_turns = [record for record in sample if len(record.messages) == _num_known(record)]
        estimate.seconds = num_calls / data.batch_size * _seconds(first_turns, target, data)
    return estimate


def _draw(shards: Iterable[Path], data: DataConfig) -> tuple[int, list[Conversation]]:
    """Count the calls to answer and draw some, each with the same chance (reservoir sampling)."""
    chance = random.Random(0)
    sample: list[Conversation] = []
    num_calls = 0
    for path in shards:
        for record in read_requests(path, data):
            num_calls += 1
            if len(sample) < _SAMPLED_CALLS:
                sample.append(record)
            elif (place := chance.randrange(num_calls)) < _SAMPLED_CALLS:
                sample[place] = record
    return num_calls, sample


def _num_known(record: Conversation) -> int:
    """Count the messages whose text is there, and not still to be written."""
    return sum(turn.content is not None or bool(turn.tool_calls) for turn in record.messages)


def _seconds(records: list[Conversation], target: Target, data: DataConfig) -> float:
    """Measure a batch: the prompts' work once, then the price of a step, for the whole budget."""
    prompts = sorted((render_request(target.tokenizer, record) for record in records), key=len)
    middle = max(0, (len(prompts) - data.batch_size) // 2)
    batch = prompts[middle : middle + data.batch_size]
    if not batch:
        return 0.0
    num_steps = min(_SAMPLED_STEPS, data.max_new_tokens)
    _timed(batch, target, 1)  # the first pass of all is slower
    first = _timed(batch, target, 1)
    if num_steps == 1:
        return first
    step = max(0.0, _timed(batch, target, num_steps) - first) / (num_steps - 1)
    return first + step * (data.max_new_tokens - 1)


def _timed(batch: list[list[int]], target: Target, max_new_tokens: int) -> float:
    started = time.perf_counter()
    target.generate_batch(batch, max_new_tokens=max_new_tokens)
    return time.perf_counter() - started
