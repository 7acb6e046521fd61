"""A seeded fleet of clients that stands in for production logs.

    dflash-train sample-traffic out=traffic.jsonl seed=0 requests=600

Nobody's real log can ship with a toolkit, so the demo plays one: tenants with their own system
prompt and request mix, sessions of one to three turns, two weeks of time stamps, repeats of
popular requests, and the dirt of real logs on top of the usable requests. The log holds
OpenAI request/response pairs without answers (null, also in the history of later turns): the
target writes them in `regenerate`. The same seed gives the same bytes on one machine.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from dflash_data.sample_traffic.library import read_library
from dflash_data.sample_traffic.requests import Opener
from dflash_data.sample_traffic.tenants import TENANTS, Desk, Tenant
from dflash_train.records.manifest import atomic_path

MODEL = "smollm2"
EPOCH = 1_790_812_800
"""2026-10-01T00:00:00Z, in seconds since 1970."""
DAY_S = 86_400
NUM_DAYS = 14
TURN_WEIGHTS = (0.66, 0.25, 0.09)
"""Shares of sessions that want one, two and three turns."""
LONG_OPENER = 260
"""Characters from which a session has at most two turns: its prompts are long already."""
DIRT_SHARES = {"malformed": 0.015, "truncated": 0.015, "failed": 0.02, "repeated": 0.02}
"""Lines of each kind of dirt, as a share of the usable requests; at least one of each."""


@dataclass(frozen=True)
class LogLine:
    """One line of the log and its kind: a request kind or a kind of dirt."""

    kind: str
    created: int
    """Seconds since 1970."""
    text: bytes


def write_sample_traffic(out: Path, *, seed: int, num_requests: int) -> dict[str, int]:
    """Write the log atomically and give the number of lines of each kind.

    Raises:
        ValueError: The number of requests is below 1, or the file cannot be written.
    """
    kinds: Counter[str] = Counter()
    try:
        with atomic_path(out) as partial, partial.open("wb") as stream:
            for line in _play(seed, num_requests):
                kinds[line.kind] += 1
                stream.write(line.text + b"\n")
    except OSError as error:
        raise ValueError(
            f"out (={out}) cannot be written ({error.strerror}). Name a file in a writable folder."
        ) from error
    return dict(sorted(kinds.items()))


def play_fleet(*, seed: int, num_requests: int) -> Iterator[bytes]:
    """Yield the lines of the log in order of time: `num_requests` usable ones, and dirt."""
    return (line.text for line in _play(seed, num_requests))


def _play(seed: int, num_requests: int) -> list[LogLine]:
    if num_requests < 1:
        raise ValueError(f"requests (={num_requests}) must be at least 1. Set it to 600.")
    rng = Random(f"fleet {seed}")
    usable = _usable_lines(rng, num_requests)
    dirt = [line for kind in DIRT_SHARES for line in _dirt(rng, kind, usable)]
    return sorted(usable + dirt, key=lambda line: (line.created, line.text))


def _usable_lines(rng: Random, num_requests: int) -> list[LogLine]:
    library = read_library()
    desks = [Desk(tenant, Random(f"{tenant.name} {rng.random()}"), library) for tenant in TENANTS]
    shares = [tenant.share for tenant in TENANTS]
    lines: list[LogLine] = []
    while len(lines) < num_requests:
        desk = rng.choices(desks, shares)[0]
        lines += _session(rng, desk.tenant, desk.open())[: num_requests - len(lines)]
    return lines


def _session(rng: Random, tenant: Tenant, opener: Opener) -> list[LogLine]:
    """Play one user: the opener, then follow-ups, each request with the whole history."""
    session = f"s-{rng.getrandbits(48):012x}"
    num_turns = rng.choices((1, 2, 3), TURN_WEIGHTS)[0]
    if len(opener.text) > LONG_OPENER:
        num_turns = min(num_turns, 2)
    created = _start_time(rng)
    messages = [_message("system", tenant.system), _message("user", opener.text)]
    lines = [_request_line(rng, tenant, opener.kind, session, created, messages)]
    for follow_up in rng.sample(opener.follow_ups, num_turns - 1):
        created += rng.randint(15, 120)
        messages = [*messages, _message("assistant", None), _message("user", follow_up)]
        lines.append(_request_line(rng, tenant, opener.kind, session, created, messages))
    return lines


def _start_time(rng: Random) -> int:
    """Draw a moment in the 14 days, most of them around the middle of the working day."""
    second_of_day = min(max(rng.gauss(14 * 3600, 3 * 3600), 0), DAY_S - 1000)
    return EPOCH + rng.randrange(NUM_DAYS) * DAY_S + int(second_of_day)


def _message(role: str, content: str | None) -> dict[str, str | None]:
    return {"role": role, "content": content}


def _request_line(
    rng: Random,
    tenant: Tenant,
    kind: str,
    session: str,
    created: int,
    messages: list[dict[str, str | None]],
) -> LogLine:
    pair = {
        "id": f"req-{rng.getrandbits(64):016x}",
        "created": created,
        "request": {
            "model": MODEL,
            "messages": messages,
            "temperature": 0,
            "user": tenant.name,
            "metadata": {"session_id": session},
        },
        "response": None,
    }
    return LogLine(kind, created, _dump(pair))


def _dirt(rng: Random, kind: str, usable: list[LogLine]) -> Iterator[LogLine]:
    """Yield lines that no pipeline may stumble over, each made from a usable one."""
    for _ in range(max(1, round(DIRT_SHARES[kind] * len(usable)))):
        line = rng.choice(usable)
        text = {
            "malformed": _malformed,
            "truncated": _truncated,
            "failed": _failed,
            "repeated": lambda _rng, text: text,
        }[kind](rng, line.text)
        yield LogLine(kind, line.created, text)


def _malformed(rng: Random, text: bytes) -> bytes:
    return rng.choice(
        (
            text.replace(b'"', b"'"),
            text.replace(b":", b"", 1),
            b"WARN gateway: upstream reset, body follows " + text,
            text + text[: len(text) // 2],
        )
    )


def _truncated(rng: Random, text: bytes) -> bytes:
    return text[: rng.randrange(1, len(text) - 1)]


def _failed(rng: Random, text: bytes) -> bytes:
    """Answer with an error; the client tried again, which is the usable line."""
    pair = json.loads(text)
    status, reason = rng.choice(((429, "rate_limit"), (500, "internal_error"), (503, "overloaded")))
    failure = {"id": f"req-{rng.getrandbits(64):016x}", "status": status}
    return _dump({**pair, **failure, "error": {"type": reason}})


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
