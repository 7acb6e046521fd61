"""Finds personal data and secrets in a text, with checksums against look-alikes.

Each detector is a pattern and a rule that a match must also satisfy: an order number is not
a card unless Luhn's sum fits, a version number is not an address. Earlier detectors win
where two overlap. Secrets are the kinds that must not survive in an answer at all.
"""

import ipaddress
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

SECRETS = frozenset(
    {
        "PEM", "JWT", "AWS_KEY", "GCP_KEY", "GITHUB_KEY", "OPENAI_KEY", "HF_KEY",
        "URL_CREDENTIALS", "HIGH_ENTROPY",
    }
)  # fmt: skip
"""Kinds that drop a record if they stand in its answer."""

MIN_ENTROPY_BITS = 3.4
"""Bits per character of a random-looking string; words and identifiers stay below."""
MIN_CLASS_CHANGES = 0.4
"""Share of neighbours that differ in class (lower, upper, digit): about 0.6 if random."""


@dataclass(frozen=True)
class Finding:
    """One match: characters `start` to `end` of the text."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class Detector:
    """A kind, its pattern (group `value` if only a part is private) and its further rule."""

    kind: str
    pattern: re.Pattern[str]
    holds: Callable[[str, str], bool]
    """Takes the match and the text before it, up to 24 characters."""


def find_private(text: str) -> list[Finding]:
    """Give all findings in a text, in order, without overlaps."""
    taken: list[Finding] = []
    for detector in DETECTORS:
        for match in detector.pattern.finditer(text):
            start, end = match.span("value")
            if not detector.holds(text[start:end], text[max(0, start - 24) : start]):
                continue
            if all(end <= other.start or other.end <= start for other in taken):
                taken.append(Finding(start, end, detector.kind))
    return sorted(taken, key=lambda finding: finding.start)


def _always(_value: str, _before: str) -> bool:
    return True


def _is_ipv4(value: str, before: str) -> bool:
    if re.search(r"(version|release|build|firmware|ver\.?)[\s:=]*v?$", before, re.IGNORECASE):
        return False
    try:
        address = ipaddress.IPv4Address(value)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified)


def _is_ipv6(value: str, _before: str) -> bool:
    groups = [group for group in value.split(":") if group]
    # Times, slices such as [::2] and C++ names are not addresses.
    if len(groups) < 2 or len(groups[0]) < 3 or not any(map(str.isdigit, value)):
        return False
    try:
        return not ipaddress.IPv6Address(value).is_loopback
    except ValueError:
        return False


def _is_iban(value: str, _before: str) -> bool:
    compact = value.replace(" ", "")
    if not 15 <= len(compact) <= 34:
        return False
    digits = "".join(str(int(character, 36)) for character in compact[4:] + compact[:4])
    return int(digits) % 97 == 1


def _is_card(value: str, _before: str) -> bool:
    digits = [int(character) for character in value if character.isdigit()]
    if not 13 <= len(digits) <= 19 or digits[0] not in (2, 3, 4, 5, 6):
        return False
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_ssn(value: str, _before: str) -> bool:
    area, group, serial = value.split("-")
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def _is_phone(value: str, before: str) -> bool:
    num_digits = sum(map(str.isdigit, value))
    if not 7 <= num_digits <= 15:
        return False
    if value[0] in "+(" and num_digits >= 8:
        return True
    if re.fullmatch(r"[2-9]\d\d[-. ][2-9]\d\d[-. ]\d{4}", value):
        return True
    return bool(
        re.search(r"\b(phone|tel|mobile|cell|call|fax|reach)\W*(\w+\W+){0,2}$", before, re.I)
    )


def _is_random(value: str, _before: str) -> bool:
    if re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", value):
        return False  # a UUID identifies, it does not unlock
    classes = [_character_class(character) for character in value]
    if len(set(classes) & {"lower", "upper", "digit"}) < (2 if _is_hex(value) else 3):
        return False
    changes = sum(one != other for one, other in itertools.pairwise(classes))
    needed = 0.3 if _is_hex(value) else MIN_CLASS_CHANGES
    return _entropy_bits(value) >= MIN_ENTROPY_BITS - 0.4 * _is_hex(value) and (
        changes / (len(value) - 1) >= needed
    )


def _is_hex(value: str) -> bool:
    return len(value) >= 32 and re.fullmatch(r"[0-9a-f]+|[0-9A-F]+", value) is not None


def _character_class(character: str) -> str:
    if character.isdigit():
        return "digit"
    if character.isalpha():
        return "lower" if character.islower() else "upper"
    return "sign"


def _entropy_bits(value: str) -> float:
    shares = [count / len(value) for count in Counter(value).values()]
    return -sum(share * math.log2(share) for share in shares)


def _detector(
    kind: str, pattern: str, holds: Callable[[str, str], bool] = _always, flags: int = 0
) -> Detector:
    named = pattern if "(?P<value>" in pattern else f"(?P<value>{pattern})"
    return Detector(kind, re.compile(named, flags), holds)


DETECTORS = (
    _detector(
        "PEM",
        r"-----BEGIN [A-Z0-9 ]{1,40}-----.*?(?:-----END [A-Z0-9 ]{1,40}-----|\Z)",
        flags=re.DOTALL,
    ),
    _detector("JWT", r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{4,}"),
    _detector("AWS_KEY", r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}\b"),
    _detector("GCP_KEY", r"\bAIza[\w-]{35}"),
    _detector("GITHUB_KEY", r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,})"),
    _detector("OPENAI_KEY", r"\bsk-(?:[a-z]{2,10}-)*[A-Za-z0-9_-]{20,}"),
    _detector("HF_KEY", r"\bhf_[A-Za-z0-9]{30,}"),
    _detector("URL_CREDENTIALS", r"\b[a-zA-Z][\w+.-]{1,20}://(?P<value>[^\s:/@]+:[^\s/@]+)@"),
    _detector("EMAIL", r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"),
    _detector(
        "IBAN",
        # Later groups need a digit, so that a capitalised word after the number is left out.
        r"\b[A-Z]{2}\d{2} ?[A-Z0-9]{4}(?: ?(?=[A-Z]{0,3}\d)[A-Z0-9]{4}){1,6}"
        r"(?: ?(?=[A-Z]{0,2}\d)[A-Z0-9]{1,3})?\b",
        _is_iban,
    ),
    _detector(
        "CARD",
        r"(?<![\w.-])(?:\d{4}(?P<gap>[ -])\d{4}(?P=gap)\d{4}(?P=gap)\d{4}"
        r"|\d{4}[ -]\d{6}[ -]\d{5}|\d{13,19})(?![\w-])",
        _is_card,
    ),
    _detector("SSN", r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])", _is_ssn),
    _detector("IPV4", r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)", _is_ipv4),
    _detector("IPV6", r"(?<![\w:.])[0-9A-Fa-f:]{3,39}(?![\w:])", _is_ipv6),
    _detector(
        "PHONE",
        r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{1,4}\)[ .-]?)?"
        r"\d{2,}(?:[ .-]\d{2,}){0,5}(?![\w-])",
        _is_phone,
    ),
    _detector("HIGH_ENTROPY", r"(?<![\w+/-])[\w+/-]{24,}={0,2}(?![\w+/=-])", _is_random),
)
"""In order of precedence."""
