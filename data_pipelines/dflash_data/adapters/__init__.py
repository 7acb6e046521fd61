"""One module per log format, each with a `FORMAT` that turns its lines into conversations.

A reader gives, for each call in its lines, a `Conversation` or the `Drop` that says why there
is none. It raises nothing and touches nothing. `session`, `tenant` and `source_ref` still hold
the provider's own values; the scrub step replaces them by keyed hashes before anything is
written.

`fields` and `messages` hold what formats share: tolerant look-up, times, OpenAI messages.
"""

from collections.abc import Iterable
from itertools import islice

import orjson

from dflash_data.adapters import (
    helicone,
    langfuse,
    litellm,
    openai,
    openai_batch,
    opentelemetry,
    sglang,
    sharegpt,
    vllm_log,
    weave,
)
from dflash_data.adapters.log_format import LogFormat

FORMATS: dict[str, LogFormat] = {
    form.name: form
    for form in (
        openai_batch.FORMAT,
        openai.FORMAT,
        litellm.FORMAT,
        langfuse.FORMAT,
        helicone.FORMAT,
        vllm_log.FORMAT,
        sglang.FORMAT,
        weave.FORMAT,
        opentelemetry.FORMAT,
        sharegpt.FORMAT,  # last: any object with messages that nothing else claims
    )
}
"""Formats by name, in the order in which a line is offered to them."""

NUM_SAMPLES = 20
"""Lines of a known format after which a file's format is settled."""


def detect_format(lines: Iterable[bytes], *, expected: str | None = None) -> LogFormat:
    """Give the one format of some lines from the start of a log; lines of none are passed over.

    Args:
        lines: Read until enough are of a known format.
        expected: Name of the format that the user says it is; it is offered each line first.

    Raises:
        ValueError: No line is of a known format, or they are of several, or not of `expected`.
            The message goes on after the name of the log.
    """
    offered = sorted(FORMATS.values(), key=lambda form: form.name != expected)
    recognised = (form.name for line in lines if (form := _format_of(line, offered)))
    found = set(islice(recognised, NUM_SAMPLES))
    if not found and expected is None:
        raise ValueError(
            f"holds no line of a known format ({', '.join(FORMATS)}). Set data.format if it is "
            "one of them, else leave the file out."
        )
    if len(found) > 1:
        raise ValueError(
            f"holds lines of several formats ({', '.join(sorted(found))}). A log file has one "
            "format: give each a file of its own."
        )
    if expected is not None and found - {expected}:
        raise ValueError(
            f"holds lines of the format {found.pop()}, but data.format (={expected}) holds for "
            "every file. Leave data.format out: then the format of each file is detected."
        )
    return FORMATS[expected or found.pop()]


def _format_of(line: bytes, offered: list[LogFormat]) -> LogFormat | None:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return next((form for form in offered if _recognises_text(form, line)), None)
    if not isinstance(value, dict):
        return None
    return next((form for form in offered if form.recognises(value)), None)


def _recognises_text(form: LogFormat, line: bytes) -> bool:
    return form.recognises_text is not None and form.recognises_text(line)
