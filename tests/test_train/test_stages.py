from pathlib import Path

from dflash_train.config import compose
from dflash_train.stages import Workshop, _log_inputs


def test_a_changed_log_is_seen_although_another_folder_has_its_name(tmp_path: Path):
    for folder in ("monday", "tuesday"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "requests.jsonl").write_text(f"{folder}\n")
    workshop = Workshop(compose([f"data.logs={tmp_path}"]))
    before = _log_inputs(workshop)
    assert len(before) == 2
    for folder in ("monday", "tuesday"):
        path = tmp_path / folder / "requests.jsonl"
        content = path.read_text()
        path.write_text("another\n")
        assert _log_inputs(workshop) != before
        path.write_text(content)
    assert _log_inputs(workshop) == before
