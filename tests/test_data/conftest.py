"""A tiny target and a run folder with conversations for the stages that need them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dflash_train.config import (
    DataConfig,
    DrafterSettings,
    RecipeConfig,
    TargetConfig,
    TrainingConfig,
)
from dflash_train.features.target import Target
from dflash_train.testing import MASK_TOKEN_ID, tiny_target
from tests.test_data.answer_server import Server


@pytest.fixture(scope="session")
def target() -> Target:
    return tiny_target()


@pytest.fixture
def config(tmp_path: Path) -> RecipeConfig:
    """A recipe for the tiny target whose run folder is empty."""
    return RecipeConfig(
        name="run",
        runs_dir=str(tmp_path),
        target=TargetConfig(name_or_path="tiny"),
        drafter=DrafterSettings(mask_token_id=MASK_TOKEN_ID, num_taps=2),
        data=DataConfig(max_new_tokens=12, batch_size=4),
        training=TrainingConfig(max_steps=1),
    )


@pytest.fixture
def servers(target: Target) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(**settings: Any) -> Server:
        started.append(Server(target, **settings))
        return started[-1]

    yield start
    for server in started:
        server.close()
