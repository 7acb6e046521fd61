"""Request logs -> rows: the adapters of `ingest`, of which only numbers and keyed hashes are kept.

Read are the parts of a log one after the other, and each part's rows stay in a file of their own,
under a name made of what the part is. So memory is bounded by one part and by some 70 bytes a call,
a log that grew is read where it is new, and an interrupted reading goes on.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.core import url_to_fs
from tqdm import tqdm

from dflash_data.adapters import sglang, vllm_log
from dflash_data.drops import Drop
from dflash_data.logs.sniffing import read_file
from dflash_data.logs.sources import LogPart, LogSlice, plan_parts, read_part
from dflash_data.logs.tables import HUB_PREFIX, hub_revision
from dflash_data.privacy.pseudonyms import Pseudonyms, load_pseudonyms
from dflash_data.served.server_log import rows_of_server_log
from dflash_train.config import RecipeConfig, parse_moment
from dflash_train.records.conversation import Conversation
from dflash_train.records.manifest import content_hash
from dflash_train.records.served import FORMAT_VERSION, SERVED_ROW, Rows, ServedRows

ROWS_FOLDER = "rows"
NO_TENANT = "unknown"
NAME_DIGITS = 24
CHUNK_ROWS = 50_000
HASH_DIGITS = 16


class NoRowError(Exception):
    """A call tells nothing about its drafts; the reason is counted."""


def read_calls(config: RecipeConfig, logs: str, folder: Path) -> ServedRows:
    """Give the rows of a log in order of time.

    Args:
        config: Format of the log, customers who opted out, the key of the hashes.
        logs: What `data.logs` may be.
        folder: Where the rows of each part are kept; those of other logs go.

    Raises:
        ValueError: No log is there, or it is refused.
    """
    pseudonyms = load_pseudonyms(config)
    excluded = frozenset(pseudonyms.hide("tenant", name) for name in config.data.excluded_tenants)
    parts = plan_parts(logs, format=config.data.format)
    if {part.format for part in parts} == {vllm_log.FORMAT.name}:
        return _read_server_logs(parts)
    settled = [pseudonyms.hide("key", "served rows"), sorted(excluded), FORMAT_VERSION]
    names = [_name(part, settled) for part in parts]
    for left in (folder / ROWS_FOLDER).glob("*.npz"):
        if left.name not in names:
            left.unlink()
    pieces: list[ServedRows] = []
    total = sum(part.num_bytes for part in parts)
    with tqdm(
        desc="drift: reading", total=total, unit="B", unit_scale=True, file=sys.stderr
    ) as bar:
        for part, name in zip(parts, names, strict=True):
            path = folder / ROWS_FOLDER / name
            piece = ServedRows.read_from(path) if path.exists() else None
            if piece is None:
                piece = rows_of_calls(read_part(part), pseudonyms, excluded=excluded)
                piece.write(path)
            pieces.append(piece)
            bar.update(part.num_bytes)
    return ServedRows.joined(pieces)


def _read_server_logs(parts: list[LogPart]) -> ServedRows:
    """Give what vLLM's text logs tell of all requests together."""
    pieces = [
        rows_of_server_log(read_file(piece.address, piece.name, piece.layout))
        for part in parts
        for piece in tqdm(part.slices, desc="drift: reading", unit="file", file=sys.stderr)
    ]
    return ServedRows.joined(pieces, unit="intervals")


def rows_of_calls(
    calls: Iterator[Conversation | Drop], pseudonyms: Pseudonyms, *, excluded: frozenset[str]
) -> ServedRows:
    """Give a row for each call that tells how well it was drafted for, and count the others.

    Args:
        calls: Of an adapter, with the provider's own names.
        pseudonyms: Hides them.
        excluded: Hidden names of customers who opted out.
    """
    tenants: dict[str, int] = {}
    dropped: Counter[str] = Counter()
    found: list[tuple[Any, ...]] = []
    arrays: list[Rows] = []
    read = 0
    for call in calls:
        read += 1
        if isinstance(call, Drop):
            dropped[call.reason.value] += 1
            continue
        tenant = NO_TENANT if call.tenant is None else pseudonyms.hide("tenant", call.tenant)
        if tenant in excluded:
            dropped["excluded_tenant"] += 1
            continue
        try:
            found.append(_row(call, pseudonyms, tenants.setdefault(tenant, len(tenants))))
        except NoRowError as error:
            dropped[str(error)] += 1
        if len(found) >= CHUNK_ROWS:  # tuples take ten times the space of their row
            arrays.append(np.array(found, SERVED_ROW))
            found.clear()
    rows = np.concatenate([*arrays, np.array(found, SERVED_ROW)])
    return ServedRows(rows=rows, tenants=list(tenants), read=read, dropped=dict(dropped))


def _row(call: Conversation, pseudonyms: Pseudonyms, tenant: int) -> tuple[Any, ...]:
    """Give the fields of a `SERVED_ROW`.

    Raises:
        NoRowError: The log does not tell acceptance or length, or prefill alone answered.
    """
    length = call.served_acceptance_length
    if length is None or not math.isfinite(length) or length <= 0:
        raise NoRowError("no_acceptance")
    written = call.usage.get("completion_tokens") or len(call.output_token_ids or [])
    if not written:
        raise NoRowError("no_token_count")
    tokens = written - 1  # the first one is of prefill
    if not tokens:
        raise NoRowError("no_verify_step")
    # SGLang divides all tokens by the steps, the others those that steps have committed.
    steps = (written if call.source == sglang.SOURCE else tokens) / length
    prompt_tokens = call.usage.get("prompt_tokens") or len(call.prompt_token_ids or []) or -1
    temperature = call.sampling.get("temperature")
    is_number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    return (
        math.nan if call.ts is None else parse_moment(call.ts).timestamp(),
        tokens,
        steps,
        math.nan,
        temperature if is_number else math.nan,
        min(prompt_tokens, np.iinfo("i4").max),
        tenant,
        _number(pseudonyms, "template", _system_prompt(call)),
        _number(pseudonyms, "session", call.session, call.source, call.tenant),
        int(call.id.removeprefix("sha256:")[:HASH_DIGITS], 16),
    )


def _system_prompt(call: Conversation) -> str | None:
    first = call.messages[0]
    return first.content if first.role in ("system", "developer") else None


def _number(pseudonyms: Pseudonyms, kind: str, value: str | None, *more: str | None) -> int:
    """Give the keyed hash of a value as a number above 0; 0 for None."""
    if value is None:
        return 0
    return int(pseudonyms.hide(kind, value, *more).removeprefix("h:"), 16) or 1


def _name(part: LogPart, settled: list[Any]) -> str:
    """Name the file of a part by its place, the version of its files, and what decides its rows."""
    marks = [[piece.name, piece.start, piece.end, _version(piece)] for piece in part.slices]
    digest = content_hash([part.format, marks, settled]).removeprefix("sha256:")
    return f"{digest[:NAME_DIGITS]}.npz"


def _version(piece: LogSlice) -> str:
    """Give the store's mark of a file's version: of a local one its size and times, among others.

    Content is not hashed, which would read a large log as often as it has parts.
    """
    if piece.address.startswith(HUB_PREFIX):
        return hub_revision(piece.address)
    files, path = url_to_fs(piece.address)
    return str(files.ukey(path))
