"""The Slurm example with stand-ins for Slurm's own commands and for the launcher."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "launch" / "slurm.sh"
COMMANDS = {
    "srun": 'echo $$ > "$OUT/pid"; shift; SLURM_NODEID=0 exec "$@"',
    "scancel": 'kill -TERM "$(cat "$OUT/pid")"',
    "scontrol": (
        'if [ "$1" = show ]; then printf "node-a\\nnode-b\\n"; else echo "$@" > "$OUT/said"; fi'
    ),
    "python": (
        'trap "echo saved > \\"$OUT/saved\\"; exit 130" TERM\n'
        'printf "%s\\n" "$@" > "$OUT/partial"; mv "$OUT/partial" "$OUT/arguments"\n'
        '[ -z "${FAILS:-}" ] || exit 2\n'
        "for _ in $(seq 600); do sleep 0.05; done"
    ),
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name, body in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "OUT": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_PER_NODE": "8",
    }


def test_a_job_that_must_end_saves_and_goes_back_into_the_queue(
    tmp_path: Path, environment: dict[str, str]
):
    job = subprocess.Popen(["bash", str(SCRIPT), "recipe=qwen3", "name=a b"], env=environment)
    end = time.monotonic() + 60
    while not (tmp_path / "arguments").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "said").read_text() == "requeue 7\n"
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:2] == ["-m", "dflash_train.launch"]
    assert arguments[2:4] == ["--config_file", "recipes/launch/multi_node.yaml"]
    assert arguments[arguments.index("--num_processes") + 1] == "16"
    assert arguments[arguments.index("--main_process_ip") + 1] == "node-a"
    assert arguments[-3:] == ["train.py", "recipe=qwen3", "name=a b"]


def test_a_job_whose_training_fails_ends_with_its_code(tmp_path: Path, environment: dict[str, str]):
    environment |= {"FAILS": "yes", "LAUNCH": "fsdp2"}
    result = subprocess.run(["bash", str(SCRIPT), "recipe=qwen3"], env=environment, check=False)
    assert result.returncode == 2
    assert not (tmp_path / "said").exists()
    assert "recipes/launch/fsdp2.yaml" in (tmp_path / "arguments").read_text()
