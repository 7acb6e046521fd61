"""A server's `/metrics`: saved pages, or a running server that is asked and remembered.

    dflash-train drift recipe=NAME drift.metrics_url=http://localhost:8000/metrics

Each call asks once (or `drift.polls` times) and appends what it saw to `readings.jsonl` of the run,
so a call every minute by cron watches a server, and nothing is lost when one is stopped.
"""

import sys
import time
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import httpx2
import orjson
from tqdm import tqdm

from dflash_data.logs.compression import DAMAGE, open_unpacked
from dflash_data.served.prometheus import read_page
from dflash_data.served.readings import Reading, rows_of_readings
from dflash_train.config import DriftConfig, UnavailableError, require
from dflash_train.records.served import ServedRows

READINGS_FILE = "readings.jsonl"
TIMEOUT_S = 30.0


def read_saved_pages(entries: list[str]) -> ServedRows:
    """Give the intervals between saved pages.

    The time of a page is that of its samples, else of its file; pages of one time follow by name.

    Args:
        entries: Files or globs, one for each server; compressed ones too.

    Raises:
        ValueError: An entry matches no file, or none of its pages tells of speculative decoding.
    """
    readings: list[Reading] = []
    num_unreadable = 0
    for number, entry in enumerate(entries):
        paths = sorted(
            Path(place) for place in glob(entry, recursive=True) if Path(place).is_file()
        )
        require(bool(paths), f"drift.pages (={entry}) matches no file. Give saved pages.")
        found: list[Reading] = []
        for path in paths:
            page = read_page(_text(path))
            num_unreadable += page.num_unreadable
            moment = path.stat().st_mtime if page.moment is None else page.moment
            server = f"server {number + 1}" if len(entries) > 1 else ""
            if page.engines:
                found.append(Reading(moment=moment, server=server, engines=page.engines))
        require(
            bool(found),
            f"drift.pages (={entry}) holds no counts of speculative decoding. vLLM shows them with "
            "--speculative-config, SGLang with --enable-metrics.",
        )
        readings += sorted(found, key=lambda reading: reading.moment)
    return rows_of_readings(readings, num_unreadable=num_unreadable)


def poll_server(config: DriftConfig, folder: Path) -> ServedRows:
    """Ask a server, remember, and give the intervals of all that is remembered of it.

    Args:
        config: Address, how often and how far apart.
        folder: Where readings are kept.

    Raises:
        ValueError: The address is none, or its page does not tell of speculative decoding.
        UnavailableError: The server did not answer even once.
    """
    url = config.metrics_url
    assert url is not None
    path = folder / READINGS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    num_failed = 0
    bar = tqdm(range(config.polls), desc="drift: asking", unit="page", file=sys.stderr)
    for number in bar:
        if number:
            time.sleep(config.poll_s)
        try:
            reading = _ask(url)
        except httpx2.HTTPError as error:
            num_failed += 1
            tqdm.write(f"drift: {url} gave no page ({type(error).__name__})", file=sys.stderr)
            continue
        _append(path, orjson.dumps(reading.as_plain()))
    if num_failed == config.polls:
        raise UnavailableError(
            f"drift.metrics_url (={url}) did not answer. Is the server running, and are its "
            "metrics on?"
        )
    kept, num_unreadable = _remembered(path, url)
    return rows_of_readings(kept, num_unreadable=num_unreadable)


def _ask(url: str) -> Reading:
    try:
        reply = httpx2.get(url, timeout=TIMEOUT_S, follow_redirects=True)
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise ValueError(
            f"drift.metrics_url (={url}) is no address. Set it to http://localhost:8000/metrics, "
            "for example."
        ) from error
    reply.raise_for_status()
    page = read_page(reply.text)
    require(
        bool(page.engines),
        f"drift.metrics_url (={url}) shows no counts of speculative decoding. vLLM shows them with "
        "--speculative-config, SGLang with --enable-metrics.",
    )
    return Reading(moment=time.time(), server=url, engines=page.engines)


def _append(path: Path, line: bytes) -> None:
    """Append a line in one piece; one that a crash cut off before it stays a line of its own."""
    with path.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, 2)
            if stream.read(1) != b"\n":
                line = b"\n" + line
        stream.write(line + b"\n")


def _remembered(path: Path, url: str) -> tuple[list[Reading], int]:
    """Give the readings of one server, and how many lines were none."""
    found: list[Reading] = []
    num_unreadable = 0
    for line in _lines(path):
        try:
            reading = Reading.of(orjson.loads(line))
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
            num_unreadable += 1
            continue
        if reading.server == url:
            found.append(reading)
    for reading in found:
        reading.server = ""
    return found, num_unreadable


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        yield from (line for line in stream if line.strip())


def _text(path: Path) -> str:
    """Give a page, up to where it is damaged."""
    with open_unpacked(str(path)) as stream:
        try:
            return stream.read().decode(errors="replace")
        except DAMAGE:
            return ""
