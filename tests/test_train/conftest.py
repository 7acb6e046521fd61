"""Rows that a tiny target really answered, stores that hold them, recipes that train on them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dflash_train.config import (
    DrafterSettings,
    LaunchConfig,
    OptimConfig,
    RecipeConfig,
    TargetConfig,
    TrainingConfig,
)
from dflash_train.features.store import FeatureRow, FeatureStore, write_index, write_shard
from dflash_train.features.target import Target
from dflash_train.records.manifest import FileEntry, Manifest
from dflash_train.testing import MASK_TOKEN_ID, tiny_target
from tests.test_train.token_splits import write_tokens
from tests.test_train.twin_splits import TwinSplit

AnswerRows = Callable[..., list[FeatureRow]]
WriteSplit = Callable[..., FeatureStore]
WriteTwins = Callable[..., TwinSplit]
TinyRecipe = Callable[..., RecipeConfig]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def target64() -> Target:
    return tiny_target(dtype=torch.float64)


@pytest.fixture(scope="session")
def target32() -> Target:
    return tiny_target(dtype=torch.float32)


@pytest.fixture(scope="session")
def answer_rows() -> AnswerRows:
    """Give rows with random prompts of the given lengths, answered greedily."""

    def answer(
        target: Target, prompt_lengths: list[int], *, max_new_tokens: int = 16, seed: int = 0
    ) -> list[FeatureRow]:
        generator = torch.Generator().manual_seed(seed)
        prompts = [
            torch.randint(4, 260, (length,), generator=generator).tolist()
            for length in prompt_lengths
        ]
        answers = target.generate_batch(prompts, max_new_tokens=max_new_tokens)
        return [
            FeatureRow(
                id=f"row-{seed}-{number}",
                tenant="tenant",
                session=f"session-{number}",
                input_ids=torch.tensor([*prompt, *answer.output_ids]),
                loss_mask=torch.arange(len(prompt) + len(answer.output_ids)) >= len(prompt),
                features=answer.features,
                max_length=len(prompt) + max_new_tokens,
                finish_reason=answer.finish_reason,
            )
            for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]

    return answer


@pytest.fixture(scope="session")
def write_split() -> WriteSplit:
    """Write rows as a complete split of two shards and open it."""

    def write(
        folder: Path, rows: list[FeatureRow], *, dtype: torch.dtype = torch.float32
    ) -> FeatureStore:
        half = max(1, len(rows) // 2)
        lines = []
        for number, part in enumerate((rows[:half], rows[half:])):
            if part:
                lines += write_shard(folder / f"{number:05d}.safetensors", part, dtype=dtype)
        write_index(folder, lines)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        outputs = [FileEntry.of(path, folder) for path in files]
        Manifest(stage="collect", recipe_hash="sha256:0", outputs=outputs).write(folder)
        return FeatureStore.open(folder)

    return write


@pytest.fixture(scope="session")
def write_twins(target32: Target, answer_rows: AnswerRows, write_split: WriteSplit) -> WriteTwins:
    """Write answers to random prompts of the given lengths as a split with and without features."""

    def write(folder: Path, prompt_lengths: list[int], *, seed: int = 0) -> TwinSplit:
        rows = answer_rows(target32, prompt_lengths, seed=seed)
        return TwinSplit(
            stored=write_split(folder / "features", rows),
            tokens=write_tokens(folder / "tokens", rows),
        )

    return write


@pytest.fixture(scope="session")
def train_twins(tmp_path_factory: pytest.TempPathFactory, write_twins: WriteTwins) -> TwinSplit:
    return write_twins(tmp_path_factory.mktemp("train"), [5, 9, 7, 12, 6, 8, 30, 11, 4])


@pytest.fixture(scope="session")
def tiny_recipe() -> TinyRecipe:
    """Give a recipe whose training settings are small; keywords override them."""

    def recipe(
        runs_dir: Path, *, name: str = "tiny", lr: float = 3e-3, **training: int
    ) -> RecipeConfig:
        settings = {
            "max_steps": 6, "num_anchors": 4, "pack_tokens": 64, "validate_every": 3,
            "save_every": 2, "log_every": 2, "head_chunk": 16,
        }  # fmt: skip
        return RecipeConfig(
            name=name,
            runs_dir=str(runs_dir),
            target=TargetConfig(name_or_path="tiny"),
            drafter=DrafterSettings(
                block_size=4,
                num_hidden_layers=2,
                target_layer_ids=[1, 3],
                mask_token_id=MASK_TOKEN_ID,
            ),
            training=TrainingConfig(**(settings | training)),  # pyright: ignore[reportArgumentType]
            optim=OptimConfig(lr=lr),
            launch=LaunchConfig(num_threads=1),
        )

    return recipe
