"""Stored answers as token ids become conversations: what the target wrote, not a token changed.

A server or an earlier run may keep its answers as ids. Text would lose them, since decoding and
encoding again need not give the same ids back, so the record carries the ids and `collect` uses
them as they are. A line of such a file is

    {"index": 0, "prompt_token_ids": [...], "output_token_ids": [...], "finish_reason": "stop"}

where `index` is the line of the question in its own file. Whether the ids are this target's is
checked twice: its chat template must render the question to the prompt's ids, and its greedy choice
must be the stored token nearly everywhere. `benchmarks/gsm8k.py` runs this.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from msgspec.structs import replace

from dflash_data.record_index import write_record_index
from dflash_train.config import require
from dflash_train.features.target import Target
from dflash_train.records.chat_template import render_prompt
from dflash_train.records.conversation import SPLITS, Conversation, Turn, write_shard
from dflash_train.records.manifest import Counts, FileEntry, Manifest, atomic_path

FINISH_REASONS = ("stop", "length")
LEAST_GREEDY_SHARE = 0.98
"""Share of stored tokens that must be the target's choice. Batched generation rounds differently
and flips a near-tie now and then; another model of the same family stays far below."""


@dataclass(kw_only=True)
class TokenAnswer:
    """One line of a file of answers."""

    index: int
    """Line of the question in its file, from 0."""
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    """With the stop token if the answer ended by itself."""
    finish_reason: str
    """`stop` or `length`."""


def read_questions(path: Path) -> list[str]:
    """Read the `question` of every line of a JSONL file, in order.

    Raises:
        ValueError: The file is missing, or a line has no question; the message names the line.
    """
    questions: list[str] = []
    for number, fields in enumerate(_read_lines(path), start=1):
        question = fields.get("question")
        if not isinstance(question, str) or not question:
            raise ValueError(f"{path}:{number} has no `question`. Each line needs one, as text.")
        questions.append(question)
    return questions


def read_token_answers(path: Path) -> dict[int, TokenAnswer]:
    """Read a file of answers, by index.

    Raises:
        ValueError: The file is missing, or a line does not hold an answer; the message names it.
    """
    answers: dict[int, TokenAnswer] = {}
    for number, fields in enumerate(_read_lines(path), start=1):
        try:
            answer = TokenAnswer(**fields)
            ids = [*answer.prompt_token_ids, *answer.output_token_ids]
        except TypeError as error:
            raise ValueError(
                f"{path}:{number} must hold index, two lists prompt_token_ids and "
                "output_token_ids, and finish_reason, nothing else. Write the file again."
            ) from error
        require(
            all(isinstance(token_id, int) and token_id >= 0 for token_id in ids)
            and bool(answer.prompt_token_ids)
            and bool(answer.output_token_ids)
            and answer.finish_reason in FINISH_REASONS
            and answer.index not in answers,
            f"{path}:{number} must hold two non-empty lists of token ids, a finish_reason of "
            f"{' or '.join(FINISH_REASONS)}, and an index of its own. Write the file again.",
        )
        answers[answer.index] = answer
    return answers


def open_record(question: str, *, record_id: str, source: str, split: str) -> Conversation:
    """Give the record of a question that the stage `regenerate` still has to answer."""
    return Conversation(
        id=record_id,
        source=source,
        messages=[Turn(role="user", content=question)],
        session=record_id,
        split=split,
    )


def answered_record(
    record: Conversation, answer: TokenAnswer, *, target: Target, max_new_tokens: int
) -> Conversation:
    """Join an open record with the target's stored answer; the ids are taken as they are.

    Args:
        record: From `open_record`.
        answer: The answer to this question.
        target: Who wrote it; gives tokenizer, name and revision.
        max_new_tokens: Budget under which it was written, in tokens.

    Raises:
        ValueError: The target's chat template renders another prompt, or the answer is longer than
            the budget.
    """
    require(
        render_prompt(target.tokenizer, record.messages) == answer.prompt_token_ids,
        f"{record.id}: the stored prompt_token_ids are not what the chat template of "
        f"target.name_or_path (={target.name}) renders. Take the answers of this target, or remove "
        "their folder to have it answer again.",
    )
    num_output = len(answer.output_token_ids)
    require(
        num_output <= max_new_tokens,
        f"data.max_new_tokens (={max_new_tokens}) must be at least {num_output}, the length of the "
        f"stored answer of {record.id}. Set it to the budget under which the answers were written.",
    )
    text = target.tokenizer.decode(answer.output_token_ids, skip_special_tokens=True)
    return replace(
        record,
        messages=[*record.messages, Turn(role="assistant", content=str(text))],
        sampling={"temperature": 0.0, "max_tokens": max_new_tokens},
        finish_reason=answer.finish_reason,
        usage={"prompt_tokens": len(answer.prompt_token_ids), "completion_tokens": num_output},
        prompt_token_ids=answer.prompt_token_ids,
        output_token_ids=answer.output_token_ids,
        tokenizer=target.tokenizer_hash,
        model=target.name,
        model_revision=target.revision,
        on_policy=True,
        on_policy_reason="match",
    )


def greedy_share(records: list[Conversation], target: Target) -> float:
    """Give the share of stored answer tokens that are the target's own greedy choice.

    Args:
        records: Answered records with exact token ids; each takes one target pass.
        target: The target that is said to have written them.
    """
    num_equal = num_tokens = 0
    for record in records:
        prompt, output = record.prompt_token_ids, record.output_token_ids
        assert prompt is not None
        assert output is not None
        fed = torch.tensor([[*prompt, *output[:-1]]], device=target.device)
        chosen = target.forward(fed).logits[0, len(prompt) - 1 :].argmax(-1)  # [N]
        num_equal += int((chosen.cpu() == torch.tensor(output)).sum())
        num_tokens += len(output)
    return num_equal / num_tokens


def check_on_policy(records: list[Conversation], target: Target) -> None:
    """Raise ValueError unless the target would write these answers again, near-ties apart."""
    share = greedy_share(records, target)
    require(
        share >= LEAST_GREEDY_SHARE,
        f"target.name_or_path (={target.name}) chooses only {share:.1%} of the tokens of the "
        f"stored answers, and at least {LEAST_GREEDY_SHARE:.0%} must be its own. Take the answers "
        "of this target, or remove their folder to have it answer again.",
    )


def write_conversations(
    folder: Path, records: Iterable[Conversation], manifest: Manifest
) -> Manifest:
    """Write `conversations/` of a run as `ingest` does: one shard per split, manifest last.

    Args:
        folder: The folder, replaced whole.
        records: Records of any split, answered or open.
        manifest: Says who asked; counts and outputs are filled here.
    """
    all_records = list(records)
    with atomic_path(folder) as partial:
        partial.mkdir()
        for split in SPLITS:
            path = partial / f"{split}-00000.jsonl.gz"
            num_rows = write_shard(path, [each for each in all_records if each.split == split])
            manifest.outputs.append(FileEntry.of(path, partial, rows=num_rows))
        manifest.outputs.append(FileEntry.of(write_record_index(partial), partial))
        manifest.counts = Counts(read=len(all_records), kept=len(all_records))
        manifest.write(partial)
    return manifest


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON objects of a file; their content never enters a message."""
    require(path.is_file(), f"{path} does not exist. Give the folder that holds it.")
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number} is not JSON. Each line must be an object."
            ) from error
        require(isinstance(fields, dict), f"{path}:{number} must be a JSON object.")
        lines.append(fields)
    return lines
