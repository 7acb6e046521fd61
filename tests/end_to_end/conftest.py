"""The whole road on a tiny random target: seconds instead of half an hour."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dflash_train.testing import MASK_TOKEN_ID, save_tiny_target


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)  # recipes set their own


@pytest.fixture(scope="session")
def tiny_target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def tiny_overrides(tiny_target_folder: Path) -> list[str]:
    """Overrides of recipe=smollm2 that fit the tiny target; `runs_dir` is the caller's."""
    return [
        "name=tiny",
        f"target.name_or_path={tiny_target_folder}",
        f"drafter.mask_token_id={MASK_TOKEN_ID}",
        "drafter.num_taps=2",
        "drafter.num_hidden_layers=2",
        "drafter.block_size=4",
        "data.sample.requests=60",
        "data.max_new_tokens=24",
        "data.max_prompt_tokens=2000",
        "data.batch_size=16",
        "training.max_steps=12",
        "training.validate_every=6",
        "training.save_every=3",
        "training.log_every=3",
        "training.num_anchors=8",
        "training.pack_tokens=3000",
        "evaluate.prompts_per_set=4",
        "evaluate.live_traffic=2",
        "evaluate.live_per_set=1",
        "evaluate.live_max_new_tokens=12",
        "evaluate.fast=false",
        "evaluate.resamples=200",
        "launch.num_threads=1",
    ]
