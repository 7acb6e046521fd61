"""Two processes over gloo against one with twice the accumulation, in float64."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from dflash_train.config import LossConfig, RecipeConfig, Weighting
from dflash_train.features.store import FeatureStore
from dflash_train.features.target import Target
from dflash_train.testing import VARIANTS, assert_close, tiny_drafter, tiny_target
from dflash_train.training.accelerator import build_accelerator
from dflash_train.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
CASES = ["plain-decay", "dflash2-dpace", "dspark-dpace"]
PROGRAM = """
import sys
from pathlib import Path
from dflash_train.config import *
from dflash_train.drafter.checkpoint import save_checkpoint
from dflash_train.features.store import FeatureStore
from dflash_train.testing import VARIANTS, tiny_drafter, tiny_target
from dflash_train.training.accelerator import build_accelerator
from dflash_train.training.trainer import Trainer
import torch

folder = Path(sys.argv[1])
target = tiny_target(dtype=torch.float64)
store = FeatureStore.open(folder / "features")
for case in sys.argv[2:]:
    variant, weighting = case.split("-")
    config = RecipeConfig(
        name=case, runs_dir=str(folder), target=TargetConfig(name_or_path="tiny"),
        drafter=DrafterSettings(mask_token_id=3),
        training=TrainingConfig(max_steps=4, num_anchors=4, pack_tokens=40,
                                validate_every=2, save_every=2, log_every=1),
        loss=LossConfig(weighting=Weighting[weighting]),
        optim=OptimConfig(lr=3e-3), launch=LaunchConfig(num_threads=1),
    )
    accelerator = build_accelerator(config.launch)
    assert accelerator.num_processes == 2
    trainer = Trainer(
        config, accelerator=accelerator,
        drafter=tiny_drafter(target, dtype=torch.float64, **VARIANTS[variant]),
        head=target.head, train=store, validation=store, run_dir=config.run_dir,
    )
    trainer.fit()
    save_checkpoint(trainer.drafter, folder / f"{case}-rank-{accelerator.process_index}")
    accelerator.free_memory()
accelerator.end_training()
"""


def launch(folder: Path, cases: list[str]) -> None:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *command, str(folder), *cases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_two_processes_equal_one_with_twice_the_accumulation(
    tmp_path: Path, answer_rows, write_split, tiny_recipe
):
    target: Target = tiny_target(dtype=torch.float64)
    rows = answer_rows(target, [5, 9, 7, 12, 6, 8, 10])
    store: FeatureStore = write_split(tmp_path / "features", rows, dtype=torch.float64)
    launch(tmp_path, CASES)
    for case in CASES:
        variant, weighting = case.split("-")
        config: RecipeConfig = tiny_recipe(
            tmp_path, name=f"{case}-one", max_steps=4, accumulation_steps=2, pack_tokens=40,
            validate_every=2, log_every=1, head_chunk=1024,
        )  # fmt: skip
        config = replace(config, loss=LossConfig(weighting=Weighting[weighting]))
        trainer = Trainer(
            config,
            accelerator=build_accelerator(config.launch),
            drafter=tiny_drafter(target, dtype=torch.float64, **VARIANTS[variant]),
            head=target.head,
            train=store,
            validation=store,
            run_dir=config.run_dir,
        )
        # Two processes run the same window: their two packs, one each.
        trainer.fit()
        weights = trainer.drafter.state_dict()
        for rank in range(2):
            other = load_file(tmp_path / f"{case}-rank-{rank}" / "model.safetensors")
            for name, tensor in weights.items():
                assert_close(f"{case}: {name} on rank {rank}", other[name], tensor, 1e-10)
        assert trainer.validate().pooled > 0
