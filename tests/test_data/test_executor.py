"""Every executor gives the bytes of the local one; the Slurm commands are small scripts here.

They stand in for a cluster of one machine: `sbatch` runs the tasks of a submitted script at once,
so datatrove's own submission, its pickles and its task processes are the real ones.
"""

import json
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dflash_data.ingest.stage
from dflash_data.executor import Document, Guard, run_phases
from dflash_data.ingest.stage import ingest, slurm_scripts
from dflash_train.config import (
    DataConfig,
    ExecutorConfig,
    ExecutorKind,
    RecipeConfig,
    UnavailableError,
)
from dflash_train.records.manifest import Manifest

SECRET = "ana@example.org"
ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = os.pathsep.join([str(ROOT), str(ROOT / "data_pipelines")])
"""What task processes import from."""
KEY = "a key of more than sixteen bytes"

SBATCH = """#!/bin/bash
echo "$@" >> "$CLUSTER/submitted"
script="${@: -1}"
number=$(wc -l < "$CLUSTER/submitted")
if grep -q launch_pickled_pipeline "$script"; then
    SLURM_ARRAY_TASK_ID=0 SLURM_NODELIST=here bash "$script" > "$CLUSTER/out.$number" 2>&1
fi
echo "Submitted batch job $number"
"""
SRUN = '#!/bin/bash\nshift 3\nexec "$@"\n'
SCONTROL = "#!/bin/bash\necho here\n"
SQUEUE = "#!/bin/bash\ntrue\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    lines = [
        json.dumps(
            {
                "id": f"r{n}",
                "created": 1_792_000_000 + 3600 * n,
                "request": {"messages": [{"role": "user", "content": f"{n}: mail to {SECRET}"}]},
                "response": None,
            }
        )
        for n in range(30)
    ]
    path = tmp_path / "traffic.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cluster"
    folder.mkdir()
    commands = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}
    for name, text in commands.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("CLUSTER", str(folder))
    monkeypatch.setenv("PYTHONPATH", SOURCE_ROOTS)
    return folder


def recipe(folder: Path, kind: ExecutorKind, **settings: object) -> RecipeConfig:
    config = RecipeConfig(
        name=kind.value,
        runs_dir=str(folder),
        data=DataConfig(test_share=0.2, validation_share=0.2),
        executor=ExecutorConfig(kind=kind, **settings),  # type: ignore[arg-type]
    )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / ".hmac-key").write_text(KEY)
    return config


def conversations(config: RecipeConfig, log: Path) -> dict[str, bytes]:
    ingest(config, log, evaluation={}, manifest=Manifest(stage="ingest", recipe_hash="sha256:0"))
    folder = config.run_dir / "conversations"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_slurm_runs_the_phases_one_after_another_and_the_second_command_ends_the_stage(
    tmp_path: Path, log: Path, cluster: Path
):
    config = recipe(tmp_path, ExecutorKind.slurm, slurm_partition="night")
    with pytest.raises(UnavailableError, match=r"Slurm jobs 1, 3, 5, 7, 9. Run this"):
        conversations(config, log)
    submitted = (cluster / "submitted").read_text().splitlines()
    tasks = [line for line in submitted if "RUN_OFFSET" in line]
    after = [line.split("--dependency=")[1].split()[0] for line in tasks[1:]]
    # Between the phases counts are merged.
    assert after == ["afterok:1", "afterok:3", "afterok:5", "afterok:7"]
    written = {path.name: path.read_bytes() for path in config.run_dir.rglob("*.pik")}
    scripts = [path.read_text() for path in config.run_dir.rglob("launch_script.slurm")]
    assert len(scripts) == 5
    assert all("#SBATCH --partition=night" in script for script in scripts)
    for content in [*written.values(), *(path.read_bytes() for path in cluster.glob("out.*"))]:
        assert SECRET.encode() not in content
        assert KEY.encode() not in content
    assert conversations(config, log) == conversations(recipe(tmp_path, ExecutorKind.local), log)


@pytest.mark.slow
def test_a_task_that_fails_on_slurm_is_told_by_the_next_command_and_then_tried_again(
    tmp_path: Path, log: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch
):
    config = recipe(tmp_path, ExecutorKind.slurm)
    (cluster / "srun").write_text(
        SRUN.replace("exec", "DFLASH_HMAC_KEY=another-key-on-the-node exec")
    )
    with pytest.raises(UnavailableError):
        conversations(config, log)
    with pytest.raises(ValueError, match="gives another key to a task"):
        conversations(config, log)
    (cluster / "srun").write_text(SRUN)
    with pytest.raises(UnavailableError):
        conversations(config, log)
    assert conversations(config, log)


def test_scripts_for_slurm_can_be_read_without_a_cluster(tmp_path: Path, log: Path):
    config = recipe(
        tmp_path, ExecutorKind.slurm, workers=8, memory_gb=3, slurm_time="01:00:00",
        slurm_environment="source /opt/env/bin/activate",
    )  # fmt: skip
    scripts = slurm_scripts(config, log, evaluation={})
    assert list(scripts) == ["read", "spread", "chain", "decide", "write"]
    lines = [line.strip() for line in scripts["read"].splitlines()]
    for line in (
        "#SBATCH --mem-per-cpu=3G", "#SBATCH --time=01:00:00", "#SBATCH --array=0-0%8",
        "export LOGURU_DIAGNOSE=NO; source /opt/env/bin/activate",
    ):  # fmt: skip
        assert line in lines
    assert any(line.startswith("srun") and line.endswith("read/executor.pik") for line in lines)


def test_slurm_without_its_commands_says_what_to_do(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UnavailableError, match=r"executor\.kind \(=slurm\) needs the command sbatch"
    ):
        conversations(recipe(tmp_path, ExecutorKind.slurm), log)


@pytest.mark.slow
def test_ray_gives_the_bytes_of_the_local_executor(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", SOURCE_ROOTS)
    found = conversations(recipe(tmp_path, ExecutorKind.ray, workers=2, memory_gb=1), log)
    assert found == conversations(recipe(tmp_path, ExecutorKind.local), log)


@pytest.mark.slow
def test_a_task_that_fails_on_ray_is_an_error_here(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", SOURCE_ROOTS)

    def run_without_the_log(*arguments: Any) -> Counter[str]:
        log.unlink()
        return run_phases(*arguments)

    monkeypatch.setattr(dflash_data.ingest.stage, "run_phases", run_without_the_log)
    config = recipe(tmp_path, ExecutorKind.ray, workers=2, memory_gb=1)
    with pytest.raises((RuntimeError, ValueError), match=r"a task stopped at|data\.logs"):
        conversations(config, log)
    assert not (config.run_dir / "conversations").exists()


def test_guard_withholds_what_a_foreign_error_says_and_tells_where_it_was(tmp_path: Path):
    def documents() -> Iterator[Document]:
        yield Document(text="", id=str(int(SECRET)))

    with pytest.raises(RuntimeError) as caught:
        Guard(tmp_path).run(documents())
    assert str(caught.value).startswith("a task stopped at test_executor.py:")
    assert "with ValueError" in str(caught.value)
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1
    assert SECRET not in "".join([str(caught.value), *files])
    assert caught.value.__suppress_context__


def test_guard_passes_on_what_the_user_can_fix(tmp_path: Path):
    def documents() -> Iterator[Document]:
        raise ValueError("data.logs (=x) is broken. Repair it.")
        yield

    with pytest.raises(ValueError, match=r"data\.logs \(=x\) is broken"):
        Guard(tmp_path).run(documents())
