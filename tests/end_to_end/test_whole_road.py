"""From a log line to a report, by the commands that a user types."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import torch
from safetensors.torch import load_file

from dflash_train.cli import main
from dflash_train.records.manifest import Manifest, file_hash
from dflash_train.stages.table import STAGES

ROOT = Path(__file__).resolve().parents[2]
RUN = "tiny"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """A finished run; tests that change it copy it first."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(["run", f"runs_dir={runs}", *tiny_overrides]) == 0
    return runs


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "runs"))


def load(shard: Path) -> dict[str, torch.Tensor]:
    """Read a shard into memory; its file may then go."""
    return {name: tensor.clone() for name, tensor in load_file(shard).items()}


def manifest(runs: Path, folder: str) -> Manifest:
    found = Manifest.read(runs / RUN / folder)
    assert found is not None, f"{folder} is not complete"
    return found


def test_the_report_stands_on_every_stage(finished: Path) -> None:
    for stage in STAGES:
        manifest(finished, stage.folder).verify_outputs(finished / RUN / stage.folder)
    report = orjson.loads((finished / RUN / "report" / "report.json").read_bytes())
    acceptance = report["acceptance_length"]
    low, high = acceptance["interval"]
    assert 1.0 <= low <= acceptance["pooled"] <= high <= 4.0
    assert acceptance["block_size"] == 4
    assert acceptance["per_request"] >= 1.0
    assert report["token_match_rate"] == 1.0
    assert report["tokens_per_second"]["plain"] > 0
    assert report["tokens_per_second"]["speculative"] > 0
    assert {"target", "checkpoint", "machine"} <= report.keys()


def test_live_decoding_equals_replay_at_every_step(finished: Path) -> None:
    checks = orjson.loads((finished / RUN / "traces" / "live-check.json").read_bytes())
    assert len(checks["requests"]) == 3
    assert all(check["equals_replay"] for check in checks["requests"])


def test_every_row_is_accounted_for_from_log_to_store(finished: Path) -> None:
    ingested = manifest(finished, "conversations")
    regenerated = manifest(finished, "regenerated")
    collected = manifest(finished, "features")
    rows = sum(entry.rows or 0 for entry in ingested.outputs)
    assert regenerated.counts is not None
    assert collected.counts is not None
    assert regenerated.counts.read == rows
    assert collected.counts.kept == regenerated.counts.kept > 0


def test_a_finished_run_does_nothing_and_says_so(
    runs: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (runs / RUN).rglob("*")}
    assert main(["run", f"runs_dir={runs}", *tiny_overrides]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("nothing to do") == len(STAGES) + 1
    assert captured.out.splitlines()[-1] == str(runs / RUN / "report")
    assert {path: path.stat().st_mtime_ns for path in (runs / RUN).rglob("*")} == before


def test_a_changed_rate_trains_again_and_keeps_the_data(
    runs: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = file_hash(runs / RUN / "checkpoint" / "last" / "model.safetensors")
    assert main(["run", f"runs_dir={runs}", *tiny_overrides, "optim.lr=3e-3"]) == 0
    said = capsys.readouterr().err
    for name in ("sample-traffic", "ingest", "regenerate", "collect"):
        assert f"{name}: complete and unchanged" in said
    for name in ("train", "evaluate", "report"):
        assert f"{name}: running" in said
    assert file_hash(runs / RUN / "checkpoint" / "last" / "model.safetensors") != before


def test_train_py_under_accelerate_gives_the_same_bytes(
    runs: Path, tiny_overrides: list[str]
) -> None:
    weights = runs / RUN / "checkpoint" / "last" / "model.safetensors"
    before = file_hash(weights)
    weights.unlink()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(ROOT / "train.py"), "recipe=smollm2", f"runs_dir={runs}", *tiny_overrides]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert file_hash(weights) == before


def test_two_processes_train_one_drafter(runs: Path, tiny_overrides: list[str]) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--config_file", str(ROOT / "recipes" / "launch" / "ddp.yaml")]
    command += [str(ROOT / "train.py"), "recipe=smollm2", f"runs_dir={runs}", *tiny_overrides]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    told = [line for line in result.stdout.splitlines() if "real_accelerator.py" not in line]
    assert told == [str(runs / RUN / "checkpoint")]  # DeepSpeed, where installed, tells more
    written = manifest(runs, "checkpoint")
    written.verify_outputs(runs / RUN / "checkpoint")
    assert written.details["processes"] == 2
    assert written.details["steps"] == 12


def test_a_flipped_byte_in_a_shard_is_found_and_named(
    runs: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shard = sorted((runs / RUN / "features" / "train").glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.unlink()  # the other link of this file, in regenerated/, stays sound
    shard.write_bytes(content)
    assert main(["train", "--force", f"runs_dir={runs}", *tiny_overrides]) == 2
    assert shard.name in capsys.readouterr().err


def test_a_given_checkpoint_is_measured_without_training(
    runs: Path,
    tmp_path: Path,
    tiny_overrides: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = shutil.copytree(runs / RUN / "checkpoint" / "last", tmp_path / "given")
    shutil.rmtree(runs / RUN / "checkpoint")
    assert main(["run", f"runs_dir={runs}", *tiny_overrides, f"checkpoint={given}"]) == 0
    assert "train:" not in capsys.readouterr().err
    report = orjson.loads((runs / RUN / "report" / "report.json").read_bytes())
    assert report["checkpoint"]["folder"] == str(given)
    assert report["training"] is None


def test_other_resamples_make_a_report_and_nothing_else(
    runs: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", f"runs_dir={runs}", *tiny_overrides, "evaluate.resamples=300"]) == 0
    said = capsys.readouterr().err
    assert "evaluate: complete and unchanged" in said
    assert "report: running" in said


def test_a_deleted_shard_is_made_again_and_nothing_else(
    runs: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    made = runs / RUN / "regenerated" / "features" / "train"
    lost, kept = sorted(made.glob("*.safetensors"))[:2]
    linked = runs / RUN / "features" / "train" / lost.name
    hash_before, time_before, rows_before = file_hash(lost), kept.stat().st_mtime_ns, load(lost)
    lost.unlink()
    linked.unlink()
    assert main(["run", f"runs_dir={runs}", *tiny_overrides]) == 0
    said = capsys.readouterr().err
    assert "regenerate: running" in said
    assert kept.stat().st_mtime_ns == time_before
    assert file_hash(linked) == file_hash(lost)
    rows = load(lost)
    assert rows.keys() == rows_before.keys()
    for name, tensor in rows.items():
        torch.testing.assert_close(tensor, rows_before[name], atol=1e-5, rtol=2**-7)  # bfloat16
    # Math libraries promise no last bit from one pass to the next, so training again is right
    # where the bytes are others, and wrong where they are the same.
    assert ("train: running" in said) == (file_hash(lost) != hash_before)


def test_a_damaged_source_is_never_vouched_for(
    runs: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shard = sorted((runs / RUN / "regenerated" / "features" / "train").glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    assert main(["collect", "--force", f"runs_dir={runs}", *tiny_overrides]) == 2
    assert str(shard) in capsys.readouterr().err


def test_what_a_user_gets_wrong_costs_one_sentence_and_leaves_nothing(
    tmp_path: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("not a log\n" * 3)
    wrong = {
        "optim.learning_rate=1": "learning_rate",
        f"data.logs={tmp_path / 'missing.jsonl'}": "missing.jsonl",
        f"data.logs={empty}": "data.format",
        "drafter.target_layer_ids=[1,5]": "target_layer_ids",
        "drafter.mask_token_id=260": "mask_token_id",
        f"target.name_or_path={tmp_path / 'no-model'}": "target.name_or_path",
        "recipe=unheard": "unheard",
    }
    for number, (override, word) in enumerate(wrong.items()):
        runs = tmp_path / f"runs-{number}"
        assert main(["run", f"runs_dir={runs}", *tiny_overrides, override]) == 2, override
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert word in said
        assert "Traceback" not in said
        left = [path for path in runs.rglob("*") if path.is_file()]
        assert not [path for path in left if ".partial-" in str(path)]
        assert not [path for path in left if path.name == "manifest.json"]


def test_a_stage_names_the_one_that_is_missing_before_it(
    tmp_path: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", f"runs_dir={tmp_path}", *tiny_overrides]) == 2
    assert "dflash-train collect" in capsys.readouterr().err


def test_sample_traffic_is_a_command_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "log.jsonl"
    assert main(["sample-traffic", f"out={out}", "requests=20", "seed=3"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert len(out.read_bytes().splitlines()) >= 20
    assert main(["sample-traffic", "requests=20"]) == 2
    assert main(["sample-traffic", f"out={out}", "request=20"]) == 2
