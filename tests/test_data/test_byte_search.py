"""The search that judges privacy has to be able to find: controls in every packing."""

import base64
import gzip
import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.byte_search import ByteSearch, search_folder
from dflash_data.logs.compression import zstd
from dflash_data.record_index import write_index_part

VALUE = 'a "control"/v\u00e4lue\\ of\nthis test'
OTHERS = [f"another value {number}" for number in range(50)]


def as_table(text: str) -> pa.Table:
    return pa.table({"a": ["x", text, "y"], "b": [1, 2, 3]})


def write_arrow(path: Path, text: str, *, codec: str | None, is_file: bool) -> None:
    options = pa.ipc.IpcWriteOptions(compression=codec)
    new = pa.ipc.new_file if is_file else pa.ipc.new_stream
    table = as_table(text * 50)  # long enough for the codec to be used
    with new(str(path), table.schema, options=options) as writer:
        writer.write_table(table)


def write_dictionary(path: Path, text: str) -> None:
    table = pa.table({"a": pa.array([text] * 9).dictionary_encode()})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def write_nested(path: Path, text: str) -> None:
    table = pa.table({"a": [[{"content": text}]]})
    pq.write_table(table, path, compression="zstd")


WRITE: dict[str, Callable[[Path, str], object]] = {
    "plain": lambda path, text: path.write_bytes(b"\0" * 9 + text.encode() + b"\xff"),
    "json": lambda path, text: path.write_bytes(orjson.dumps({"content": text})),
    "ascii json": lambda path, text: path.write_text(json.dumps({"content": text})),
    "json in json": lambda path, text: path.write_text(json.dumps({"x": json.dumps([text])})),
    "address": lambda path, text: path.write_text(f"/?q={quote(text, safe='')}&x"),
    "base64": lambda path, text: path.write_bytes(base64.b64encode(text.encode())),
    "gzip": lambda path, text: path.write_bytes(gzip.compress(text.encode())),
    "gzip of two members": lambda path, text: path.write_bytes(
        gzip.compress(b"first") + gzip.compress(text.encode())
    ),
    "zstd": lambda path, text: path.write_bytes(zstd.compress(text.encode())),
    "zstd of two frames": lambda path, text: path.write_bytes(
        zstd.compress(b"first") + zstd.compress(text.encode())
    ),
    "zstd in gzip": lambda path, text: path.write_bytes(
        gzip.compress(zstd.compress(text.encode()))
    ),
    "arrow": lambda path, text: write_arrow(path, text, codec=None, is_file=False),
    "arrow zstd": lambda path, text: write_arrow(path, text, codec="zstd", is_file=False),
    "arrow lz4 file": lambda path, text: write_arrow(path, text, codec="lz4", is_file=True),
    "arrow dictionary": write_dictionary,
    "record index": lambda path, text: write_index_part(path, [{"id": text}]),
    "parquet": lambda path, text: pq.write_table(as_table(text), path, compression="snappy"),
    "nested parquet": write_nested,
    "array": lambda path, text: path.write_bytes(np.array([text.encode()]).tobytes()),
}


@pytest.mark.parametrize("name", WRITE)
def test_a_value_is_found_in_every_packing_and_its_file_named(name: str, tmp_path: Path):
    path = tmp_path / "folder" / "file.without-a-hint"
    path.parent.mkdir()
    WRITE[name](path, VALUE)
    found = search_folder(tmp_path, ByteSearch([VALUE, *OTHERS]))
    assert found.values == {VALUE: {"folder/file.without-a-hint"}}
    WRITE[name](path, VALUE.upper())
    assert search_folder(tmp_path, ByteSearch([VALUE, *OTHERS])).values == {}


def test_a_value_in_the_name_of_a_file_is_found(tmp_path: Path):
    (tmp_path / "the control value.txt").touch()
    assert set(search_folder(tmp_path, ByteSearch(["control value"])).values) == {"control value"}


def test_many_values_are_found_as_one_by_one():
    rng = random.Random(0)
    letters = string.ascii_letters[:6]
    values = ["".join(rng.choices(letters, k=rng.randint(6, 9))) for _ in range(400)]
    content = "".join(rng.choices(letters, k=300_000)).encode()
    expected = {value for value in values if value.encode() in content}
    assert 0 < len(expected) < len(set(values))
    assert ByteSearch(values).find(content) == expected


def test_a_value_across_two_chunks_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.byte_search.CHUNK_BYTES", 16)
    for place in range(40):
        assert ByteSearch([VALUE]).find(b"." * place + VALUE.encode() + b".") == {VALUE}


def test_a_value_too_short_to_search_for_is_refused():
    with pytest.raises(ValueError, match="at least 6"):
        ByteSearch(["short"])
