"""Finds personal data and secrets in a text, with checksums against look-alikes.

Each kind has a pattern and a rule that a match must also satisfy: an order number is not a card
unless Luhn's sum fits, a version number is not an address. Earlier families win where two
findings overlap. Most text holds nothing, so every family first says cheaply where to look.
"""

from bisect import bisect

from dflash_data.privacy.detectors.account_numbers import IBANS, NUMBERS
from dflash_data.privacy.detectors.contacts import EMAILS, PHONES
from dflash_data.privacy.detectors.detector import Family, Finding
from dflash_data.privacy.detectors.network import IPV4, IPV6
from dflash_data.privacy.detectors.randomness import RANDOM
from dflash_data.privacy.detectors.secrets import ADDRESSES, KEYS, PEM
from dflash_data.privacy.detectors.text_view import TextView

__all__ = ["FAMILIES", "KINDS", "SECRETS", "Finding", "find_private"]

FAMILIES: tuple[Family, ...] = (
    PEM, KEYS, ADDRESSES, EMAILS, IBANS, IPV4, IPV6, NUMBERS, PHONES, RANDOM,
)  # fmt: skip
"""In order of precedence."""

KINDS = tuple(detector.kind for family in FAMILIES for detector in family.detectors)

SECRETS = frozenset(
    {
        "PEM", "JWT", "AWS_KEY", "GCP_KEY", "GITHUB_KEY", "OPENAI_KEY", "HF_KEY",
        "URL_CREDENTIALS", "HIGH_ENTROPY",
    }
)  # fmt: skip
"""Kinds that drop a record if they stand in its answer."""


def find_private(text: str, *, families: tuple[Family, ...] = FAMILIES) -> list[Finding]:
    """Give all findings in a text, in order, without overlaps."""
    taken: list[Finding] = []
    view = TextView(text)
    for family in families:
        for place in family.places(view):
            for detector in family.detectors:
                for start, end in detector.spans(view.text, place):
                    _take(taken, Finding(start, end, detector.kind))
    return taken


def _take(taken: list[Finding], finding: Finding) -> None:
    """Insert a finding at its place unless it overlaps one that is there."""
    place = bisect(taken, finding)
    starts_after = place == 0 or taken[place - 1].end <= finding.start
    if starts_after and (place == len(taken) or finding.end <= taken[place].start):
        taken.insert(place, finding)
