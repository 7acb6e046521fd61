from pathlib import Path

import pytest

from dflash_train.records.manifest import Counts, FileEntry, Manifest, atomic_path, write_bytes


def written(folder: Path) -> Manifest:
    write_bytes(folder / "rows.bin", b"0123456789")
    manifest = Manifest(
        stage="collect",
        recipe_hash="sha256:1",
        inputs={"conversations": "sha256:2"},
        outputs=[FileEntry.of(folder / "rows.bin", folder, rows=3, tokens=10)],
        counts=Counts(read=5, kept=3, dropped={"too_long": 2}),
        details={"shards": 1},
    )
    manifest.write(folder)
    return manifest


def test_a_manifest_comes_back_as_it_was(tmp_path: Path):
    manifest = written(tmp_path)
    read = Manifest.read(tmp_path)
    assert read is not None
    assert read == manifest
    read.verify_outputs(tmp_path)
    assert Manifest.read(tmp_path / "elsewhere") is None


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path):
    written(tmp_path)
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged or foreign"):
            Manifest.read(tmp_path)


@pytest.mark.parametrize("change", [(b"\n", b"\t"), (b'": ', b'":'), (b"}\n", b"}")])
def test_changed_white_space_of_a_manifest_is_found(tmp_path: Path, change: tuple[bytes, bytes]):
    written(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(*change, 1))
    with pytest.raises(ValueError, match="its bytes are not as they were written"):
        Manifest.read(tmp_path)


def test_a_changed_or_missing_output_is_named(tmp_path: Path):
    manifest = written(tmp_path)
    (tmp_path / "rows.bin").write_bytes(b"0123456780")
    with pytest.raises(ValueError, match=r"rows\.bin does not match its checksum"):
        manifest.verify_outputs(tmp_path)
    (tmp_path / "rows.bin").unlink()
    with pytest.raises(ValueError, match=r"rows\.bin is missing"):
        manifest.verify_outputs(tmp_path)


def test_key_depends_on_inputs_and_hash_on_results(tmp_path: Path):
    first, second = written(tmp_path), written(tmp_path)
    second.command, second.details = "another command", {"seconds": 3}
    assert (first.key, first.hash) == (second.key, second.hash)
    second.outputs[0].sha256 = "sha256:3"
    assert first.key == second.key
    assert first.hash != second.hash
    second.inputs["conversations"] = "sha256:4"
    assert first.key != second.key


def test_records_that_went_missing_without_a_reason_stop_the_stage(tmp_path: Path):
    manifest = Manifest(stage="ingest", recipe_hash="x", counts=Counts(read=5, kept=3))
    with pytest.raises(RuntimeError, match="do not balance"):
        manifest.write(tmp_path)
    assert Manifest.read(tmp_path) is None


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail() -> None:
        with atomic_path(path) as partial:
            partial.write_bytes(b"half")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path):
    folder = tmp_path / "folder"
    for name in ("first", "second"):
        with atomic_path(folder) as partial:
            partial.mkdir()
            (partial / name).touch()
    assert [entry.name for entry in folder.iterdir()] == ["second"]
