"""Email addresses and telephone numbers.

A telephone number has no checksum, so its form has to speak for it: a country code, an area
code, or the grouping of one country. A number of any other form counts only where a word
before it says so (`phone: 4155552671`), and a word such as `order` before it speaks against.
"""

import re
from collections.abc import Iterator

from dflash_data.privacy.detectors.detector import (
    Detector,
    Family,
    context,
    everywhere_if,
)
from dflash_data.privacy.detectors.text_view import Span

_LETTER = "A-Za-z0-9\u00c0-\u024f\u0370-\u052f"
_LOCAL_REVERSED = re.compile(rf"[{_LETTER}._%+'\-]{{1,64}}")
_DOMAIN = re.compile(
    rf"(?:@|%40)((?:[{_LETTER}-]{{1,63}}\.){{1,8}}[A-Za-z]{{2,24}})(?![A-Za-z0-9(])"
)
_AT = re.compile(rf"(?<=[{_LETTER}_%+'.-])(?:@|%40)(?=[{_LETTER}])")
_FILE_NAME = re.compile(r"(?i).*\.(?:png|jpe?g|gif|svg|webp|ico|css|js|json|html|txt)")

_GAP = r"(?:[ .\-/]{1,2}|[\-]?[ ]{0,2}\r?\n[ \t>|*\#/]{0,8})"
_FORMS = re.compile(
    rf"""(?<![A-Za-z0-9_])(?<!\d[\-.,/])(?<![0-9a-f]{{2}}-)(?:
    (?P<international> \(?\+[1-9](?:(?:{_GAP})?\(?\d\)?){{7,14}} )
    | (?P<exit_code> (?<!\d[ ])00[1-9]\d{{0,2}} (?:{_GAP}\(?\d{{1,8}}\)?){{2,6}} )
    | (?P<area> (?:[178][ \-]?)?\(\d{{2,5}}\)[ .\-]? \d{{2,9}} (?:{_GAP}\d{{2,6}}){{0,4}} )
    | (?P<american> (?:1[ .\-])? [2-9]\d\d {_GAP} [2-9]\d\d {_GAP} \d{{4}} )
    | (?P<brazilian> (?<!\d[ ])[1-9]\d[ ]9?\d{{4}}-\d{{4}} )
    | (?P<national> (?<!\d[ ])(?:0[1-9]\d{{0,4}} (?:{_GAP}\d{{2,9}}){{1,5}} | 0[1-9]\d{{8,9}}) )
    )(?P<extension> [ ]?(?:x|ext\.?)[ ]?\d{{1,6}} )?
    (?![A-Za-z0-9_])(?!-[A-Za-z0-9]|[./]\d)""",
    re.VERBOSE,
)
_ANY_NUMBER = re.compile(
    rf"""(?<![A-Za-z0-9_])(?<!\d[.,])\(?\d(?:(?:{_GAP}|[ ]?[()][ .\-]?)?\d){{6,14}}
    (?:[ ]?(?:x|ext\.?)[ ]?\d{{1,6}})?(?![A-Za-z0-9_])(?![.,]\d)""",
    re.VERBOSE,
)
_DATE = re.compile(
    r"(?:(?:0[1-9]|[12]\d|3[01])([-./ ])(?:0[1-9]|1[0-2])\1|(?:0[1-9]|1[0-2])([-./ ])"
    r"(?:0[1-9]|[12]\d|3[01])\2)(?:19|20)\d\d(?!\d)"
)
_YEARS = re.compile(r"\d\d (?:19|20)\d\d-(?:19|20)\d\d")
_IS_NONE = re.compile(r"0123456789\d?|\((?:19|20)\d\d\).*|\d\d(?:-\d\d){5}", re.DOTALL)
"""The ten digits in a row, a year in brackets, a hardware address without a letter."""
_DECIMAL = re.compile(r"\+\d{1,3}\.\d+")

PHONE_WORDS = frozenset(
    (
        "phone phones telephone smartphone cellphone phonenumber phoneno fon tel telefon telefono "
        "telefone telefoon tel\u00e9fono t\u00e9l\u00e9phone mobile mobil m\u00f3vil handy cell "
        "cellulare celular portable gsm fax call calls called calling dial ring reach whatsapp "
        "sms hotline callback \u0442\u0435\u043b \u0442\u0435\u043b\u0435\u0444\u043e\u043d"
    ).split()
)
PHONE_PHRASES = frozenset(
    ("text me", "text us", "text him", "text her", "my number", "your number", "his number",
     "her number", "our number", "their number", "new number")
)  # fmt: skip
OTHER_WORDS = frozenset(
    (
        "order article artikel art item part sku isbn issn ean upc gtin parcel tracking ticket "
        "case serial version build id ids ref reference invoice rechnung model batch lot account "
        "customer imei timestamp page section seed hash port commit row code product catalog "
        "patent doi rfc chapter epoch bytes date price total sum"
    ).split()
)
"""What a number behind one of these words is, instead of a telephone number."""
_JAPANESE_PHONE = re.compile("\u96fb\u8a71|\u643a\u5e2f")
_WORD = re.compile("[A-Za-z\u00c0-\u052f]+|[^\\W\\d_A-Za-z\u00c0-\u052f]+")
"""A word of one script: Japanese text puts no space before `isbn`."""
_SENTENCE_END = re.compile(r"\w{4}\.\s|[!?;]\s|[,\n]\s*\"")
"""A full stop after a shorter word is an abbreviation: `Tel. 4155552671`, `item no. 7`.
A quote on a new line or after a comma begins another field."""
_MAX_WORDS_BETWEEN = 4
"""Words between `phone` and the number: `my phone in the office is`."""


def _email_spans(text: str, place: Span) -> Iterator[Span]:
    for at in _AT.finditer(text, *place):
        domain = _DOMAIN.match(text, at.start())
        local = _LOCAL_REVERSED.match(text[max(0, at.start() - 64) : at.start()][::-1])
        if domain is None or local is None:
            continue
        name = local[0][::-1].lstrip(".'%+-")
        if name and name != "git" and not _FILE_NAME.fullmatch(domain[1]):
            yield at.start() - len(name), domain.end()


def _phone_spans(text: str, place: Span) -> Iterator[Span]:
    for match in _FORMS.finditer(text, *place):
        if _is_phone(match, context(text, match.start())):
            yield match.span()
    for match in _ANY_NUMBER.finditer(text, *place):
        before = context(text, match.start())
        if _word_before(before) == "phone" and not _DATE.match(match[0]):
            yield match.span()


def _is_phone(match: re.Match[str], before: str) -> bool:
    number = (
        match[0][: match.start("extension") - match.start()] if match["extension"] else match[0]
    )
    num_digits = sum(map(str.isdigit, number))
    word = _word_before(before)
    if match["international"]:
        is_sum = number.isascii() and before.rstrip()[-1:].isdigit() and number[1:].isdigit()
        return num_digits >= 8 and not is_sum and not _DECIMAL.fullmatch(number)
    if word == "other" or _DATE.match(number) or _YEARS.fullmatch(number):
        return False
    if word is None and _IS_NONE.fullmatch(number):
        return False
    return (8 if word == "phone" else 9) <= num_digits <= 15


def _word_before(before: str) -> str | None:
    """Say what the nearest telling word makes of a number: `phone`, `other`, or None."""
    words = list(_WORD.finditer(before.lower()))[-_MAX_WORDS_BETWEEN - 1 :]
    for place in range(len(words) - 1, -1, -1):
        word = words[place][0]
        phrase = f"{words[place - 1][0]} {word}" if place else word
        is_phone = word in PHONE_WORDS or phrase in PHONE_PHRASES or _JAPANESE_PHONE.search(word)
        if is_phone or word in OTHER_WORDS:
            is_far = _SENTENCE_END.search(before, words[place].end())
            return None if is_far else "phone" if is_phone else "other"
    return None


EMAILS = Family(
    everywhere_if(lambda text: "@" in text or "%40" in text), (Detector("EMAIL", _email_spans),)
)
PHONES = Family(lambda view: view.digit_runs, (Detector("PHONE", _phone_spans),))
