import gzip
import sys
from pathlib import Path

import pytest

from dflash_data.sample_traffic.fleet import write_sample_traffic
from dflash_train.cli import main
from dflash_train.records.manifest import Manifest
from dflash_train.records.provenance import command_line


@pytest.mark.parametrize(
    ("argument", "recorded"),
    [
        ("data.excluded_tenants=[globex]", "data.excluded_tenants=HIDDEN"),
        ("++data.excluded_tenants=[globex]", "++data.excluded_tenants=HIDDEN"),
        ("data={excluded_tenants: [globex]}", "data=HIDDEN"),
        ("data.logs=s3://globex:globex@host/x", "data.logs=s3://HIDDEN@host/x"),
        ("data.endpoints.api_key=globex", "data.endpoints.api_key=HIDDEN"),
        ("data.endpoints.api_key_env=NAME", "data.endpoints.api_key_env=NAME"),
        ("data.hmac_key_file=/keys/one", "data.hmac_key_file=/keys/one"),
        ("data.max_new_tokens=5", "data.max_new_tokens=5"),
    ],
)
def test_private_values_are_hidden_in_the_recorded_command(
    argument: str, recorded: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["/somewhere/dflash-train", "run", argument])
    command = command_line()
    assert command.replace("'", "") == f"dflash-train run {recorded}"
    assert "globex" not in command


def test_customers_named_on_the_command_line_stand_in_no_file_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    log, runs = tmp_path / "traffic.jsonl", tmp_path / "runs"
    write_sample_traffic(log, seed=0, num_requests=120)
    arguments = [
        "ingest", "recipe=smollm2", f"runs_dir={runs}", f"data.logs={log}",
        "data.excluded_tenants=[globex-and-daughters]", "evaluate.prompts_per_set=2",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["dflash-train", *arguments])
    assert main(arguments) == 0
    files = [path for path in runs.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        plain = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
        assert b"globex" not in plain, path.name
    captured = capfd.readouterr()
    assert "globex" not in captured.out + captured.err
    (manifest,) = (Manifest.read(path.parent) for path in files if path.name == "manifest.json")
    assert manifest is not None
    assert "data.excluded_tenants=HIDDEN" in manifest.command
