"""The target answers, and its features are kept from the very passes that wrote the answers.

    dflash-train regenerate recipe=smollm2

A session's turns are answered in order, each with the target's own earlier answers in its
history. The grouping into batches is a function of the input alone and is stored before the
work: a batch cut short is done again whole, so a killed run ends with the same bytes. Each batch
leaves one feature shard and then, as its mark of completion, its records.
"""

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import orjson
import torch
from tqdm import tqdm

from dflash_data.drops import DropReason, all_reasons
from dflash_data.explode import missing_answers, prefix_key
from dflash_data.feature_rows import feature_row, index_line
from dflash_data.record_index import write_record_index
from dflash_train.config import DataConfig, RecipeConfig, require
from dflash_train.features.store import INDEX_NAME, IndexLine, write_index
from dflash_train.features.store import write_shard as write_feature_shard
from dflash_train.features.target import GeneratedRow, Target
from dflash_train.records.chat_template import render_prompt
from dflash_train.records.conversation import (
    Conversation,
    Turn,
    read_shard,
    read_split,
    write_shard,
)
from dflash_train.records.manifest import Counts, FileEntry, Manifest, write_bytes

FOLDER = "regenerated"
PLAN_NAME = "plan.json"


@dataclass(kw_only=True)
class Batch:
    """Rows of one split that the target answers together."""

    split: str
    ids: list[str]


@dataclass(kw_only=True)
class Plan:
    """The whole work of one run, fixed before it starts."""

    batches: list[Batch] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    """Drop reason by id."""


def regenerate(config: RecipeConfig, *, target: Target, manifest: Manifest) -> Manifest:
    """Answer every conversation that is not on-policy, and store records and features.

    Args:
        config: The recipe; `run_dir/conversations` is read, `run_dir/regenerated` is written.
        target: The loaded target.
        manifest: Prepared by the caller; completed and written last.
    """
    folder = config.run_dir / FOLDER
    open_records = _read_open(config.run_dir / "conversations")
    plan = _stored_plan(folder)
    if plan is None:
        plan = _make_plan(open_records, target, config.data)
        write_bytes(folder / PLAN_NAME, orjson.dumps(plan))
    answered = _answer_all(plan, open_records, folder, target, config.data)
    _write_splits(folder, open_records, answered)
    _write_indexes(folder, plan, answered, config.data)
    drops = Counter(DropReason(reason) for reason in plan.dropped.values())
    manifest.counts = Counts(read=len(open_records), kept=len(answered), dropped=all_reasons(drops))
    manifest.target = target.describe()
    manifest.details = {"teacher_top_k": config.data.teacher_top_k}
    manifest.outputs = _outputs(folder, answered)
    manifest.write(folder)
    return manifest


def splits_in(folder: Path) -> list[str]:
    """List the splits that have record shards in a folder."""
    return sorted({path.name.rsplit("-", 1)[0] for path in folder.glob("*-*.jsonl.gz")})


def needs_answer(conversation: Conversation) -> bool:
    """Say whether the target still has to write this answer."""
    return conversation.answer is None or not conversation.on_policy


def _read_open(folder: Path) -> dict[str, Conversation]:
    """Read the conversations to answer, by id; a logged answer of another model is taken off."""
    found: dict[str, Conversation] = {}
    for split in splits_in(folder):
        for conversation in read_split(folder, split):
            if needs_answer(conversation):
                found[conversation.id] = replace(
                    conversation, messages=conversation.prompt, split=split
                )
    return found


def _stored_plan(folder: Path) -> Plan | None:
    path = folder / PLAN_NAME
    if not path.exists():
        return None
    content = orjson.loads(path.read_bytes())
    content["batches"] = [Batch(**batch) for batch in content["batches"]]
    return Plan(**content)


def _make_plan(open_records: dict[str, Conversation], target: Target, data: DataConfig) -> Plan:
    """Group by turn, split and prompt length: answers come in order, and little is padded."""
    plan = Plan()
    known_prompts = {prefix_key(record.messages, record) for record in open_records.values()}
    waves: dict[tuple[int, str], list[tuple[int, str]]] = defaultdict(list)
    for record in tqdm(open_records.values(), desc="plan", unit="row", file=sys.stderr):
        length = _longest_prompt(record, target, data)
        history = [prefix_key(record.messages[:i], record) for i in missing_answers(record)]
        if not known_prompts.issuperset(history):
            plan.dropped[record.id] = DropReason.content_missing.value
        elif length > data.max_prompt_tokens:
            plan.dropped[record.id] = DropReason.too_long.value
        else:
            waves[record.turn, record.split or ""].append((length, record.id))
    for (_turn, split), members in sorted(waves.items()):
        ids = [record_id for _length, record_id in sorted(members)]
        for first in range(0, len(ids), data.batch_size):
            plan.batches.append(Batch(split=split, ids=ids[first : first + data.batch_size]))
    require(
        bool(plan.batches) or not open_records,
        f"data.max_prompt_tokens (={data.max_prompt_tokens}) drops all {len(open_records)} "
        "conversations. Raise it.",
    )
    return plan


def _longest_prompt(record: Conversation, target: Target, data: DataConfig) -> int:
    """Bound the prompt's tokens: history that is still to be written counts with its budget."""
    messages = [replace(turn, content=turn.content or "") for turn in record.messages]
    rendered = render_prompt(target.tokenizer, messages, tools=record.tools)
    return len(rendered) + len(missing_answers(record)) * data.max_new_tokens


def _answer_all(
    plan: Plan,
    open_records: dict[str, Conversation],
    folder: Path,
    target: Target,
    data: DataConfig,
) -> dict[str, Conversation]:
    """Work through the plan; batches finished by an earlier run are read back."""
    answered: dict[str, Conversation] = {}
    texts: dict[str, str | None] = {}
    num_rows = sum(len(batch.ids) for batch in plan.batches)
    with tqdm(total=num_rows, desc="regenerate", unit="row", file=sys.stderr) as progress:
        for number, batch in enumerate(plan.batches):
            records_path = folder / "batches" / f"{number:05d}.jsonl.gz"
            shard_path = _shard_path(folder, batch.split, number)
            if not (records_path.exists() and shard_path.exists()):
                asked = [_with_history(open_records[i], texts) for i in batch.ids]
                records = _answer_batch(asked, shard_path, target=target, data=data)
                write_shard(records_path, records)  # last: its presence says the batch is done
            for record in read_shard(records_path):
                answered[record.id] = record
                asked_as = open_records[record.id]
                texts[prefix_key(asked_as.messages, asked_as)] = record.messages[-1].content
            progress.update(len(batch.ids))
    return answered


def _answer_batch(
    asked: list[Conversation], shard_path: Path, *, target: Target, data: DataConfig
) -> list[Conversation]:
    """Answer records together, write features and teacher of the passes that did, give records."""
    prompts = [render_prompt(target.tokenizer, r.messages, tools=r.tools) for r in asked]
    rows = target.generate_batch(
        prompts, max_new_tokens=data.max_new_tokens, teacher_top_k=data.teacher_top_k
    )
    records = [
        _answered(record, prompt_ids, row, target=target)
        for record, prompt_ids, row in zip(asked, prompts, rows, strict=True)
    ]
    feature_rows = [
        feature_row(record, row.features, data, teacher=row.teacher)
        for record, row in zip(records, rows, strict=True)
    ]
    dtype = getattr(torch, data.features_dtype.value)
    write_feature_shard(shard_path, feature_rows, dtype=dtype)
    return records


def _with_history(record: Conversation, texts: dict[str, str | None]) -> Conversation:
    """Put the target's earlier answers where the log has none."""
    messages = list(record.messages)
    for place in missing_answers(record):
        text = texts[prefix_key(record.messages[:place], record)]
        messages[place] = replace(messages[place], content=text)
    return replace(record, messages=messages)


def _answered(
    record: Conversation, prompt_ids: list[int], row: GeneratedRow, *, target: Target
) -> Conversation:
    text = target.tokenizer.decode(row.output_ids, skip_special_tokens=True)
    answer = Turn(role="assistant", content=str(text))
    return replace(
        record,
        messages=[*record.messages, answer],
        finish_reason=row.finish_reason,
        usage={"prompt_tokens": len(prompt_ids), "completion_tokens": len(row.output_ids)},
        prompt_token_ids=prompt_ids,
        output_token_ids=row.output_ids,
        tokenizer=target.tokenizer_hash,
        model=target.name,
        model_revision=target.revision,
        origin="regenerated",
        on_policy=True,
        on_policy_reason="match",
    )


def _shard_path(folder: Path, split: str, number: int) -> Path:
    return folder / "features" / split / f"batch-{number:05d}.safetensors"


def _write_splits(
    folder: Path, open_records: dict[str, Conversation], answered: dict[str, Conversation]
) -> None:
    """Write the answered records split by split, in the order in which ingest left them."""
    by_split: dict[str, list[Conversation]] = defaultdict(list)
    for record_id, record in open_records.items():
        if record_id in answered:
            by_split[record.split or ""].append(answered[record_id])
    for split, records in by_split.items():
        write_shard(folder / f"{split}-00000.jsonl.gz", records)
    write_record_index(folder)


def _write_indexes(
    folder: Path, plan: Plan, answered: dict[str, Conversation], data: DataConfig
) -> None:
    lines: dict[str, list[IndexLine]] = defaultdict(list)
    for number, batch in enumerate(plan.batches):
        shard = _shard_path(folder, batch.split, number).name
        for row, record_id in enumerate(batch.ids):
            lines[batch.split].append(index_line(answered[record_id], data, shard=shard, row=row))
    for split, split_lines in lines.items():
        write_index(folder / "features" / split, split_lines)


def _outputs(folder: Path, answered: dict[str, Conversation]) -> list[FileEntry]:
    rows: dict[str, int] = defaultdict(int)
    tokens: dict[str, int] = defaultdict(int)
    for record in answered.values():
        rows[record.split or ""] += 1
        tokens[record.split or ""] += sum(record.usage.values())
    entries = [
        FileEntry.of(path, folder, rows=rows[split], tokens=tokens[split])
        for split in splits_in(folder)
        for path in sorted(folder.glob(f"{split}-*.jsonl.gz"))
    ]
    others = [folder / INDEX_NAME, *sorted((folder / "features").rglob("*.*"))]
    return entries + [FileEntry.of(path, folder) for path in others]
