"""Long strings that look random: passwords, tokens and keys of services without a known mark.

A random string jumps between letters and digits, and its letters form pairs that are rare in
words. The share of such surprising pairs tells it from identifiers, paths and model names.
"""

import itertools
import re
import string
from itertools import pairwise

from dflash_data.privacy.detectors.detector import Family, pattern_detector

MIN_LENGTH = 24
"""Characters; shorter strings are too often names."""
MAX_LENGTH = 512
"""Characters; longer ones are files in base64, not keys."""
MIN_FILE_LENGTH = 80
"""Characters of the smallest file in base64 that is told by its first bytes."""
MIN_SURPRISE = 0.5
"""Share of surprising pairs: 0.8 in random base64, 0.6 in hex digits, 0.3 in identifiers."""
MIN_SEGMENT = 6
"""Characters of the longest part between signs: pairs of hex digits are a hardware address."""

HASH_LENGTHS = (32, 40, 56, 64, 96, 128)
"""Hex digits of MD5, SHA-1 (git) and the SHA-2 family: public names of content."""

_SEGMENT = re.compile(r"[A-Za-z0-9]+")
_HEX = re.compile(r"[0-9a-f]+|[0-9A-F]+")
_MIXED = re.compile(r"\d|[a-z][^A-Z]*[A-Z]|[A-Z][^a-z]*[a-z]")
_UUID = re.compile(r"(?i)[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_FILE = re.compile(r"iVBORw0KGg|/9j/|R0lGOD|UklGR|Qk0|JVBERi0|PHN2Zy|PD94bWw|UEsDB|AAAB")
"""How PNG, JPEG, GIF, WebP, BMP, PDF, SVG, XML, ZIP and MP4 files begin in base64."""
_FILE_HASH = re.compile(r"sha(?:256|384|512)-")
_SECRET_WORD = re.compile(
    r"(?i)(?:secret|passw|pwd|token|credential|api.?key|access.?key|private.?key|bearer|auth)"
    r"[\w\"' ]{0,16}[\s:=\"'`(]{0,6}$"
)

COMMON_PAIRS = frozenset(
    (
        "an er in re en te on at es ti nt st de ar or al to is ed le co ra it ro io nd se th me "
        "li ri he ne ng si ic la ce et di ca ma as el pe om tr ns ta us ha il ec lo ve na pr un "
        "ch ec ac mo ge po ou ur sa no ol em mi ad su ss id ni so rs ct tu ie sp pa am ts ee pl "
        "ho bl ex we ag sh be ul ot im os op ir fi ai ap ig ev vi ke fo ef wi rt ut ls bo ll ay "
        "ab ow ck um ld ea uc bu gr mp ty rd da up ep cl vo fa od qu hi qu vi cr do va ey go da "
        "tt gi fu ry wo cu ff nc ga ff sc rm au ub by ci nu oc rc ok iv sy ys rr lt pp mb fe ph "
        "bi sk br wh lu ob iz av eq oo ws ki ui mu wn ya rn gs ft rk ds lf dr og du hr tm ht sw"
    ).split()
)
"""Letter pairs that make up nine tenths of the pairs in words and identifiers."""

EXPECTED_PAIRS = frozenset(
    [
        *itertools.product(string.digits, repeat=2),
        *(
            pair
            for both in COMMON_PAIRS
            for pair in itertools.product(*zip(both, both.upper(), strict=True))
        ),
    ]
)
"""Of neighbours: two digits, or the letters of a common pair, small or large."""


def _is_random(value: str, before: str) -> bool:
    if len(value) > MAX_LENGTH or before.endswith("base64,"):
        return False
    if _FILE_HASH.match(value) or (len(value) >= MIN_FILE_LENGTH and _FILE.match(value)):
        return False
    if _HEX.fullmatch(value) and len(value) in HASH_LENGTHS:
        return _SECRET_WORD.search(before) is not None and not value.isdigit()
    if not _MIXED.search(value):
        return False
    pairs = surprises = 0
    has_digit = has_lower = has_upper = False
    # A UUID identifies, it does not unlock.
    segments = _SEGMENT.findall(_UUID.sub("/", value))
    if max(map(len, segments), default=0) < MIN_SEGMENT:
        return False
    for segment in segments:
        if _HEX.fullmatch(segment) and len(segment) in HASH_LENGTHS:
            continue
        has_digit = has_digit or not segment.isalpha()
        has_lower = has_lower or not segment.isupper()
        has_upper = has_upper or not segment.islower()
        pairs += len(segment) - 1
        surprises += sum(pair not in EXPECTED_PAIRS for pair in pairwise(segment))
    return (
        pairs >= MIN_LENGTH // 2
        and has_digit + (has_lower and has_upper) >= 1
        and surprises >= MIN_SURPRISE * pairs
    )


RANDOM = Family(
    lambda view: view.long_words,
    (
        pattern_detector(
            "HIGH_ENTROPY", r"(?<![A-Za-z0-9_+/-])[\w+/-]{24,}={0,2}(?![=])", _is_random
        ),
    ),
)
