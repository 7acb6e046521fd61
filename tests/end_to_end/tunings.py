"""A small world to tune in: a tiny target, a drafter that knows nothing, two weeks of one tenant.

A run's data stages are done once, by the commands that a user types; tests tune on copies of it.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dflash_train.cli import main
from dflash_train.config import TargetConfig
from dflash_train.drafter.checkpoint import save_checkpoint
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import load_target
from dflash_train.testing import tiny_drafter

MASK_TOKEN_ID = 15
"""No answer of the tiny target to these questions holds it, which the doctor demands."""
START, HOUR = 1_792_000_800, 3600
WEEKS = {
    "new": ["red fox", "old boat"],
    "newer": ["wet stone", "blue jar"],
}
"""By log: what is asked in it."""
NUM_CALLS, NUM_JUDGED = 110, 55
"""Of a log, and of its newest window."""
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SETTINGS = [
    "--recipes", str(RECIPES), "recipe=smollm2", "target.name_or_path=target",
    f"drafter.mask_token_id={MASK_TOKEN_ID}", "drafter.num_taps=2", "drafter.num_hidden_layers=2",
    "drafter.block_size=4", "data.max_new_tokens=24", "data.batch_size=16",
    "data.max_drop_share=1", "data.hmac_key_file=key", "data.test_share=0.5",
    "training.num_anchors=16", "training.pack_tokens=400", "training.max_steps=60",
    "training.validate_every=20", "training.save_every=10", "training.validation_rows=4",
    "training.head_sample=0", "optim.lr=6e-3", "evaluate.eval_sets=[]", "evaluate.resamples=100",
    "launch.num_threads=1", "launch.mixed_precision=no", "tune.min_requests=50",
    "tune.lr_factor=1",
]  # fmt: skip
TUNE = ["tune", *SETTINGS, "name=week"]
NEW, NEWER = "data.logs=new.jsonl", "data.logs=newer.jsonl"
STRICT = f"tune.min_requests={NUM_JUDGED + 1}"
"""A rule by which no candidate of these logs is promoted."""


def served_drafter(**fields: Any) -> Drafter:
    """Build the incumbent, random weights for the target in this folder.

    Args:
        **fields: Of its config, where they shall be another target's.
    """
    target = load_target(TargetConfig(name_or_path="target"), [1, 3])
    shape = replace(tiny_drafter(target).config, mask_token_id=MASK_TOKEN_ID, **fields)
    torch.manual_seed(0)
    return Drafter(shape)


def make_world(folder: Path, tiny_target_folder: Path, *settings: str) -> Path:
    """Make target, incumbent and logs, and the data stages of `runs/week` on the new log."""
    shutil.copytree(tiny_target_folder, folder / "target")
    (folder / "key").write_text("0123456789abcdef" * 2)
    for name in WEEKS:
        lines = [_call(name, number) for number in range(NUM_CALLS)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        save_checkpoint(served_drafter(), Path("served"))
        for stage in ("ingest", "regenerate", "collect"):
            assert main([stage, *SETTINGS, "name=week", NEW, *settings]) == 0
    return folder


def _call(log: str, number: int) -> str:
    request = {"user": "alder", "messages": [{"role": "user", "content": WEEKS[log][number % 2]}]}
    created = START + number * HOUR
    line = {"id": f"{log}-{number}", "created": created, "request": request, "response": None}
    return json.dumps(line) + "\n"


def copied(world: Path, folder: Path) -> Path:
    """Copy a world, its registry's links as links."""
    return Path(shutil.copytree(world, folder / "world", symlinks=True))


def verdict_of(name: str = "week") -> dict[str, Any]:
    """Read the verdict of a run in this folder."""
    return json.loads((Path("runs") / name / "tuning" / "verdict.json").read_bytes())


def files_below(folder: Path) -> dict[Path, int]:
    """Give every file with its time of change, to show that nothing was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
