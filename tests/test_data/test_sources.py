import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dflash_data.drops import Call, Drop
from dflash_data.logs.lines import MAX_LINE_BYTES
from dflash_data.logs.sources import parts_hash, plan_parts, read_part
from dflash_train.records.conversation import Conversation
from tests.test_data.log_files import lines, pair, write


def calls_of(logs: Any, **settings: Any) -> list[Call]:
    return [call for part in plan_parts(str(logs), **settings) for call in read_part(part)]


def questions(calls: list[Call]) -> list[str | None]:
    return [call.messages[0].content for call in calls if isinstance(call, Conversation)]


def reasons(calls: list[Call]) -> list[str]:
    return [call.reason.value for call in calls if isinstance(call, Drop)]


def bays(*numbers: int) -> list[str]:
    return [f"Is bay {number} free?" for number in numbers]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".log", ".txt"])
def test_lines_read_the_same_under_every_suffix_and_compression(
    tmp_path: Path, suffix: str, packing: str
):
    path = write(tmp_path / f"calls{suffix}{packing}", lines(3))
    assert questions(calls_of(path)) == bays(0, 1, 2)
    assert questions(calls_of(tmp_path)) == bays(0, 1, 2)


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("value", [pair(0), [pair(0), pair(1)]], ids=["object", "array"])
def test_pretty_printed_document_gives_its_objects(tmp_path: Path, value: Any, packing: str):
    text = json.dumps(value, indent=2).encode()
    path = write(tmp_path / f"call.json{packing}", b"\xef\xbb\xbf" + text)
    assert questions(calls_of(path)) == bays(*range(len(value) if type(value) is list else 1))


def test_folder_of_small_files_is_one_part_and_bad_documents_are_drops(tmp_path: Path):
    for number in range(9):
        write(tmp_path / f"day/{number}.json", orjson.dumps(pair(number)))
    write(tmp_path / "day/99.json", b'{"request": {')
    (part,) = plan_parts(str(tmp_path))
    calls = list(read_part(part))
    assert questions(calls) == bays(*range(9))
    assert reasons(calls) == ["unparsable"]


def test_glob_takes_what_it_matches_and_hidden_and_empty_files_are_left_out(tmp_path: Path):
    write(tmp_path / "a/calls.jsonl", lines(1))
    write(tmp_path / "b/calls.jsonl", lines(2))
    write(tmp_path / "b/.calls.jsonl", b"broken")
    write(tmp_path / "b/empty.jsonl", b"")
    assert len(calls_of(tmp_path / "*/*.jsonl")) == 3
    assert len(calls_of(tmp_path / "b*/**")) == 2
    assert len(calls_of(tmp_path)) == 3


def test_ids_of_calls_depend_on_the_path_below_the_given_folder_only(tmp_path: Path):
    for folder in ("x/logs", "y/logs"):
        write(tmp_path / folder / "a/calls.jsonl", lines(2))
        write(tmp_path / folder / "b/calls.jsonl", lines(2))
    ids = [[call.id for call in calls_of(tmp_path / f"{x}/logs")] for x in "xy"]  # type: ignore[union-attr]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 4
    hashes = {parts_hash(plan_parts(str(tmp_path / f"{x}/logs"))) for x in "xy"}
    assert len(hashes) == 1
    write(tmp_path / "y/logs/b/calls.jsonl", lines(3))
    assert parts_hash(plan_parts(str(tmp_path / "y/logs"))) not in hashes


def test_missing_log_unknown_store_and_unknown_format_name_key_and_remedy(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.logs .* holds or matches no log file"):
        plan_parts(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"data\.logs .*store that fsspec does not know"):
        plan_parts("acme://bucket/logs")
    write(tmp_path / "calls.jsonl", lines(1))
    with pytest.raises(ValueError, match=r"data\.format \(=opanai\) is unknown.*openai"):
        plan_parts(str(tmp_path), format="opanai")


@pytest.mark.parametrize("part_bytes", [1, 100, 333, 1000, 10**6])
def test_parts_of_any_size_give_the_same_calls(tmp_path: Path, part_bytes: int):
    write(tmp_path / "a.jsonl", lines(20))
    write(tmp_path / "b.jsonl", lines(5))
    parts = plan_parts(str(tmp_path), part_bytes=part_bytes)
    assert [call for part in parts for call in read_part(part)] == calls_of(tmp_path)
    assert sum(part.num_bytes for part in parts) == len(lines(20)) + len(lines(5))
    assert (len(parts) > 1) == (part_bytes < 10**6)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_lines_before_a_truncation_are_kept_and_the_damage_is_one_drop(
    tmp_path: Path, packing: str, capsys: pytest.CaptureFixture[str]
):
    path = write(tmp_path / f"calls.jsonl{packing}", lines(3000))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    calls = calls_of(path)
    assert 500 < len(questions(calls)) < 3000
    assert questions(calls) == bays(*range(len(questions(calls))))
    assert reasons(calls) == ["unparsable"]
    told = capsys.readouterr().err
    assert path.name in told
    assert "bay" not in told


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_log_damaged_from_its_first_line_is_one_drop_beside_others(tmp_path: Path, packing: str):
    whole = write(tmp_path / f"a.jsonl{packing}", lines(1)).read_bytes()
    (tmp_path / f"a.jsonl{packing}").write_bytes(whole[:20])
    write(tmp_path / "b.jsonl", lines(1))
    calls = calls_of(tmp_path)
    assert questions(calls) == bays(0)
    assert reasons(calls) == ["unparsable"]


def test_stray_bytes_blank_lines_marks_and_line_ends_cost_no_other_line(tmp_path: Path):
    first, second, third = lines(3).splitlines()
    content = b"\xef\xbb\xbf" + first + b"\r\n\r\n \n\xff\xfe{}\n" + second + b"\r\n\x00\n" + third
    calls = calls_of(write(tmp_path / "calls.jsonl", content))
    assert questions(calls) == bays(0, 1, 2)
    assert reasons(calls) == ["unparsable", "unparsable"]


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_line_beyond_the_cap_is_a_drop_and_its_neighbours_stay(tmp_path: Path, packing: str):
    first, second = lines(2).splitlines()
    giant = b'{"request": "' + b"x" * MAX_LINE_BYTES + b'"}'
    path = write(tmp_path / f"calls.jsonl{packing}", b"\n".join([first, giant, second, giant]))
    calls = calls_of(path, part_bytes=4_000_000)
    assert questions(calls) == bays(0, 1)
    assert reasons(calls) == ["unparsable", "unparsable"]


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "invented")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "invented")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        files = s3fs.S3FileSystem()
        files.mkdir("traffic")
        yield files
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_bucket_reads_like_a_folder(bucket: Any, tmp_path: Path):
    write(tmp_path / "logs/a/calls.jsonl", lines(30))
    write(tmp_path / "logs/b/calls.jsonl.gz", lines(3))
    write(tmp_path / "logs/c.jsonl.zst", lines(2))
    write(tmp_path / "logs/d.json", orjson.dumps([pair(7), pair(8)]))
    pq.write_table(pa.Table.from_pylist([pair(9)]), tmp_path / "logs/e.parquet")
    asked = {"custom_id": "row-1", "body": pair(5)["request"]}
    answered = {"custom_id": "row-1", "response": {"body": pair(5)["response"]}, "error": None}
    write(tmp_path / "logs/batch/in.jsonl", orjson.dumps(asked))
    write(tmp_path / "logs/batch/out.jsonl", orjson.dumps(answered))
    bucket.put(str(tmp_path / "logs"), "traffic/", recursive=True)
    expected = calls_of(tmp_path / "logs")
    assert len(questions(expected)) == 30 + 3 + 2 + 2 + 1 + 1
    assert calls_of("s3://traffic/logs") == expected
    divided = calls_of("s3://traffic/logs", part_bytes=700)  # in the order of their parts
    assert sorted(divided, key=str) == sorted(expected, key=str)
    assert calls_of("s3://traffic/logs/*/calls.*") == calls_of(tmp_path / "logs/*/calls.*")


def test_hash_of_a_bucket_changes_with_its_objects(bucket: Any):
    bucket.pipe("traffic/hash/a.jsonl", lines(2))
    before = parts_hash(plan_parts("s3://traffic/hash"))
    assert parts_hash(plan_parts("s3://traffic/hash")) == before
    bucket.pipe("traffic/hash/a.jsonl", lines(2).replace(b"bay", b"box"))
    assert parts_hash(plan_parts("s3://traffic/hash")) != before


def test_pickle_in_a_bucket_is_refused(bucket: Any):
    bucket.pipe("traffic/dumps/a.jsonl", pickle.dumps([1]))
    with pytest.raises(ValueError, match=r"s3://traffic/dumps/a\.jsonl\) is a pickle"):
        plan_parts("s3://traffic/dumps")
