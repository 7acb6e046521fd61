"""From the target's answer to a finished record: history before, scrubbing and books after.

Whoever answers, this process or a server, a record goes the same way: its history is completed
with the target's own earlier answers, and its answer passes the scrubber before it is written
anywhere. An answer with a redaction loses its token ids, which carry the original text. Ids may
also carry what a server took out of the text, reasoning above all, so they are looked into, too.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from dflash_data.drops import DropReason
from dflash_data.ingest.explode import missing_answers, prefix_key
from dflash_data.privacy.detectors import find_private
from dflash_data.privacy.pseudonyms import Pseudonyms
from dflash_data.privacy.scrub import has_secret_in_answer, rescrub_answer
from dflash_train.features.target_text import WrittenTarget
from dflash_train.records.conversation import Conversation, Turn

_SEED_BITS = 31
"""What every server takes for a seed."""


@dataclass(kw_only=True)
class Answer:
    """What the target wrote to one prompt."""

    turn: Turn
    finish_reason: str
    """`stop`, `length` or `tool_calls`."""
    prompt_ids: list[int] = field(default_factory=list)
    output_ids: list[int] | None = None
    """With the stop token if the target wrote one; None where a server gives text only."""
    usage: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class Answers:
    """What has become of the records to answer so far."""

    records: dict[str, Conversation] = field(default_factory=dict)
    """Answered records by id."""
    dropped: dict[str, DropReason] = field(default_factory=dict)
    """Why the others have no answer, by id."""

    def add(self, record_id: str, outcome: Conversation | DropReason) -> None:
        """Note what became of a record."""
        if isinstance(outcome, DropReason):
            self.dropped[record_id] = outcome
        else:
            self.records[record_id] = outcome


class Histories:
    """Knows which record's answer fills each gap in the history of a later turn."""

    def __init__(self, open_records: Mapping[str, Conversation]) -> None:
        """Note who asks what; the first in the records' order stands for equal prompts."""
        self._askers: dict[tuple[str | None, str | None, str], str] = {}
        for record in open_records.values():
            self._askers.setdefault(_place(record, record.messages), record.id)

    def is_complete(self, record: Conversation) -> bool:
        """Say whether somebody asks for every answer that the history lacks."""
        return all(
            _place(record, record.messages[:index]) in self._askers
            for index in missing_answers(record)
        )

    def fill(
        self, record: Conversation, answered: Mapping[str, Conversation]
    ) -> Conversation | None:
        """Put the target's earlier answers where the log has none; None if one was dropped."""
        messages, spans = list(record.messages), list(record.privacy.spans)
        for index in missing_answers(record):
            earlier = answered.get(self._askers[_place(record, record.messages[:index])])
            if earlier is None:
                return None
            messages[index] = earlier.messages[-1]
            spans += [span for span in earlier.privacy.spans if span[0] == index]
        return replace(
            record, messages=messages, privacy=replace(record.privacy, spans=sorted(spans))
        )


def finish_record(
    asked: Conversation, answer: Answer, *, target: WrittenTarget, pseudonyms: Pseudonyms
) -> Conversation | DropReason:
    """Give the answered and scrubbed record, or why it must not be kept.

    Args:
        asked: The record up to its answer, history complete.
        answer: What the target wrote.
        target: Its names and tokenizer go into the record.
        pseudonyms: The key of this run.
    """
    has_ids = answer.output_ids is not None
    record = replace(
        asked,
        messages=[*asked.messages, answer.turn],
        finish_reason=answer.finish_reason,
        usage=answer.usage,
        prompt_token_ids=answer.prompt_ids if has_ids else None,
        output_token_ids=answer.output_ids,
        tokenizer=target.tokenizer_hash if has_ids else None,
        model=target.name,
        model_revision=target.revision,
        adapter=None,
        origin="regenerated",
        on_policy=True,
        on_policy_reason="match",
        privacy=replace(
            asked.privacy,
            redactions=dict(asked.privacy.redactions),
            spans=list(asked.privacy.spans),
        ),
    )
    found = rescrub_answer(record, pseudonyms)
    if has_secret_in_answer(found):
        return DropReason.secret_in_answer
    # Altered where no span can mask it (reasoning, a tool call), or a text that lacks a part.
    if not record.on_policy or _hides_private(record, target):
        return DropReason.off_policy
    return record


def answer_text(output_ids: list[int], target: WrittenTarget) -> str:
    """Decode an answer; special tokens are left out, and nothing else is touched."""
    text = target.tokenizer.decode(
        output_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text)


def answer_seed(recipe_seed: int, record_id: str) -> int:
    """Give the seed of one record's answer, the same on every run of a recipe."""
    digest = hashlib.sha256(f"{recipe_seed}/{record_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> (32 - _SEED_BITS)


def _hides_private(record: Conversation, target: WrittenTarget) -> bool:
    """Say whether the ids of an answer spell something private that its text leaves out."""
    output, answer = record.output_token_ids, record.answer
    if output is None or answer is None or answer_text(output, target) == answer.content:
        return False
    return bool(find_private(str(target.tokenizer.decode(output, skip_special_tokens=False))))


def _place(record: Conversation, messages: list[Turn]) -> tuple[str | None, str | None, str]:
    return record.session, record.split, prefix_key(messages, record)
