"""Secrets that a mark at their beginning gives away: PEM blocks, tokens, keys, addresses."""

import re
from collections.abc import Iterator

from dflash_data.privacy.detectors.detector import Detector, Family, everywhere_if, pattern_detector
from dflash_data.privacy.detectors.text_view import Span, TextView

_PEM_BEGIN = re.compile(r"-{4,5} ?BEGIN [A-Z0-9 ]{1,40}-{4,5}")
_PEM_END = re.compile(r"-{4,5} ?END [A-Z0-9 ]{1,40}-{4,5}")
_PEM_BODY = re.compile(r"(?:[A-Za-z0-9+/=]{16,}|[\w-]{1,30}: [^\n\"]{0,200}\n|\s+)*+")
"""Lines of a block whose end was cut off: base64 and headers, not the prose behind it."""

_KEY_MARK = re.compile(r"eyJ|A(?:KIA|SIA|ROA|IDA|Iza)|gh[pousr]_|github_pat_|sk-|hf_")


def _pem_spans(text: str, _place: Span) -> Iterator[Span]:
    """Yield blocks from BEGIN to END; each search for an END goes on where the last one ended."""
    read_to = 0
    end = _PEM_END.search(text)
    for begin in _PEM_BEGIN.finditer(text):
        if begin.start() < read_to:
            continue
        while end is not None and end.start() < begin.end():
            end = _PEM_END.search(text, max(end.end(), begin.end()))
        if end is None:
            body = _PEM_BODY.match(text, begin.end())
            read_to = begin.end() + (len(body[0].rstrip()) if body else 0)
        else:
            read_to = end.end()
        yield begin.start(), read_to


def _words_with_marks(view: TextView) -> list[Span]:
    return [word for word in view.long_words if _KEY_MARK.search(view.text, *word)]


def _is_key(value: str, _before: str) -> bool:
    """Tell a key from a name in kebab case, such as the classes of a style sheet."""
    return any(character.isdigit() or character.isupper() for character in value)


PEM = Family(everywhere_if(lambda text: "BEGIN" in text), (Detector("PEM", _pem_spans),))

KEYS = Family(
    _words_with_marks,
    (
        pattern_detector(
            "JWT",
            r"""(?<![A-Za-z0-9])eyJ[\w-]{8,1024}+\.
            (?:eyJ[\w-]{4,65536}+(?:\.[\w-]{1,8192}+)?|[\w-]{4,8192}+(?:\.[\w-]{1,8192}+){1,3})""",
        ),
        pattern_detector(
            "AWS_KEY", r"(?<![A-Za-z0-9])(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}(?![A-Za-z0-9])"
        ),
        pattern_detector("GCP_KEY", r"(?<![A-Za-z0-9])AIza[\w-]{35}"),
        pattern_detector(
            "GITHUB_KEY", r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{22,255})"
        ),
        pattern_detector(
            "OPENAI_KEY",
            r"(?<![A-Za-z0-9])sk-(?:[a-z]{2,10}-){0,4}[\w-]{19,255}[A-Za-z0-9]",
            _is_key,
        ),
        pattern_detector("HF_KEY", r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,255}"),
    ),
)

ADDRESSES = Family(
    everywhere_if(lambda text: "@" in text and ":" in text),
    (
        pattern_detector(
            "URL_CREDENTIALS",
            r"""(?<=[A-Za-z0-9]):(?:\\?/){2}
            (?P<value>[^\s:/@"'<>]{0,64}:[^\s/"'<>]{1,256})@(?=[A-Za-z0-9\[])""",
        ),
    ),
)
