"""The same training from a store and online, on every rank of a launch: a program for torchrun.

    torchrun --nproc-per-node 2 -m tests.test_train.online_on_ranks FOLDER STORED TOKENS

STORED and TOKENS are the folders of one split with and without features. The runs `stored` and
`online` are left in FOLDER.
"""

import sys
from pathlib import Path

import torch

from dflash_train.config import DataConfig, FeaturesFrom, OnlineSettings
from dflash_train.features.store import FeatureStore
from dflash_train.testing import tiny_drafter, tiny_target
from dflash_train.training.accelerator import build_accelerator
from dflash_train.training.trainer import Trainer
from tests.test_train.launched_runs import Run, recipe
from tests.test_train.twin_splits import TwinSplit

RUN = Run(max_steps=20, dtype=torch.float32)


def main(folder: Path, twins: TwinSplit) -> None:
    """Fit both runs, one after the other."""
    target = tiny_target(dtype=RUN.dtype)
    for name, rows in {"stored": twins.stored, "online": twins.online(target)}.items():
        config = recipe(folder, RUN, name)
        online = OnlineSettings(prefetch=0)
        config.data = DataConfig(features=FeaturesFrom[name], online=online)
        accelerator = build_accelerator(config.launch)
        assert accelerator.num_processes == 2
        Trainer(
            config,
            accelerator=accelerator,
            drafter=tiny_drafter(target),
            head=target.head,
            train=rows,
            validation=twins.stored,
            run_dir=config.run_dir,
        ).fit()
        accelerator.free_memory()
    build_accelerator(RUN.launch).end_training()  # gloo aborts a process without it


if __name__ == "__main__":
    run_folder, stored, tokens = map(Path, sys.argv[1:])
    main(
        run_folder,
        TwinSplit(
            stored=FeatureStore.open(stored),
            tokens=FeatureStore.open(tokens, needs_features=False),
        ),
    )
