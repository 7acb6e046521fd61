from pathlib import Path

import pytest

from dflash_data.record_index import open_record_index, write_record_index
from dflash_train.records.conversation import read_shard, write_shard
from dflash_train.testing import ask


def test_every_record_is_found_where_the_index_says(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-00000.jsonl.gz", [ask("a0", "one"), ask("a1", "one", None, "x")])
    write_shard(tmp_path / "test-00000.jsonl.gz", [ask("b0", "held out", split="test")])
    write_shard(tmp_path / "validation-00000.jsonl.gz", [])
    write_record_index(tmp_path)
    index = open_record_index(tmp_path)
    assert sorted(index["id"]) == ["a0", "a1", "b0"]
    for line in index.to_list():
        record = list(read_shard(tmp_path / line["shard"]))[line["row"]]
        assert (record.id, record.session, record.turn) == (
            line["id"],
            line["session"],
            line["turn"],
        )
        assert record.split == line["split"]
        assert line["on_policy"] is False


def test_content_never_enters_the_index(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-00000.jsonl.gz", [ask("a0", "nobody but the shard knows this")])
    assert b"nobody but" not in write_record_index(tmp_path).read_bytes()


def test_a_folder_without_index_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index\.arrow does not exist"):
        open_record_index(tmp_path)
