"""Which records the target answers, and in which groups: fixed and stored before the work.

The grouping is a function of the input alone. In this process, rows of one turn and of similar
length are answered together, turn by turn. Servers batch for themselves: there a group is a
session, whose turns are asked one after another.
"""

import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import orjson
from tqdm import tqdm

from dflash_data.drops import DropReason
from dflash_data.ingest.explode import missing_answers
from dflash_data.regenerate.answers import Histories
from dflash_train.config import DataConfig, require
from dflash_train.features.target_text import WrittenTarget
from dflash_train.records.chat_template import UnstableBoundaryError, render_request
from dflash_train.records.conversation import Conversation, read_split
from dflash_train.records.manifest import write_bytes

PLAN_NAME = "plan.json"


@dataclass(kw_only=True)
class Group:
    """Records of one split: a batch of this process, or a session for the servers."""

    split: str
    ids: list[str]


@dataclass(kw_only=True)
class Plan:
    """The whole work of one run, fixed before it starts."""

    groups: list[Group] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    """Drop reason by id."""


def splits_in(folder: Path) -> list[str]:
    """List the splits that have record shards in a folder."""
    return sorted({path.name.rsplit("-", 1)[0] for path in folder.glob("*-*.jsonl.gz")})


def needs_answer(conversation: Conversation) -> bool:
    """Say whether the target still has to write this answer."""
    return conversation.answer is None or not conversation.on_policy


def read_open_records(folder: Path, data: DataConfig) -> dict[str, Conversation]:
    """Read the conversations to answer, by id; a logged answer of another model is taken off.

    The answers to come are the serving sampling's, so it takes the place of the logged one: the
    thinking mode among it decides how prompts are rendered.
    """
    found: dict[str, Conversation] = {}
    for split in splits_in(folder):
        for conversation in read_split(folder, split):
            if needs_answer(conversation):
                found[conversation.id] = _as_asked(conversation, split, data)
    return found


def make_plan(
    folder: Path,
    open_records: dict[str, Conversation],
    histories: Histories,
    *,
    target: WrittenTarget,
    data: DataConfig,
) -> Plan:
    """Give the plan that an earlier run stored in a folder, else make and store one."""
    path = folder / PLAN_NAME
    if path.exists():
        content = orjson.loads(path.read_bytes())
        groups = [Group(**group) for group in content["groups"]]
        return Plan(groups=groups, dropped=content["dropped"])
    plan = Plan()
    lengths: dict[str, int] = {}
    for record in tqdm(open_records.values(), desc="plan", unit="row", file=sys.stderr):
        length = _longest_prompt(record, target, data)
        reason = _why_not(record, length, histories, data)
        if reason is not None:
            plan.dropped[record.id] = reason.value
        elif length is not None:
            lengths[record.id] = length
    group = _sessions if data.endpoints.urls else _batches
    plan.groups = group(open_records, lengths, data)
    require(
        DropReason.too_long.value not in plan.dropped.values() or bool(plan.groups),
        f"data.max_prompt_tokens (={data.max_prompt_tokens}) drops all {len(open_records)} "
        "conversations. Raise it.",
    )
    write_bytes(path, orjson.dumps(plan))
    return plan


def _batches(
    open_records: dict[str, Conversation], lengths: dict[str, int], data: DataConfig
) -> list[Group]:
    """Group by turn, split and prompt length: answers come in order, and little is padded."""
    waves: dict[tuple[int, str], list[tuple[int, str]]] = defaultdict(list)
    for record_id, length in lengths.items():
        record = open_records[record_id]
        waves[record.turn, record.split or ""].append((length, record_id))
    groups: list[Group] = []
    for (_turn, split), members in sorted(waves.items()):
        ids = [record_id for _length, record_id in sorted(members)]
        for first in range(0, len(ids), data.batch_size):
            groups.append(Group(split=split, ids=ids[first : first + data.batch_size]))
    return groups


def _sessions(
    open_records: dict[str, Conversation], lengths: dict[str, int], data: DataConfig
) -> list[Group]:
    """Group by session, turns in order."""
    sessions: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record_id in lengths:
        record = open_records[record_id]
        sessions[record.split or "", record.session or record.id].append(record_id)
    return [
        Group(split=split, ids=sorted(ids, key=lambda record_id: open_records[record_id].turn))
        for (split, _session), ids in sessions.items()
    ]


def _why_not(
    record: Conversation, length: int | None, histories: Histories, data: DataConfig
) -> DropReason | None:
    if length is None:
        return DropReason.unstable_boundary
    if not histories.is_complete(record):
        return DropReason.content_missing
    return DropReason.too_long if length > data.max_prompt_tokens else None


def _longest_prompt(record: Conversation, target: WrittenTarget, data: DataConfig) -> int | None:
    """Bound the prompt's tokens: history that is still to be written counts with its budget.

    None where the template refuses the messages.
    """
    messages = [replace(turn, content=turn.content or "") for turn in record.messages]
    try:
        rendered = render_request(target.tokenizer, replace(record, messages=messages))
    except UnstableBoundaryError:
        return None
    return len(rendered) + len(missing_answers(record)) * data.max_new_tokens


def _as_asked(conversation: Conversation, split: str, data: DataConfig) -> Conversation:
    """Take off the answer with what is known of it, so that no span points behind the prompt."""
    prompt = conversation.prompt
    spans = [span for span in conversation.privacy.spans if span[0] < len(prompt)]
    settings = asdict(data.serving_sampling) | {"max_tokens": data.max_new_tokens}
    return replace(
        conversation,
        messages=prompt,
        split=split,
        privacy=replace(conversation.privacy, spans=spans),
        sampling={name: value for name, value in settings.items() if value is not None},
        prompt_token_ids=None,
        output_token_ids=None,
        served_acceptance_length=None,
    )
