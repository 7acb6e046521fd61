"""Which records the target answers, and in which groups: fixed and stored before the work.

There is one plan for each shard of conversations. A session stands whole in one shard, so a shard
is planned, answered and written by itself, and memory holds the records of one and the plans of
all. The grouping is a function of the shard alone. In this process, rows of one turn and of similar
length are answered together, turn by turn. Servers batch for themselves: there a group is a
session, whose turns are asked one after another.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson
from msgspec.structs import replace
from tqdm import tqdm

from dflash_data.drops import DropReason
from dflash_data.ingest.explode import missing_answers
from dflash_data.regenerate.answers import Histories
from dflash_train.config import DataConfig, EndpointApi, require
from dflash_train.features.target_text import WrittenTarget
from dflash_train.records.chat_template import UnstableBoundaryError, render_request
from dflash_train.records.conversation import Conversation, read_shard
from dflash_train.records.manifest import write_bytes

PLAN_FOLDER = "plans"
_SUFFIX = ".jsonl.gz"


@dataclass(kw_only=True)
class ShardPlan:
    """The work on one shard of conversations."""

    name: str
    """Of the shard, without its suffix: split and number, like `train-00003`."""
    groups: list[list[str]] = field(default_factory=list)
    """Ids of records: a group is a batch of this process, or a session for the servers."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Drop reason by id of the records that cannot be asked."""

    @property
    def split(self) -> str:
        """The split of all its records."""
        return self.name.rsplit("-", 1)[0]

    @property
    def num_asked(self) -> int:
        """How many records are to be answered."""
        return sum(map(len, self.groups))


@dataclass(kw_only=True)
class OpenShard:
    """The records of one shard that wait for an answer: what memory holds while it is answered."""

    plan: ShardPlan
    records: dict[str, Conversation]
    """By id, in the order in which `ingest` left them."""
    histories: Histories


def splits_in(folder: Path) -> list[str]:
    """List the splits that have record shards in a folder."""
    return sorted({path.name.rsplit("-", 1)[0] for path in folder.glob(f"*-*{_SUFFIX}")})


def needs_answer(conversation: Conversation) -> bool:
    """Say whether the target still has to write this answer."""
    return conversation.answer is None or not conversation.on_policy


def plan_shards(
    folder: Path, conversations: Path, *, target: WrittenTarget, data: DataConfig
) -> list[ShardPlan]:
    """Give the plans of all shards with open records: those stored in a folder, else new ones.

    Raises:
        ValueError: Every prompt is too long.
    """
    plans: list[ShardPlan] = []
    paths = sorted(conversations.glob(f"*-*{_SUFFIX}"))
    for path in tqdm(paths, desc="plan", unit="shard", file=sys.stderr):
        name = path.name.removesuffix(_SUFFIX)
        stored = folder / PLAN_FOLDER / f"{name}.json"
        if not stored.exists():
            plan = _make_plan(name, _read_open_records(path, data), target=target, data=data)
            write_bytes(stored, orjson.dumps(plan))
        plan = ShardPlan(**orjson.loads(stored.read_bytes()))
        if plan.groups or plan.dropped:
            plans.append(plan)
    dropped = [reason for plan in plans for reason in plan.dropped.values()]
    require(
        DropReason.too_long.value not in dropped or any(plan.groups for plan in plans),
        f"data.max_prompt_tokens (={data.max_prompt_tokens}) drops all {len(dropped)} "
        "conversations. Raise it.",
    )
    return plans


def open_shards(
    plans: Iterable[ShardPlan], conversations: Path, data: DataConfig
) -> Iterator[OpenShard]:
    """Read the planned shards one after another."""
    for plan in plans:
        records = _read_open_records(conversations / f"{plan.name}{_SUFFIX}", data)
        yield OpenShard(plan=plan, records=records, histories=Histories(records))


def read_requests(path: Path, data: DataConfig) -> Iterator[Conversation]:
    """Yield the conversations of a shard to answer; what another model answered is taken off.

    The answers to come are the serving sampling's, so it takes the place of the logged one: the
    thinking mode among it decides how prompts are rendered.
    """
    split = path.name.rsplit("-", 1)[0]
    for conversation in read_shard(path):
        if needs_answer(conversation):
            yield _as_asked(conversation, split, data)


def longest_prompt(record: Conversation, target: WrittenTarget, data: DataConfig) -> int | None:
    """Bound the prompt's tokens: history that is still to be written counts with its budget.

    None where the template refuses the messages.
    """
    messages = [replace(turn, content=turn.content or "") for turn in record.messages]
    try:
        rendered = render_request(target.tokenizer, replace(record, messages=messages))
    except UnstableBoundaryError:
        return None
    return len(rendered) + len(missing_answers(record)) * data.max_new_tokens


def _read_open_records(path: Path, data: DataConfig) -> dict[str, Conversation]:
    return {record.id: record for record in read_requests(path, data)}


def _make_plan(
    name: str, records: dict[str, Conversation], *, target: WrittenTarget, data: DataConfig
) -> ShardPlan:
    plan = ShardPlan(name=name)
    histories = Histories(records)
    lengths: dict[str, int] = {}
    for record in records.values():
        length = longest_prompt(record, target, data)
        reason = _why_not(record, length, histories, data)
        if reason is not None:
            plan.dropped[record.id] = reason.value
        elif length is not None:
            lengths[record.id] = length
    group = _sessions if data.endpoints.urls else _batches
    plan.groups = group(records, lengths, data)
    return plan


def _batches(
    records: dict[str, Conversation], lengths: dict[str, int], data: DataConfig
) -> list[list[str]]:
    """Group by turn and prompt length: answers come in order, and little is padded."""
    waves: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for record_id, length in lengths.items():
        waves[records[record_id].turn].append((length, record_id))
    groups: list[list[str]] = []
    for _turn, members in sorted(waves.items()):
        ids = [record_id for _length, record_id in sorted(members)]
        for first in range(0, len(ids), data.batch_size):
            groups.append(ids[first : first + data.batch_size])
    return groups


def _sessions(
    records: dict[str, Conversation], lengths: dict[str, int], data: DataConfig
) -> list[list[str]]:
    """Group by session, turns in order."""
    sessions: dict[str, list[str]] = defaultdict(list)
    for record_id in lengths:
        sessions[records[record_id].session or record_id].append(record_id)
    return [sorted(ids, key=lambda record_id: records[record_id].turn) for ids in sessions.values()]


def _why_not(
    record: Conversation, length: int | None, histories: Histories, data: DataConfig
) -> DropReason | None:
    endpoints = data.endpoints
    is_templated_again = bool(endpoints.urls) and endpoints.api is EndpointApi.chat
    if length is None or (record.has_rendered_prompt and is_templated_again):
        return DropReason.unstable_boundary
    if not histories.is_complete(record):
        return DropReason.content_missing
    return DropReason.too_long if length > data.max_prompt_tokens else None


def _as_asked(conversation: Conversation, split: str, data: DataConfig) -> Conversation:
    """Take off the answer with what is known of it, so that no span points behind the prompt.

    Ids of the prompt stay where it came rendered: they go to the target as they were logged.
    """
    prompt = conversation.prompt
    spans = [span for span in conversation.privacy.spans if span[0] < len(prompt)]
    is_rendered = conversation.has_rendered_prompt
    settings = asdict(data.serving_sampling) | {"max_tokens": data.max_new_tokens}
    return replace(
        conversation,
        messages=prompt,
        split=split,
        privacy=replace(conversation.privacy, spans=spans),
        sampling={name: value for name, value in settings.items() if value is not None},
        prompt_token_ids=conversation.prompt_token_ids if is_rendered else None,
        output_token_ids=None,
        served_acceptance_length=None,
    )
