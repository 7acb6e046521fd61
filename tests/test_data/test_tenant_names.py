"""`dflash-train pseudonym`: whoever holds a run's key can tell which hash is which customer."""

from pathlib import Path

import pytest

from dflash_train.cli import main
from dflash_train.records.conversation import read_split
from tests.test_data.ingest_runs import pair, recipe, run


@pytest.fixture(autouse=True)
def no_key_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DFLASH_HMAC_KEY", raising=False)


def ingested_tenants(folder: Path, **data: object) -> set[str | None]:
    """Ingest calls of `acme`, and give the names that their records bear."""
    log = folder / "log.jsonl"
    log.write_bytes(b"\n".join(pair(number, f"Item {number}?") for number in range(40)))
    config = recipe(folder, test_share=0.2, validation_share=0.2, **data)
    run(config, log)
    return {record.tenant for record in read_split(config.run_dir / "conversations", "train")}


def test_a_tenant_is_found_under_its_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tenants = ingested_tenants(tmp_path)
    asked = ["pseudonym", "recipe=smollm2", f"runs_dir={tmp_path}", "name=run"]
    capsys.readouterr()
    assert main([*asked, "tenant=acme"]) == 0
    assert {capsys.readouterr().out.strip()} == tenants
    assert main([*asked, "tenant=globex"]) == 0
    assert capsys.readouterr().out.strip() not in tenants


def test_the_key_may_be_one_that_several_runs_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    key = tmp_path / "key"
    key.write_text("a key of more than sixteen bytes\n")
    tenants = ingested_tenants(tmp_path, hmac_key_file=str(key))
    capsys.readouterr()
    asked = ["pseudonym", "recipe=smollm2", f"data.hmac_key_file={key}", "tenant=acme"]
    assert main(asked) == 0
    assert {capsys.readouterr().out.strip()} == tenants


def test_without_a_name_or_a_key_nothing_is_made_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    asked = ["pseudonym", "recipe=smollm2", f"runs_dir={tmp_path}", "name=nowhere"]
    assert main(asked) == 2
    assert "tenant must be set" in capsys.readouterr().err
    assert main([*asked, "tenant=acme"]) == 2
    assert "nowhere has no key" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
