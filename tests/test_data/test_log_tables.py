import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dflash_data.drops import Call
from dflash_data.logs.compression import zstd
from dflash_data.logs.sources import parts_hash, plan_parts, read_part
from dflash_train.records.conversation import Conversation


def pair(number: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Is bay {number} free?"}]
    answer = {"message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}
    return {"request": {"model": "small", "messages": messages}, "response": {"choices": [answer]}}


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    packing = {".gz": gzip.compress, ".zst": zstd.compress}.get(path.suffix, bytes)
    path.write_bytes(packing(content))
    return path


def calls_of(logs: Any, **settings: Any) -> list[Call]:
    return [call for part in plan_parts(str(logs), **settings) for call in read_part(part)]


def questions(calls: list[Call]) -> list[str | None]:
    return [call.messages[0].content for call in calls if isinstance(call, Conversation)]


def bays(*numbers: int) -> list[str]:
    return [f"Is bay {number} free?" for number in numbers]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    table = pa.Table.from_pylist([pair(number) for number in range(5)])
    (tmp_path / "acme").mkdir()
    pq.write_table(table, tmp_path / "acme/train-00000.parquet", row_group_size=2)
    pq.write_table(table.slice(0, 1), tmp_path / "acme/test-00000.parquet")
    return tmp_path / "acme"


def test_parquet_rows_are_calls(dataset: Path):
    assert questions(calls_of(dataset / "train-00000.parquet")) == bays(0, 1, 2, 3, 4)
    assert questions(calls_of(dataset)) == bays(0, 0, 1, 2, 3, 4)


def test_parquet_is_known_by_content_and_refused_inside_gzip(dataset: Path):
    content = (dataset / "train-00000.parquet").read_bytes()
    write(dataset.parent / "calls.jsonl", content)
    assert len(calls_of(dataset.parent / "calls.jsonl")) == 5
    write(dataset.parent / "calls.parquet.gz", content)
    with pytest.raises(ValueError, match="Unpack it: Parquet compresses"):
        plan_parts(str(dataset.parent / "calls.parquet.gz"))


def test_damaged_parquet_is_refused_by_name(dataset: Path):
    content = (dataset / "train-00000.parquet").read_bytes()
    write(dataset / "half.parquet", content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half\.parquet\) cannot be read as Parquet"):
        plan_parts(str(dataset / "half.parquet"))


def test_hub_dataset_streams_the_chosen_split(dataset: Path):
    assert questions(calls_of(f"hub:{dataset}")) == bays(0, 1, 2, 3, 4)
    assert questions(calls_of(f"hub:{dataset}#default/test")) == bays(0)
    before = parts_hash(plan_parts(f"hub:{dataset}"))
    write(dataset / "README.md", b"changed")
    assert parts_hash(plan_parts(f"hub:{dataset}")) != before


@pytest.mark.parametrize("choice", ["#default/none", "#none"])
def test_unknown_configuration_or_split_names_the_key(dataset: Path, choice: str):
    with pytest.raises(ValueError, match=r"data\.logs \(=hub:.*hub:ID#config/split"):
        plan_parts(f"hub:{dataset}{choice}")


def test_reading_parquet_imports_no_torch(dataset: Path):
    code = (
        "import sys; from dflash_data.logs.sources import plan_parts, read_part\n"
        f"calls = [c for p in plan_parts({str(dataset)!r}) for c in read_part(p)]\n"
        "assert len(calls) == 6 and not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
