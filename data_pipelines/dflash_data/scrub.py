"""Privacy: typed placeholders for personal data and secrets, before anything is written.

`EMAIL_1` always means the same value within one session and says nothing across sessions.
The spans of placeholders in `content` are kept: a placeholder in an answer is text that the
target never wrote, so its tokens must not be supervised. A secret in an answer drops the
record. Provider ids become keyed hashes. Only counts leave this module, never a value.
"""

from collections import Counter
from typing import Any

from dflash_data.detectors import SECRETS, find_private
from dflash_data.drops import DropReason
from dflash_data.explode import Sifted, in_log_order
from dflash_data.pseudonyms import Pseudonyms
from dflash_train.records.conversation import Conversation, Privacy, Turn

POLICY = "1"
"""Version of the detectors; stored with each record."""

Span = tuple[int, int, str]
"""Start and end of a placeholder in the scrubbed text, in characters, and its kind."""


class Placeholders:
    """Numbers the values of one session by kind: the first address is EMAIL_1."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], int] = {}
        self._num_of_kind: Counter[str] = Counter()

    def name(self, kind: str, value: str) -> str:
        """Give the placeholder of a value, the same one each time."""
        if (kind, value) not in self._numbers:
            self._num_of_kind[kind] += 1
            self._numbers[kind, value] = self._num_of_kind[kind]
        return f"{kind}_{self._numbers[kind, value]}"


def scrub(records: list[Conversation], pseudonyms: Pseudonyms) -> Sifted:
    """Scrub every record and hide its provider ids; secrets in an answer drop it.

    The facts count redactions as `EMAIL/user` and the touched records as `records_touched`.
    """
    sifted = Sifted([])
    sessions: dict[tuple[str | None, str | None], Placeholders] = {}
    for record in in_log_order(records):
        placeholders = sessions.setdefault((record.tenant, record.session), Placeholders())
        by_role = scrub_record(record, placeholders)
        _hide_ids(record, pseudonyms)
        sifted.facts += by_role
        sifted.facts["records_touched"] += bool(by_role)
        if _has_secret_in_answer(by_role):
            sifted.dropped[DropReason.secret_in_answer] += 1
        else:
            sifted.kept.append(record)
    return sifted


def scrub_record(record: Conversation, placeholders: Placeholders) -> Counter[str]:
    """Replace what is private in one record, in place, and count it as `KIND/role`.

    The supervised answer counts under the role `answer`, earlier ones under `assistant`. A
    record with any redaction loses its token ids, which carry the original text.
    """
    by_role: Counter[str] = Counter()
    spans: list[tuple[int, int, int, str]] = []
    answer_is_whole = True
    for index, turn in enumerate(record.messages):
        role = "answer" if turn is record.answer else turn.role
        if turn.content is not None:
            turn.content, found = scrub_text(turn.content, placeholders)
            spans += [(index, *span) for span in found]
            by_role.update(f"{kind}/{role}" for _, _, kind in found)
        kinds = _scrub_beside_content(turn, placeholders)
        by_role.update(f"{kind}/{role}" for kind in kinds)
        answer_is_whole = answer_is_whole and not (role == "answer" and kinds)
    record.tools, kinds = _scrub_value(record.tools, placeholders)
    by_role.update(f"{kind}/tools" for kind in kinds)
    record.sampling, kinds = _scrub_value(record.sampling, placeholders)
    by_role.update(f"{kind}/sampling" for kind in kinds)
    record.privacy = Privacy(
        scrubbed=True, policy=POLICY, redactions=_by_kind(by_role), spans=spans
    )
    if by_role:
        record.prompt_token_ids = record.output_token_ids = None
    if not answer_is_whole and record.on_policy:
        # Spans exist for content only: other altered parts of an answer cannot be masked.
        record.on_policy, record.on_policy_reason = False, "edited"
    return by_role


def scrub_text(text: str, placeholders: Placeholders) -> tuple[str, list[Span]]:
    """Give a text with placeholders, and where they stand in it."""
    pieces: list[str] = []
    spans: list[Span] = []
    length = read_to = 0
    for finding in find_private(text):
        before = text[read_to : finding.start]
        name = placeholders.name(finding.kind, text[finding.start : finding.end])
        pieces += [before, name]
        length += len(before)
        spans.append((length, length + len(name), finding.kind))
        length += len(name)
        read_to = finding.end
    return "".join([*pieces, text[read_to:]]), spans


def _scrub_beside_content(turn: Turn, placeholders: Placeholders) -> list[str]:
    turn.reasoning, kinds = _scrub_value(turn.reasoning, placeholders)
    turn.name, more_kinds = _scrub_value(turn.name, placeholders)
    turn.tool_calls, call_kinds = _scrub_value(turn.tool_calls, placeholders)
    return kinds + more_kinds + call_kinds


def _scrub_value(value: Any, placeholders: Placeholders) -> tuple[Any, list[str]]:
    """Scrub every text inside a JSON value, keys included."""
    kinds: list[str] = []

    def scrubbed(part: Any) -> Any:
        if isinstance(part, str):
            text, spans = scrub_text(part, placeholders)
            kinds.extend(kind for _, _, kind in spans)
            return text
        if isinstance(part, list):
            return [scrubbed(element) for element in part]
        if isinstance(part, dict):
            return {scrubbed(key): scrubbed(element) for key, element in part.items()}
        return part

    return scrubbed(value), kinds


def _hide_ids(record: Conversation, pseudonyms: Pseudonyms) -> None:
    if record.session is not None:
        record.session = pseudonyms.hide("session", record.source, record.tenant, record.session)
    if record.tenant is not None:
        record.tenant = pseudonyms.hide("tenant", record.tenant)
    if record.source_ref is not None:
        record.source_ref = pseudonyms.hide("request", record.source, record.source_ref)


def _has_secret_in_answer(by_role: Counter[str]) -> bool:
    return any(f"{kind}/answer" in by_role for kind in SECRETS)


def _by_kind(by_role: Counter[str]) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for kind_and_role, count in by_role.items():
        kinds[kind_and_role.split("/")[0]] += count
    return dict(sorted(kinds.items()))
