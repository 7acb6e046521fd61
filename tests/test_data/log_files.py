"""Invented log files for the tests of `dflash_data.logs`."""

import gzip
from pathlib import Path
from typing import Any

import orjson

from dflash_data.logs.compression import zstd


def pair(number: int) -> dict[str, Any]:
    """Give one OpenAI request and response."""
    messages = [{"role": "user", "content": f"Is bay {number} free?"}]
    answer = {"message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}
    return {"request": {"model": "small", "messages": messages}, "response": {"choices": [answer]}}


def lines(num_calls: int) -> bytes:
    """Give a log of such pairs, one JSON object a line."""
    return b"".join(orjson.dumps(pair(number)) + b"\n" for number in range(num_calls))


def write(path: Path, content: bytes) -> Path:
    """Write a file, packed as its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packing = {".gz": gzip.compress, ".zst": zstd.compress}.get(path.suffix, bytes)
    path.write_bytes(packing(content))
    return path
