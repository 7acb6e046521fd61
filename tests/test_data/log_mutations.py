"""Broken logs of every format, and what reading and scrubbing must do with any of them.

A line is a good sample after a few of: the value of a key replaced by any other (of another type,
nested deep, huge, private), a key that stands twice, a byte changed or one of its bits flipped, a
piece cut out or doubled, a lone surrogate put in, the end cut off. The same dice, the same log.
"""

import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import orjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dflash_data.adapters import FORMATS
from dflash_data.drops import Drop
from dflash_data.ingest.explode import bucket_of, explode
from dflash_data.ingest.on_policy import judge
from dflash_data.ingest.steps import name_sessions
from dflash_data.logs.sniffing import Layout
from dflash_data.logs.sources import LogPart, LogSlice, read_part
from dflash_data.privacy.pseudonyms import Pseudonyms
from dflash_data.privacy.scrub import scrub_call
from dflash_data.privacy.text_of_ids import TextOfIds, hides_text
from dflash_train.config import DataConfig
from dflash_train.records.conversation import Conversation
from tests.test_data.test_adapters_fuzz import SAMPLES, VLLM_LINES, places, with_value

BATCH = [
    b'{"custom_id":"row-17","method":"POST","url":"/v1/chat/completions","body":{"model":"small",'
    b'"messages":[{"role":"user","content":"Is the trial still open?"}]}}',
    b'{"id":"b","custom_id":"row-17","response":{"status_code":200,"body":{"object":'
    b'"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"Yes."},'
    b'"finish_reason":"stop"}]}},"error":null}',
]
VALUES: list[Any] = [
    None, True, 0, -1, 2**63, 1e308, "", "\x00", "\ud83d\ude00".encode("utf-16", "surrogatepass")
    .decode("utf-16"), "\ue000EMAIL:", "ana@example.org", "4111 1111 1111 1111", [], {}, [[]],
    [{}], {"role": "user"}, "user", "tool", "[]", '{"a":1}', "9" * 400, ["x"] * 9, {"type": "text"},
]  # fmt: skip


RAW_VALUES = (
    b"[" * 40 + b"]" * 40, b'{"a":' * 30 + b"1" + b"}" * 30, b"[" * 2000 + b"]" * 2000,
    b"9" * 400, b"-" + b"9" * 5000, b"1e999", b"1e-400", b"123456789012345678901234567890.5",
    b'"\\ud800"', b'"\\udfff x"', b'"\\ud83d\\ud83d"', b"NaN", b'"' + b"a@b.de " * 99 + b'"',
)  # fmt: skip
"""Values as no JSON writer of ours would write them."""
LOG_LINES = 20
HOLE = "a value goes here"


def fuzz(name: str, path: Path, num_lines: int) -> Counter[str]:
    """Let hypothesis break logs of one format, read and scrub each, check its books; sum them.

    Args:
        name: The format.
        path: Where each log lies meanwhile.
        num_lines: In all.
    """
    total: Counter[str] = Counter()

    @settings(
        max_examples=-(-num_lines // LOG_LINES),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(rng=st.randoms(use_true_random=False))
    def check(rng: Random) -> None:
        lines = mutated_log(name, LOG_LINES, rng=rng)
        counts = read_and_scrub(path, name, lines)
        assert counts["read"] == counts["kept"] + num_dropped(counts)
        total.update(counts, lines=len(lines))

    check()
    return total


def mutated_log(name: str, num_lines: int, *, rng: Random) -> list[bytes]:
    """Give the lines of a broken log of one format."""
    return [_mutated_line(name, rng, number // 12) for number in range(num_lines)]


def _mutated_line(name: str, rng: Random, request: int) -> bytes:
    line = _sound_line(name, rng, request)
    if name != "vllm_log":
        line = _with_other_values(line, rng)
    for _ in range(rng.choice((0, 0, 1, 3))):
        line = _with_other_bytes(line, rng)
    if rng.random() < 0.05:
        line = line[: rng.randint(0, len(line))]
    return line.replace(b"\n", b" ").replace(b"\r", b" ")


def _sound_line(name: str, rng: Random, request: int) -> bytes:
    if name in SAMPLES:
        return orjson.dumps(rng.choice(SAMPLES[name]))
    # Lines of one request lie close together.
    line = rng.choice(BATCH if name == "openai_batch" else VLLM_LINES)
    for old, new in ((b"row-17", b"row-%d"), (b" c-1", b" c-1%d"), (b"chatcmpl-2", b"cmpl-2%d")):
        line = line.replace(old, new % request)
    return line


def _with_other_values(line: bytes, rng: Random) -> bytes:
    sample = orjson.loads(line)
    for _ in range(rng.randint(0, 2)):
        sample = with_value(sample, rng.choice(places(sample)), rng.choice([HOLE, *VALUES]))
    line = orjson.dumps(sample).replace(b'"%s"' % HOLE.encode(), rng.choice(RAW_VALUES))
    return _with_key_twice(line, rng) if rng.random() < 0.1 else line


def _with_other_bytes(line: bytes, rng: Random) -> bytes:
    """Flip a bit, or put something in the place of a few bytes."""
    start = rng.randint(0, max(0, len(line) - 1))
    end = min(len(line), start + rng.randint(1, 12))
    old = line[start:end]
    flipped = bytes([old[0] ^ 1 << rng.randint(0, 7)]) + old[1:] if old else b""
    any_byte = bytes([rng.randint(0, 255)])
    marks = (b"\\u0000", b"\\ud800", b"\xed\xa0\x80", rng.choice(RAW_VALUES))
    return line[:start] + rng.choice((any_byte, flipped, b"", old * 3, *marks)) + line[end:]


def _with_key_twice(line: bytes, rng: Random) -> bytes:
    """Let one key stand in its object a second time, with another value."""
    again = rng.choice(list(_KEY.finditer(line)))
    value = rng.choice((*RAW_VALUES, b"null", b"{}", b'"x"'))
    return line[: again.start()] + again[0] + value + b"," + line[again.start() :]


_KEY = re.compile(rb'(?<=[{,])"\w+":')


def read_and_scrub(path: Path, name: str, lines: list[bytes]) -> Counter[str]:
    """Take a log through reading, judging, scrubbing and exploding; count what came of it."""
    path.write_bytes(b"\n".join(lines))
    whole = LogSlice(
        address=str(path), name=path.name, layout=Layout.lines, num_bytes=path.stat().st_size
    )
    pseudonyms, text_of_ids = Pseudonyms(b"the key of this test"), TextOfIds(None)
    counts: Counter[str] = Counter()
    records: list[Conversation] = []
    for call in read_part(LogPart(format=name, slices=(whole,))):
        counts["read"] += 1
        if isinstance(call, Drop):
            counts[f"dropped/{call.reason.value}"] += 1
            continue
        judge(call, DataConfig())
        if hides_text(call):
            reason = text_of_ids.reveal(call)
            assert reason is not None
            counts[f"dropped/{reason.value}"] += 1
            continue
        scrub_call(call, pseudonyms)
        assert call.privacy.scrubbed
        assert Conversation.from_json(call.to_json()) == call
        assert 0 <= bucket_of(call, 7) < 7
        records.append(call)
    sifted = explode(records)
    for reason, number in sifted.dropped.items():
        counts[f"dropped/{reason.value}"] += number
    counts["kept"] = len(name_sessions(sifted.kept).kept)
    return counts


def num_dropped(counts: Counter[str]) -> int:
    """Sum the drops of all reasons."""
    return sum(number for name, number in counts.items() if name.startswith("dropped/"))


ALL_FORMATS = sorted(FORMATS)
