import random
from pathlib import Path

import pytest

from dflash_data.ingest import partitions
from dflash_data.ingest.partitions import PartitionWriter, index_path, read_lines_of


def test_each_bucket_gets_its_lines_in_order_from_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(partitions, "MAX_COLLECTED_BYTES", 300)  # several frames per bucket
    random.seed(1)
    expected: dict[int, list[bytes]] = {bucket: [] for bucket in range(5)}
    paths = [tmp_path / f"{number}.zst" for number in range(3)]
    for path in paths:
        with PartitionWriter(path) as partition:
            for number in range(100):
                bucket, line = random.randrange(4), f"{path.name} {number}".encode()
                partition.add(bucket, line)
                expected[bucket].append(line)
    assert {bucket: list(read_lines_of(paths, bucket)) for bucket in range(5)} == expected
    assert expected[4] == []


def test_file_of_no_lines_is_read_as_such(tmp_path: Path):
    with PartitionWriter(tmp_path / "none.zst"):
        pass
    assert list(read_lines_of([tmp_path / "none.zst"], 0)) == []


def test_failed_writer_leaves_nothing(tmp_path: Path):
    def write_and_fail() -> None:
        with PartitionWriter(tmp_path / "half.zst") as partition:
            partition.add(0, b"line")
            raise KeyError("half way")

    with pytest.raises(KeyError):
        write_and_fail()
    assert not (tmp_path / "half.zst").exists()
    assert not index_path(tmp_path / "half.zst").exists()
    assert list(tmp_path.iterdir()) == []
