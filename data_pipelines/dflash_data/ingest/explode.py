"""Calls, turns and sessions: which call continues which, and which history can be told.

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

All functions see the records of one bucket (`bucket_of`), which holds whole sessions.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from dflash_data.drops import DropReason
from dflash_train.records.conversation import Conversation, Turn


@dataclass
class Sifted:
    """What a step over many records hands on, what it dropped, and what else it counted."""

    kept: list[Conversation]
    dropped: Counter[DropReason] = field(default_factory=Counter)
    facts: Counter[str] = field(default_factory=Counter)


def in_log_order(records: Iterable[Conversation]) -> list[Conversation]:
    """Sort by time, then id, so that the order of input files never matters; no time goes last."""
    return sorted(records, key=_log_position)


def instant(record: Conversation) -> float | None:
    """Give the time of a record in seconds since 1970; None if the log had none."""
    return datetime.fromisoformat(record.ts).timestamp() if record.ts else None


def bucket_of(record: Conversation, num_buckets: int) -> int:
    """Give the bucket of a scrubbed call, 0 .. num_buckets - 1; sessions and chains stay whole.

    Without a session it is that of the tenant and the messages up to the first user turn, which
    every call of a chain repeats.
    """
    if num_buckets == 1:
        return 0
    key = record.session.encode() if record.session is not None else _opening(record)
    return bucket_of_key(key, num_buckets)


def bucket_of_key(key: bytes, num_buckets: int) -> int:
    """Give the bucket of a session's name or an opening."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8]) % num_buckets


def history_keys(call: Conversation) -> tuple[str | None, str]:
    """Give the digests by which calls without a session are chained.

    Returns:
        That of the prompt which a call continues, None if it holds no answer; that of its own
        prompt, which calls that continue it repeat.
    """
    history = _history_before_last_answer(call)
    continued = _history_key(call, history) if history else None
    return continued, _history_key(call, call.prompt)


def session_of_chain(first: Conversation) -> str:
    """Name the session of a chain by its first call."""
    return "h:" + hashlib.sha256(f"chain {first.id}".encode()).hexdigest()[:16]


def prefix_key(messages: list[Turn], record: Conversation) -> str:
    """Hash everything the target sees before it answers: messages, tools and thinking mode."""
    seen = [messages, record.tools, record.sampling.get("enable_thinking")]
    if record.has_rendered_prompt:
        seen.append("rendered")
    return hashlib.sha256(msgspec.json.encode(seen)).hexdigest()


def missing_answers(record: Conversation) -> list[int]:
    """Give the message indices of earlier answers that `regenerate` has to fill in."""
    return [
        index
        for index, turn in enumerate(record.prompt)
        if turn.role == "assistant" and turn.content is None and not turn.tool_calls
    ]


def needed_prefix(record: Conversation) -> str | None:
    """Give the prefix key of the record that a record builds on; None if its history is whole.

    That is the prompt of its last missing answer. The record with that prompt builds on the one
    before in turn, so that one key stands for the whole history.
    """
    missing = missing_answers(record)
    return prefix_key(record.messages[: missing[-1]], record) if missing else None


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


def by_session(records: Iterable[Conversation]) -> list[list[Conversation]]:
    """Group exploded records by session; each group in the order given."""
    sessions: dict[str, list[Conversation]] = defaultdict(list)
    for record in records:
        sessions[record.session or record.id].append(record)
    return list(sessions.values())


def is_chained(session: list[Conversation]) -> bool:
    """Say whether a session, in log order, was found by its history and not named in the log."""
    return session[0].session in (None, session_of_chain(session[0]))


def drop_orphans(records: list[Conversation]) -> Sifted:
    """Drop records whose history lacks an answer that no kept record of the session can give."""
    sifted = Sifted([])
    prompts: set[tuple[str | None, str]] = set()
    for record in sorted(records, key=lambda record: record.turn):
        needed = needed_prefix(record)
        if needed is None or (record.session, needed) in prompts:
            prompts.add((record.session, prefix_key(record.prompt, record)))
            sifted.kept.append(record)
        else:
            sifted.dropped[DropReason.content_missing] += 1
    sifted.kept = in_log_order(sifted.kept)
    return sifted


def _chain_sessions(calls: list[Conversation]) -> None:
    """Give every call without a session that of the call it continues, else a new one."""
    open_ends: dict[str, list[str]] = defaultdict(list)
    for call in calls:
        if call.session is not None:
            continue
        continued, prompt = history_keys(call)
        chain = open_ends[continued] if continued is not None else []
        if len(chain) > 1:
            call.session = chain.pop()
        else:
            call.session = chain[0] if chain else session_of_chain(call)
        open_ends[prompt].append(call.session)


def _history_before_last_answer(call: Conversation) -> list[Turn]:
    answers = [index for index, turn in enumerate(call.prompt) if turn.role == "assistant"]
    return call.prompt[: answers[-1]] if answers else []


def _history_key(call: Conversation, history: list[Turn]) -> str:
    return hashlib.sha256(msgspec.json.encode([call.tenant, history])).hexdigest()


def _opening(call: Conversation) -> bytes:
    users = [index for index, turn in enumerate(call.messages) if turn.role == "user"]
    return msgspec.json.encode([call.tenant, call.messages[: users[0] + 1 if users else 1]])


def _log_position(record: Conversation) -> tuple[float, str]:
    moment = instant(record)
    return (float("inf") if moment is None else moment, record.id)
