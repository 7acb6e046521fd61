r"""Marks in place of private values, and the numbered names that replace the marks.

A mark is U+E000, the kind, a colon, the keyed hash of the value and U+E001. Both characters are
for private use, so texts rarely hold them; a U+E000 that a text does hold is doubled, and naming
undoes that. So a mark can never be confused with text, and text is never lost.
"""

import json
import re
from collections import Counter
from typing import Any, NamedTuple

import orjson

from dflash_data.privacy.detectors import FAMILIES, KINDS, Family, find_private
from dflash_data.privacy.detectors.contacts import PHONES
from dflash_data.privacy.detectors.randomness import RANDOM
from dflash_data.privacy.pseudonyms import MarkedText, Pseudonyms

OPEN, CLOSE = "\ue000", "\ue001"
ID_FAMILIES = tuple(family for family in FAMILIES if family not in (PHONES, RANDOM))
"""What is looked for in ids of tool calls: they are random or long numbers by nature."""
MIN_PRIVATE_INTEGER = 1_000_000

_MARK = re.compile(f"{OPEN}(?:{OPEN}|([A-Z0-9_]+):([0-9a-f]{{16}}){CLOSE})")
_NAME = re.compile(rf"(?<![A-Za-z0-9_])({'|'.join(KINDS)})_(\d{{1,9}})(?!\d)")
_JSON_PART = re.compile(r'("(?:[^"\\]|\\.)*+")(\s*:)?|-?\d[\d.eE+-]{6,}', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
_AS_WRITTEN = frozenset({"PEM", "JWT", "URL_CREDENTIALS", "HIGH_ENTROPY", "AWS_KEY", "GCP_KEY",
                         "GITHUB_KEY", "OPENAI_KEY", "HF_KEY"})  # fmt: skip


class NamedSpan(NamedTuple):
    """Where a placeholder stands: characters of the finished text, and its kind."""

    start: int
    end: int
    kind: str


def mark_text(text: str, pseudonyms: Pseudonyms, *, before: str = "") -> MarkedText:
    """Put marks into a text.

    Args:
        text: Any text.
        pseudonyms: The key, and what is known of earlier texts.
        before: The name of the field that holds the text: `phone` makes a number one.
    """
    known = pseudonyms.marked.get(before, text)
    if known is None:
        known = _mark(text, pseudonyms, before, FAMILIES)
        pseudonyms.marked.put(before, text, known)
    return known


def mark_id(text: str, pseudonyms: Pseudonyms) -> MarkedText:
    """Put marks into the id of a tool call, which is random and yet no secret."""
    return _mark(text, pseudonyms, "", ID_FAMILIES)


def mark_json_text(text: str, pseudonyms: Pseudonyms) -> MarkedText:
    """Put marks into JSON text so that it still parses; other text as `mark_text` does.

    A number that is private becomes a string. All else is kept as it was written.
    """
    known = pseudonyms.marked.get(mark_json_text, text)
    if known is None:
        parses = _parses(text)
        known = _mark_json(text, pseudonyms) if parses else mark_text(text, pseudonyms)
        pseudonyms.marked.put(mark_json_text, text, known)
    return known


def mark_value(value: Any, pseudonyms: Pseudonyms) -> tuple[Any, tuple[str, ...]]:
    """Put marks into every text of a JSON value, keys included; the value itself if it is clean.

    Tool schemas are the same in every call, so the whole value is looked up at once.
    """
    text = orjson.dumps(value).decode()
    known = pseudonyms.marked.get(mark_value, text)
    if known is None:
        kinds: list[str] = []
        marked = _mark_parts(value, "", pseudonyms, kinds)
        known = MarkedText(orjson.dumps(marked).decode(), tuple(kinds))
        pseudonyms.marked.put(mark_value, text, known)
    return (value if known.text == text else orjson.loads(known.text)), known.kinds


class Placeholders:
    """Numbers the values of one session by kind: the first address is EMAIL_1."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], str] = {}
        self._num_of_kind: Counter[str] = Counter()

    def name(self, kind: str, value_hash: str) -> str:
        """Give the placeholder of a marked value, the same one each time."""
        name = self._names.get((kind, value_hash))
        if name is None:
            self._num_of_kind[kind] += 1
            name = self._names[kind, value_hash] = f"{kind}_{self._num_of_kind[kind]}"
        return name

    def skip_names(self, text: str) -> None:
        """Never give a name again that a text holds."""
        for kind, number in _NAME.findall(text):
            self._num_of_kind[kind] = max(self._num_of_kind[kind], int(number))

    def name_text(self, text: str) -> tuple[str, list[NamedSpan]]:
        """Give a marked text with names, and where they stand in it."""
        spans: list[NamedSpan] = []
        if OPEN not in text:
            return text, spans
        pieces: list[str] = []
        length = read_to = 0
        for match in _MARK.finditer(text):
            kind, value_hash = match.groups()
            name = OPEN if kind is None else self.name(kind, value_hash)
            pieces += [text[read_to : match.start()], name]
            length += match.start() - read_to + len(name)
            if kind is not None:
                spans.append(NamedSpan(length - len(name), length, kind))
            read_to = match.end()
        return "".join([*pieces, text[read_to:]]), spans

    def name_value(self, value: Any) -> Any:
        """Give a JSON value with names in place of marks; the value itself if it has none."""
        if isinstance(value, str):
            return self.name_text(value)[0]
        if isinstance(value, list | dict) and OPEN.encode() in orjson.dumps(value):
            return self._name_parts(value)
        return value

    def _name_parts(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.name_text(value)[0]
        if isinstance(value, list):
            return [self._name_parts(part) for part in value]
        if isinstance(value, dict):
            return {self._name_parts(key): self._name_parts(part) for key, part in value.items()}
        return value


def _mark(
    text: str, pseudonyms: Pseudonyms, before: str, families: tuple[Family, ...]
) -> MarkedText:
    shift = len(before) + 2 if before else 0
    findings = find_private(f"{before}: {text}" if before else text, families=families)
    pieces: list[str] = []
    kinds: list[str] = []
    read_to = 0
    for finding in findings:
        start, end = finding.start - shift, finding.end - shift
        if start < 0:
            continue
        value = _normal_form(finding.kind, text[start:end])
        mark = f"{OPEN}{finding.kind}:{pseudonyms.mark(finding.kind, value)}{CLOSE}"
        pieces += [_escape(text[read_to:start]), mark]
        kinds.append(finding.kind)
        read_to = end
    if not kinds:
        return MarkedText(_escape(text), ())
    return MarkedText("".join([*pieces, _escape(text[read_to:])]), tuple(kinds))


def _escape(text: str) -> str:
    return text.replace(OPEN, OPEN + OPEN) if OPEN in text else text


def _normal_form(kind: str, value: str) -> str:
    """Give what is the same however a value is written: spaces in a card number do not count."""
    if kind in _AS_WRITTEN:
        return value
    if kind in ("EMAIL", "IPV4", "IPV6"):
        return value.lower()
    return "".join(filter(str.isalnum, value)).upper()


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _mark_json(text: str, pseudonyms: Pseudonyms) -> MarkedText:
    kinds: list[str] = []
    key = ""

    def marked(part: re.Match[str]) -> str:
        nonlocal key
        plain = json.loads(part[1]) if part[1] else part[0]
        found = mark_text(plain, pseudonyms, before="" if part[2] else key)
        kinds.extend(found.kinds)
        key = plain if part[2] else key
        return part[0] if found.text == plain else _json_string(found.text) + (part[2] or "")

    return MarkedText(_JSON_PART.sub(marked, text), tuple(kinds))


def _json_string(text: str) -> str:
    """Write a JSON string with its marks readable; half a character only fits as an escape."""
    written = json.dumps(text, ensure_ascii=False)
    return _SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", written)


def _mark_parts(value: Any, key: str, pseudonyms: Pseudonyms, kinds: list[str]) -> Any:
    if isinstance(value, str):
        marked = mark_text(value, pseudonyms, before=key)
        kinds.extend(marked.kinds)
        return marked.text
    if isinstance(value, list):
        return [_mark_parts(part, key, pseudonyms, kinds) for part in value]
    if isinstance(value, dict):
        return {
            _mark_parts(name, "", pseudonyms, kinds): _mark_parts(part, name, pseudonyms, kinds)
            for name, part in value.items()
        }
    if isinstance(value, int) and value >= MIN_PRIVATE_INTEGER:
        marked = mark_text(str(value), pseudonyms, before=key)
        kinds.extend(marked.kinds)
        return marked.text if marked.kinds else value
    return value
