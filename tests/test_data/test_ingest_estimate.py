import shutil
from pathlib import Path

import pytest

import dflash_data.ingest.estimate
from dflash_data.ingest.estimate import check_disk, estimate_ingest
from dflash_data.ingest.stage import ingest
from dflash_data.sample_traffic.fleet import write_sample_traffic
from dflash_train.cli import main
from dflash_train.config import ExecutorKind, RecipeConfig, UnavailableError
from dflash_train.records.manifest import Manifest


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fleet") / "traffic.jsonl"
    write_sample_traffic(path, seed=0, num_requests=400)
    return path


def test_estimate_of_a_log_read_whole_is_what_ingest_then_takes(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dflash_data.ingest.estimate, "SAMPLED_LINES", 1000)
    config = RecipeConfig(name="run", runs_dir=str(tmp_path))
    estimate = estimate_ingest(config, str(log), evaluation={})
    assert list(tmp_path.iterdir()) == []
    manifest = ingest(
        config, log, evaluation={}, manifest=Manifest(stage="ingest", recipe_hash="sha256:0")
    )
    assert manifest.counts is not None
    assert estimate.bytes_of_format == {"openai": log.stat().st_size}
    assert estimate.num_records == manifest.counts.read
    dropped = manifest.counts.dropped
    merged = manifest.details["merged_repeats"] + dropped["cluster_cap"] + dropped["straddles_cut"]
    assert estimate.num_usable == manifest.counts.kept + merged
    written = (config.run_dir / "conversations").glob("*.jsonl.gz")
    size = sum(path.stat().st_size for path in written)
    assert 0.8 * size < estimate.result_bytes < 2 * size
    assert estimate.temporary_bytes > 0 < estimate.seconds


def test_a_sample_stands_for_the_whole_log(log: Path, tmp_path: Path):
    config = RecipeConfig(name="run", runs_dir=str(tmp_path))
    estimate = estimate_ingest(config, str(log), evaluation={})
    num_lines = len(log.read_bytes().splitlines())
    assert num_lines > dflash_data.ingest.estimate.SAMPLED_LINES
    assert estimate.num_records == pytest.approx(num_lines, rel=0.15)
    lines = estimate.lines()
    assert lines[0] == f"log: {log.stat().st_size} bytes in 1 parts"
    assert [line.split(":")[0] for line in lines[1:]] == ["formats", "records", "disk", "time"]


def test_scripts_for_slurm_are_shown_and_nothing_is_written(log: Path, tmp_path: Path):
    config = RecipeConfig(name="run", runs_dir=str(tmp_path / "runs"))
    config.executor.kind = ExecutorKind.slurm
    estimate = estimate_ingest(config, str(log), evaluation={})
    assert list(estimate.scripts) == ["read", "spread", "chain", "decide", "write"]
    assert "#SBATCH" in "\n".join(estimate.lines())
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_would_not_hold_it_is_refused(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = RecipeConfig(name="run", runs_dir=str(tmp_path / "not" / "there"))
    estimate = estimate_ingest(config, str(log), evaluation={})
    check_disk(estimate, config)
    full = shutil.disk_usage(tmp_path)._replace(free=estimate.disk_bytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(UnavailableError, match="Give runs_dir=DIR on another disk"):
        check_disk(estimate, config)


def test_command_prints_the_estimate(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overrides = ["recipe=smollm2", f"runs_dir={tmp_path}", f"data.logs={log}"]
    assert main(["ingest", "--dry-run", *overrides]) == 0
    assert "records: about " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert main(["evaluate", "--dry-run", *overrides]) == 2
    told = capsys.readouterr().err
    assert "not for `evaluate`" in told
