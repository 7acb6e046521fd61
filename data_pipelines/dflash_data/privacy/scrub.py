"""Privacy: typed placeholders for personal data and secrets, before anything is written.

`EMAIL_1` always means the same value within one session and says nothing across sessions. Calls
are scrubbed before anyone knows their session, so this takes two steps. `scrub_call` puts a mark,
a keyed hash, in place of each private value. `name_placeholders` gets the calls of one session
in log order and turns its marks into numbered names.

The spans of placeholders in `content` are kept: a placeholder in an answer is text that the
target never wrote, so its tokens must not be supervised. A secret in an answer drops the
record. Provider ids become keyed hashes. Only counts leave this module, never a value.
"""

from collections import Counter
from typing import Any

import msgspec
from msgspec.structs import replace

from dflash_data.privacy.detectors import SECRETS
from dflash_data.privacy.marks import Placeholders, mark_id, mark_json_text, mark_text, mark_value
from dflash_data.privacy.pseudonyms import Pseudonyms
from dflash_train.records.conversation import Conversation, Privacy, Turn

POLICY = "2"
"""Version of the detectors; stored with each record."""
BESIDE_CONTENT = ("reasoning", "name", "tool_call_id", "tool_calls")
"""Fields of a message that are scrubbed too; `privacy.spans` cannot point into them."""


def scrub_call(record: Conversation, pseudonyms: Pseudonyms) -> Counter[str]:
    """Replace what is private in one record by marks, in place, and hide its provider ids.

    The record may be of any session, known or not; `name_placeholders` finishes the work. A
    record with any redaction loses its token ids, which carry the original text.

    Returns:
        Redactions as `KIND/role`. The supervised answer counts under the role `answer`, earlier
        ones under `assistant`, what is beside the messages under `tools` and `sampling`.
    """
    by_role: Counter[str] = Counter()
    answer = record.answer
    for turn in record.messages:
        role = "answer" if turn is answer else turn.role
        _count(by_role, role, _mark_turn(record, turn, pseudonyms))
    if record.tools:
        record.tools, kinds = mark_value(record.tools, pseudonyms)
        _count(by_role, "tools", kinds)
    for key, value in record.sampling.items():
        if isinstance(value, str | list | dict):
            record.sampling[key], kinds = mark_value(value, pseudonyms)
            _count(by_role, "sampling", kinds)
    record.privacy = Privacy(scrubbed=True, policy=POLICY, redactions=_by_kind(by_role))
    if by_role:
        record.prompt_token_ids = record.output_token_ids = None
    _hide_ids(record, pseudonyms)
    return by_role


def name_placeholders(records: list[Conversation]) -> None:
    """Turn the marks of one session into `EMAIL_1`, `EMAIL_2`, ..., in place.

    Args:
        records: The records of one session in log order, each scrubbed by `scrub_call`. Naming
            sets `privacy.spans`; records that are named already must not come again.
    """
    placeholders = Placeholders()
    for record in records:
        record.messages = [
            _name_turn(record, index, turn, placeholders)
            for index, turn in enumerate(record.messages)
        ]
        record.tools = placeholders.name_value(record.tools)
        record.sampling = placeholders.name_value(record.sampling)


def rescrub_answer(record: Conversation, pseudonyms: Pseudonyms) -> Counter[str]:
    """Scrub the freshly written answer of a record that is scrubbed and named.

    New placeholders go on where those of the record end. The values behind those are gone, so
    one that the target repeats by chance gets a number of its own.

    Returns:
        Redactions as `KIND/answer`; empty without an answer.
    """
    by_role: Counter[str] = Counter()
    if record.answer is None:
        return by_role
    index = len(record.messages) - 1
    placeholders = Placeholders()
    seen = [record.prompt, record.tools, record.sampling]
    placeholders.skip_names(msgspec.json.encode(seen).decode())
    _count(by_role, "answer", _mark_turn(record, record.answer, pseudonyms))
    record.privacy.spans = [span for span in record.privacy.spans if span[0] != index]
    record.messages[index] = _name_turn(record, index, record.answer, placeholders)
    record.privacy.redactions = _by_kind(by_role + Counter(record.privacy.redactions))
    if by_role:
        record.prompt_token_ids = record.output_token_ids = None
    return by_role


def has_secret_in_answer(by_role: Counter[str]) -> bool:
    """Say whether the counts of a record hold a key or password in its answer."""
    return any(f"{kind}/answer" in by_role for kind in SECRETS)


def _mark_turn(record: Conversation, turn: Turn, pseudonyms: Pseudonyms) -> tuple[str, ...]:
    """Mark one message and give the kinds found in it."""
    kinds = beside_content = ()
    if turn.content is not None:
        turn.content, kinds = mark_text(turn.content, pseudonyms)
    if turn.reasoning is not None:
        turn.reasoning, found = mark_text(turn.reasoning, pseudonyms)
        beside_content += found
    if turn.name is not None:
        turn.name, found = mark_text(turn.name, pseudonyms)
        beside_content += found
    if turn.tool_call_id is not None:
        turn.tool_call_id, found = mark_id(turn.tool_call_id, pseudonyms)
        beside_content += found
    for call in turn.tool_calls or ():
        beside_content += _mark_tool_call(call, pseudonyms)
    if beside_content and turn is record.answer and record.on_policy:
        # Spans exist for content only: other altered parts of an answer cannot be masked.
        record.on_policy, record.on_policy_reason = False, "edited"
    return kinds + beside_content


def _mark_tool_call(call: dict[str, Any], pseudonyms: Pseudonyms) -> tuple[str, ...]:
    """Mark one tool call, in place; its arguments still parse if they did before."""
    kinds: tuple[str, ...] = ()
    for key, value in call.items():
        if key == "arguments" and isinstance(value, str):
            call[key], found = mark_json_text(value, pseudonyms)
        elif key == "id" and isinstance(value, str):
            call[key], found = mark_id(value, pseudonyms)
        elif key == "function" and isinstance(value, dict):
            found = _mark_tool_call(value, pseudonyms)
        else:
            call[key], found = mark_value(value, pseudonyms)
        kinds += found
    return kinds


def _name_turn(record: Conversation, index: int, turn: Turn, placeholders: Placeholders) -> Turn:
    """Give a message with names and note the spans; a new one, as records may share messages."""
    named: dict[str, Any] = {}
    if turn.content is not None:
        named["content"], spans = placeholders.name_text(turn.content)
        record.privacy.spans += [(index, span.start, span.end, span.kind) for span in spans]
    for field in BESIDE_CONTENT:
        named[field] = placeholders.name_value(getattr(turn, field))
    changed = {field: value for field, value in named.items() if value is not getattr(turn, field)}
    return replace(turn, **changed) if changed else turn


def _hide_ids(record: Conversation, pseudonyms: Pseudonyms) -> None:
    if record.session is not None:
        record.session = pseudonyms.hide("session", record.source, record.tenant, record.session)
    if record.tenant is not None:
        record.tenant = pseudonyms.hide("tenant", record.tenant)
    if record.source_ref is not None:
        record.source_ref = pseudonyms.hide("request", record.source, record.source_ref)


def _count(by_role: Counter[str], role: str, kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        by_role[f"{kind}/{role}"] += 1


def _by_kind(by_role: Counter[str]) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for kind_and_role, count in by_role.items():
        kinds[kind_and_role.split("/")[0]] += count
    return dict(sorted(kinds.items()))
