from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_data.adapters.log_format import Line
from dflash_data.drops import Drop
from dflash_data.logs import lines as log_lines
from dflash_data.logs.lines import read_lines
from tests.test_data.log_files import lines, write


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    content=st.lists(st.sampled_from([b"", b"a", b"bc", b"d" * 9, b"\r"]), max_size=12).map(
        b"\n".join
    ),
    part_bytes=st.integers(1, 12),
    chunk_bytes=st.integers(1, 8),
)
def test_any_division_gives_every_line_once_at_the_same_place(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, part_bytes: int, chunk_bytes: int
):
    path = tmp_path_factory.getbasetemp() / "division.jsonl"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_lines, "CHUNK_BYTES", chunk_bytes)
        divided = [
            line
            for start in range(0, len(content), part_bytes)
            for line in read_lines(str(path), "x", start=start, end=start + part_bytes)
        ]
    expected, offset = [], 0
    for raw in content.split(b"\n"):
        if raw.strip():
            expected.append((f"x:{offset}", raw.strip()))
        offset += len(raw) + 1
    assert [line[:2] for line in divided if isinstance(line, Line)] == expected
    assert len(divided) == len(expected)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_compressed_log_cut_anywhere_ends_in_a_drop(tmp_path: Path, packing: str):
    path = write(tmp_path / f"calls.jsonl{packing}", lines(40))
    whole = path.read_bytes()
    for num_bytes in range(5, len(whole), 7):
        path.write_bytes(whole[:num_bytes])
        read = list(read_lines(str(path), "x"))
        assert [type(line) for line in read] == [Line] * (len(read) - 1) + [Drop]
