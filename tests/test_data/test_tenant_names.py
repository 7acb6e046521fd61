"""`dflash-train pseudonym`: whoever holds a run's key can tell which hash is which customer."""

import json
from pathlib import Path

import pytest

from dflash_data.ingest.stage import ingest
from dflash_train.cli import main
from dflash_train.config import DataConfig, RecipeConfig
from dflash_train.records.conversation import read_split
from dflash_train.records.manifest import Manifest


@pytest.fixture(autouse=True)
def no_key_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DFLASH_HMAC_KEY", raising=False)


def call(number: int, user: str) -> bytes:
    request = {"messages": [{"role": "user", "content": f"Item {number}?"}], "user": user}
    created = 1_792_000_000 + 3600 * number
    return json.dumps(
        {"id": f"r{number}", "created": created, "request": request, "response": None}
    ).encode()


def ingested_tenants(folder: Path, **data: str) -> set[str | None]:
    """Ingest calls of one tenant, and give the names that their records bear."""
    log = folder / "log.jsonl"
    log.write_bytes(b"\n".join(call(number, "acme & sons") for number in range(40)))
    data_keys = DataConfig(test_share=0.2, validation_share=0.2, **data)  # type: ignore[arg-type]
    config = RecipeConfig(name="run", runs_dir=str(folder), data=data_keys)
    manifest = Manifest(stage="ingest", recipe_hash="sha256:0", inputs={"logs": "sha256:1"})
    ingest(config, log, evaluation={}, manifest=manifest)
    return {record.tenant for record in read_split(config.run_dir / "conversations", "train")}


def test_a_tenant_is_found_under_its_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tenants = ingested_tenants(tmp_path)
    asked = ["pseudonym", "recipe=smollm2", f"runs_dir={tmp_path}", "name=run"]
    capsys.readouterr()
    assert main([*asked, "tenant=acme & sons"]) == 0
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
    asked = ["pseudonym", "recipe=smollm2", f"data.hmac_key_file={key}", "tenant=acme & sons"]
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
