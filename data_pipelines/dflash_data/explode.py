"""Calls, turns and sessions: which call continues which, and which calls are the same.

A logged call repeats its history, so the calls of one session form a chain. The contract
that `regenerate` builds on:

- All records of a session carry the same `session`; `turn` is the number of assistant
  messages before the answer: 0, 1, 2, ...
- A record of turn t holds every message so far. Where the log did not keep an earlier answer
  (or this record's own), there is `Turn(role="assistant", content=None)` in the history (or no
  last assistant message). Answers that were logged stand where they were logged.
- For each such place at message index i, some record of the same session and split has
  exactly `messages[:i]` as its prompt; `prefix_key` finds it. Walking the turns in order
  therefore always knows the answer to put there. Records without that promise are dropped
  here as `content_missing`.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

import orjson

from dflash_data.drops import DropReason
from dflash_train.records.conversation import Conversation, Turn

MAX_ANSWERS_PER_PREFIX = 4
"""Different on-policy answers kept for one prompt; later retries are duplicates."""


@dataclass
class Sifted:
    """What a step over the whole log hands on, what it dropped, and what else it counted."""

    kept: list[Conversation]
    dropped: Counter[DropReason] = field(default_factory=Counter)
    facts: Counter[str] = field(default_factory=Counter)


def in_log_order(records: Iterable[Conversation]) -> list[Conversation]:
    """Sort by time, then id, so that the order of input files never matters; no time goes last."""
    return sorted(records, key=_log_position)


def instant(record: Conversation) -> float | None:
    """Give the time of a record in seconds since 1970; None if the log had none."""
    return datetime.fromisoformat(record.ts).timestamp() if record.ts else None


def prefix_key(messages: list[Turn], record: Conversation) -> str:
    """Hash everything the target sees before it answers: messages, tools and thinking mode."""
    seen = [messages, record.tools, record.sampling.get("enable_thinking")]
    return hashlib.sha256(orjson.dumps(seen)).hexdigest()


def missing_answers(record: Conversation) -> list[int]:
    """Give the message indices of earlier answers that `regenerate` has to fill in."""
    return [
        index
        for index, turn in enumerate(record.prompt)
        if turn.role == "assistant" and turn.content is None and not turn.tool_calls
    ]


def explode(calls: list[Conversation]) -> Sifted:
    """Give one record per assistant turn, in log order, each with its session.

    A call that the log holds twice (log shippers repeat lines) is kept once. Calls without a
    session are chained by their history: a call continues the latest call of the same tenant whose
    prompt it repeats, preferably one that nothing has continued yet.
    """
    sifted = Sifted([])
    seen: set[str] = set()
    for call in in_log_order(calls):
        if call.id in seen:
            sifted.dropped[DropReason.duplicate] += 1
            continue
        seen.add(call.id)
        sifted.kept.append(call)
    _chain_sessions(sifted.kept)
    return sifted


def drop_orphans(records: list[Conversation]) -> Sifted:
    """Drop records whose history lacks an answer that no kept record of the session can give."""
    sifted = Sifted([])
    prompts: set[tuple[str | None, str]] = set()
    for record in sorted(records, key=lambda record: record.turn):
        needed = [prefix_key(record.messages[:index], record) for index in missing_answers(record)]
        if all((record.session, key) in prompts for key in needed):
            prompts.add((record.session, prefix_key(record.prompt, record)))
            sifted.kept.append(record)
        else:
            sifted.dropped[DropReason.content_missing] += 1
    sifted.kept = in_log_order(sifted.kept)
    return sifted


def merge_repeats(records: list[Conversation], splits: Iterable[str]) -> Sifted:
    """Merge records of the named splits that ask the same and were answered the same.

    The earliest record stands for all; `weight` says for how many. Repeats are merged within a
    split only, never across the cut: the target of a time-based split is what recurs later. A
    record that later turns of its own session build on stays. An answer counts as different
    only if the target wrote it (on-policy); every other answer will be rewritten, to the same.
    """
    sifted = Sifted([record for record in records if record.split not in set(splits)])
    for split in splits:
        part = _merge_repeats([record for record in records if record.split == split])
        sifted.kept += part.kept
        sifted.dropped += part.dropped
        sifted.facts += part.facts
    sifted.kept = in_log_order(sifted.kept)
    return sifted


def _merge_repeats(records: list[Conversation]) -> Sifted:
    sifted = Sifted([])
    alike: dict[str, list[Conversation]] = defaultdict(list)
    for record in in_log_order(records):
        alike[prefix_key(record.prompt, record)].append(record)
    built_on: set[tuple[str | None, str]] = set()
    # Later turns first: whether they stay decides which earlier turns are built on.
    for key, group in sorted(alike.items(), key=lambda item: -item[1][0].turn):
        kept = _merge_group(
            group, {record.id for record in group if (record.session, key) in built_on}
        )
        num_merged = sum(record.weight for record in kept) - len(kept)
        sifted.dropped[DropReason.duplicate] += len(group) - len(kept)
        sifted.facts["merged"] += num_merged
        sifted.kept += kept
        for record in kept:
            for index in missing_answers(record):
                built_on.add((record.session, prefix_key(record.messages[:index], record)))
    return sifted


def _merge_group(group: list[Conversation], needed_ids: set[str]) -> list[Conversation]:
    """Merge calls with one prompt, one survivor per answer plus every record that is needed."""
    by_answer: dict[bytes, list[Conversation]] = defaultdict(list)
    for record in group:
        by_answer[orjson.dumps(record.answer) if record.on_policy else b""].append(record)
    kept: list[Conversation] = []
    for num_answers, same in enumerate(by_answer.values(), start=1):
        survivors = [record for record in same if record.id in needed_ids]
        if not survivors and num_answers <= MAX_ANSWERS_PER_PREFIX:
            survivors = same[:1]
        if survivors:
            survivors[0].weight += len(same) - len(survivors)
        kept += survivors
    return kept


def _chain_sessions(calls: list[Conversation]) -> None:
    """Give every call without a session that of the call it continues, else a new one."""
    open_ends: dict[str, list[str]] = defaultdict(list)
    for call in calls:
        if call.session is not None:
            continue
        history = _history_before_last_answer(call)
        chain = open_ends[_history_key(call, history)] if history else []
        if len(chain) > 1:
            call.session = chain.pop()
        else:
            call.session = chain[0] if chain else f"starts-with {call.id}"
        open_ends[_history_key(call, call.prompt)].append(call.session)


def _history_before_last_answer(call: Conversation) -> list[Turn]:
    answers = [index for index, turn in enumerate(call.prompt) if turn.role == "assistant"]
    return call.prompt[: answers[-1]] if answers else []


def _history_key(call: Conversation, history: list[Turn]) -> str:
    return hashlib.sha256(orjson.dumps([call.tenant, history])).hexdigest()


def _log_position(record: Conversation) -> tuple[float, str]:
    moment = instant(record)
    return (float("inf") if moment is None else moment, record.id)
