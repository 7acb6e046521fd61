"""Addresses of machines: IPv4 and IPv6, told from versions, times, hardware addresses, slices."""

import ipaddress
import re
from collections.abc import Iterator

from dflash_data.privacy.detectors.detector import Detector, Family, context, everywhere_if
from dflash_data.privacy.detectors.text_view import Span

_IPV4 = re.compile(
    r"(?<![A-Za-z0-9_])(?<!\d\.)\d{1,3}(?:\.\d{1,3}){3}(?![A-Za-z0-9_]|\.\d|-py"
    r"|\.(?:tar|t?gz|zip|whl|jar|exe|dll|deb|rpm|so|dmg|msi|pkg|nupkg)\b)"
)
_IPV4_SIGN = re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")
_VERSION_BEFORE = re.compile(
    r"(?i)(?:(?:version|release|build|firmware|driver|software|upgrade|patch|ver\.?|section"
    r"|chapter|clause|rev|revision|oid|agent)[\s\"':=_]*v?|[A-Za-z]/|[=~^<>]=|\u00a7 ?)$"
)
_IPV6_SIGN = re.compile(r"::|:[0-9A-Fa-f]{1,4}:")
_IPV6 = re.compile(
    r"(?<![A-Za-z0-9_:.])(?:[0-9A-Fa-f]{1,4}:|:)(?:[0-9A-Fa-f]{0,4}:){1,7}[0-9A-Fa-f]{0,4}"
    r"(?![A-Za-z0-9_:])"
)


def _ipv4_spans(text: str, place: Span) -> Iterator[Span]:
    for match in _IPV4.finditer(text, *place):
        if _VERSION_BEFORE.search(context(text, match.start())):
            continue
        try:
            address = ipaddress.IPv4Address(match[0])
        except ValueError:
            continue
        if not (address.is_loopback or address.is_unspecified or match[0].startswith("255.")):
            yield match.span()


def _ipv6_spans(text: str, place: Span) -> Iterator[Span]:
    for match in _IPV6.finditer(text, *place):
        value = match[0]
        if value.endswith(":") and not value.endswith("::"):
            value = value[:-1]  # the colon of the sentence
        is_slice = text[: match.start()].endswith("[") and not value.replace(":", "").isalpha()
        if _is_ipv6(value, in_brackets=is_slice):
            yield match.start(), match.start() + len(value)


def _is_ipv6(value: str, *, in_brackets: bool) -> bool:
    groups = [group for group in value.split(":") if group]
    if len(groups) < 2 or not any(map(str.isdigit, value)):
        return False  # a scope of C++, such as `abc::def`
    if "::" not in value and all(len(group) == 2 for group in groups):
        return False  # part of a hardware address
    if len(groups) < 4 and (len(groups[0]) < 3 or (in_brackets and "".join(groups).isdigit())):
        return False  # a time, or a slice such as `[100::2]`
    try:
        return not ipaddress.IPv6Address(value).is_loopback
    except ValueError:
        return False


IPV4 = Family(everywhere_if(_IPV4_SIGN.search), (Detector("IPV4", _ipv4_spans),))
IPV6 = Family(everywhere_if(_IPV6_SIGN.search), (Detector("IPV6", _ipv6_spans),))
