"""Broken logs of every format, and what reading and scrubbing must do with any of them.

A line is a good sample after a few of: a byte changed, a piece cut out or doubled, the value of a
key replaced by any other, private text put somewhere. The same seed gives the same log.
"""

import copy
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import orjson

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


def mutated_log(name: str, num_lines: int, *, seed: int) -> list[bytes]:
    """Give the lines of a broken log of one format."""
    rng = Random(f"{name} {seed}")
    return [_mutated_line(name, rng, number // 12) for number in range(num_lines)]


def _mutated_line(name: str, rng: Random, request: int) -> bytes:
    if name in SAMPLES:
        sample = copy.deepcopy(rng.choice(SAMPLES[name]))
        for _ in range(rng.randint(0, 2)):
            sample = with_value(sample, rng.choice(places(sample)), rng.choice(VALUES))
        line = orjson.dumps(sample)
    else:
        # Lines of one request lie close together.
        line = rng.choice(BATCH if name == "openai_batch" else VLLM_LINES)
        for old, new in (
            (b"row-17", b"row-%d"),
            (b" c-1", b" c-1%d"),
            (b"chatcmpl-2", b"cmpl-2%d"),
        ):
            line = line.replace(old, new % request)
    for _ in range(rng.choice((0, 0, 1, 3))):
        start = rng.randrange(len(line) or 1)
        end = min(len(line), start + rng.randint(1, 12))
        change = rng.choice((bytes([rng.randrange(256)]), b"", line[start:end] * 3, b"\\u0000"))
        line = line[:start] + change + line[end:]
    return line.replace(b"\n", b" ").replace(b"\r", b" ")


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
