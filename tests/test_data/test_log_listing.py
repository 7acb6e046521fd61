import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.core import url_to_fs

from dflash_data.logs.listing import find_log_files
from dflash_data.logs.sources import plan_parts
from tests.test_data.log_files import lines, pair, write


def test_hub_file_address_resolves_without_a_network():
    # Reading needs the hub; that fsspec finds the file system is all that can be seen here.
    files, path = url_to_fs("hf://datasets/acme/logs/calls.jsonl")
    assert (type(files).__name__, path) == ("HfFileSystem", "datasets/acme/logs/calls.jsonl")


def test_names_are_relative_to_the_folder_of_a_file_or_glob(tmp_path: Path):
    write(tmp_path / "a/b/calls.jsonl", lines(1))
    names = {
        find_log_files(str(tmp_path / logs))[0].name
        for logs in ("a/b/calls.jsonl", "a/b", "a/b/*", "a/b/c*.jsonl")
    }
    assert names == {"calls.jsonl"}
    assert find_log_files(str(tmp_path / "a/*/*.jsonl"))[0].name == "b/calls.jsonl"


class Harmless:
    def __reduce__(self):
        return (print, ("opened",))


def torch_like(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))


def tar(path: Path) -> None:
    inner = write(path.parent / "inner", b"x")
    with tarfile.open(path, "w") as archive:
        archive.add(inner, arcname="../outside.jsonl")


def pickled(protocol: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(pickle.dumps([Harmless(), {"a": 1}], protocol))


@pytest.mark.parametrize("name", ["calls.pkl", "calls.jsonl", "calls.json", "calls.log"])
@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_pickle_is_refused_under_any_name_and_never_opened(
    tmp_path: Path, name: str, protocol: int, capsys: pytest.CaptureFixture[str]
):
    pickled(protocol)(tmp_path / name)
    for logs in (tmp_path, tmp_path / name, tmp_path / "c*"):
        with pytest.raises(ValueError, match=r"is a pickle.*--log-requests-level 3"):
            plan_parts(str(logs))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_compressed_pickle_is_refused(tmp_path: Path, packing: str):
    write(tmp_path / f"calls.jsonl{packing}", pickle.dumps([1]))
    with pytest.raises(ValueError, match="is a pickle"):
        plan_parts(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("state.pt", torch_like, "is a pickle"),
        ("state.jsonl", torch_like, "is an archive"),
        ("logs.tar", tar, "is an archive"),
        ("logs.jsonl", tar, "is an archive"),
        ("logs.tar.gz", lambda path: write(path, b"x"), "is an archive"),
        ("calls.jsonl.bz2", lambda path: write(path, b"x"), "Compress it with gzip or zstd"),
        ("notes.txt", lambda path: write(path, b"Call Ann.\n"), "no line of a known format"),
        ("rows.jsonl", lambda path: write(path, b'{"a": 1}\n'), "no line of a known format"),
    ],
)
def test_other_kinds_of_files_are_refused_with_a_remedy(
    tmp_path: Path, name: str, make: Callable[[Path], object], message: str
):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as refusal:
        plan_parts(str(tmp_path / name))
    assert name in str(refusal.value)
    assert "Ann" not in str(refusal.value)


def test_large_json_document_is_refused_with_the_command_that_makes_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dflash_data.logs.sniffing.MAX_DOCUMENT_BYTES", 1000)
    write(tmp_path / "calls.json", json.dumps([pair(0)] * 9, indent=1).encode())
    with pytest.raises(ValueError, match="jq -c"):
        plan_parts(str(tmp_path))
