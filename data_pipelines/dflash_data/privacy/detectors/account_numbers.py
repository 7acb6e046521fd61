"""Numbers with a check: cards (Luhn), IBANs (mod 97) and social security numbers."""

import re
from collections.abc import Iterator

from dflash_data.privacy.detectors.detector import Detector, Family, context, everywhere_if
from dflash_data.privacy.detectors.text_view import Span

GAP = r"(?:[ .\-]{1,2}|[\-.]?[ \t]{0,2}\r?\n[ \t>|*\#/]{0,8})"
"""Between the groups of a number: a space, dot or dash, or a line break with its indent."""

_CARD = re.compile(
    rf"""(?<![A-Za-z0-9_])(?<!\d[.,])(?<![0-9a-f]{{4}}-)  # the last: inside a UUID
    (?:\d{{12,19}}|\d{{4}}(?:{GAP}\d{{4}}){{2,3}}(?:{GAP}?\d{{1,3}})?
    |\d{{4}}{GAP}\d{{6}}{GAP}\d{{4,5}})
    (?![A-Za-z0-9_])(?![.,]\d)""",
    re.VERBOSE | re.ASCII,
)
_ISSUER = re.compile(
    r"4|5|6|3[04-9]|2131|1800|2(?:20[0-4]|22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)|9792|0604"
)
"""How the cards of all issuers begin."""
_SHORT_ISSUER = re.compile(r"50|5[6-8]|6[379]|0604")
"""Issuers (Maestro) whose numbers may have only 12 digits."""

# Registered lengths, from the IBAN registry of SWIFT.
_IBAN_LENGTHS = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 "
    "DK18 DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 "
    "IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 "
    "MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 "
    "SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30"
).split()
_IBAN_REST = {
    entry[:2]: re.compile(rf"(?:{GAP}?[A-Za-z0-9]){{{int(entry[2:]) - 4}}}(?![A-Za-z0-9])", re.X)
    for entry in _IBAN_LENGTHS
}
_IBAN_BEGIN = re.compile(
    # Digits come first, so that a text without any is passed over at once.
    r"\d\d(?<=[A-Za-z]{2}\d\d)(?<![A-Za-z0-9][A-Za-z]{2}\d\d)(?=[ .\-\r\n]{0,3}[A-Za-z0-9])",
    re.ASCII,
)

_SSN = re.compile(
    r"(?<![A-Za-z0-9_])(?<!\d[.,-])(?:\d{3}-\d{2}-\d{4}|\d{3} ?\d{2} ?\d{4})"
    r"(?![A-Za-z0-9_])(?![-.]\d)"
)
_SSN_WORD = re.compile(r"(?i)(?:ssn|social.security|tax.?payer|itin)[\w\"' ]{0,12}\W{0,4}$")


_NO_DIGITS = re.compile(r"[^0-9]+")


def _card_spans(text: str, place: Span) -> Iterator[Span]:
    for match in _CARD.finditer(text, *place):
        start, end = match.span()
        digits = _digits(match[0])
        is_grouped = digits != match[0]
        if _is_card(digits) and not (is_grouped and len(digits) in (17, 18)):
            yield start, end
        elif is_grouped and len(digits) > 16 and _is_card(digits[:16]):
            yield start, start + _length_of(16, match[0])  # more digits follow: its CVV or date


def _digits(value: str) -> str:
    return _NO_DIGITS.sub("", value)


def _length_of(num_digits: int, value: str) -> int:
    """Give the length of the shortest beginning with so many digits."""
    places = [place for place, character in enumerate(value) if character.isdigit()]
    return places[num_digits - 1] + 1


def _is_card(digits: str) -> bool:
    if not 12 <= len(digits) <= 19 or not _ISSUER.match(digits):
        return False
    if len(digits) == 12 and not _SHORT_ISSUER.match(digits):
        return False
    doubled = [int(digit) * 2 - 9 * (digit > "4") for digit in digits[-2::-2]]
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _iban_spans(text: str, place: Span) -> Iterator[Span]:
    read_to = 0
    for begin in _IBAN_BEGIN.finditer(text, *place):
        start = begin.start() - 2
        country = _IBAN_REST.get(text[start : start + 2].upper())
        rest = country.match(text, begin.end()) if country else None
        if rest and start >= read_to and _is_iban(text[start : rest.end()]):
            read_to = rest.end()
            yield start, read_to


def _is_iban(value: str) -> bool:
    compact = "".join(filter(str.isalnum, value))
    digits = "".join(str(int(character, 36)) for character in compact[4:] + compact[:4])
    return int(digits) % 97 == 1


def _ssn_spans(text: str, place: Span) -> Iterator[Span]:
    for match in _SSN.finditer(text, *place):
        digits = _digits(match[0])
        is_given = digits[:3] not in ("000", "666") and digits[3:5] != "00" and digits[5:] != "0000"
        is_plain = "-" in match[0] and digits[0] != "9"
        if is_given and (is_plain or _SSN_WORD.search(context(text, match.start()))):
            yield match.span()


IBANS = Family(
    everywhere_if(_IBAN_BEGIN.search),
    (Detector("IBAN", _iban_spans),),
)
NUMBERS = Family(
    lambda view: view.digit_runs,
    (Detector("CARD", _card_spans), Detector("SSN", _ssn_spans)),
)
