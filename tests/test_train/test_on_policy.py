"""The trainer with blocks from the drafter's own steps: resumed, resharded, and each time anew."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dflash_train.config import FeaturesFrom, LossConfig, RecipeConfig, Weighting
from dflash_train.features.store import FeatureStore
from dflash_train.features.target import Target
from dflash_train.testing import VARIANTS, tiny_drafter
from dflash_train.training.accelerator import build_accelerator
from dflash_train.training.batching import Pack
from dflash_train.training.on_policy import OnPolicyBlocks, read_own_starts, write_own_starts
from dflash_train.training.optimizer_step import StepResult
from dflash_train.training.replay import replay_rows
from dflash_train.training.trainer import Trainer

WEIGHTED = LossConfig(weighting=Weighting.dpace, first_wrong=3.0)
EVERY: dict[str, Any] = {
    "on_policy_every": 4, "max_steps": 10, "save_every": 3, "validate_every": 10, "lr": 3e-2,
}  # fmt: skip


@pytest.fixture
def build(
    tmp_path: Path, target32: Target, answer_rows, write_split, tiny_recipe
) -> Callable[..., Trainer]:
    """Give a function that prepares the trainer of a named run on a few rows."""
    features = tmp_path / "features"
    write_split(features / "train", answer_rows(target32, [5, 9, 7, 12, 6, 8]))
    write_split(features / "validation", answer_rows(target32, [6, 10], seed=1))

    def trainer(
        name: str, *, shape: dict[str, Any] | None = None, loss: LossConfig = WEIGHTED, **more: Any
    ) -> Trainer:
        config: RecipeConfig = tiny_recipe(tmp_path, name=name, **(EVERY | more))
        config = replace(config, loss=loss)
        return Trainer(
            config,
            accelerator=build_accelerator(config.launch),
            drafter=tiny_drafter(target32, **(shape or {})),
            head=target32.head,
            train=FeatureStore.open(features / "train"),
            validation=FeatureStore.open(features / "validation"),
            run_dir=config.run_dir,
        )

    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in trainer.drafter.named_parameters()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(each, second[name]) for name, each in first.items())


def files_of(trainer: Trainer) -> list[Path]:
    return sorted(trainer.run_folder.state_dir.glob("own-starts-*"))


def assert_each_time_is_another(trainer: Trainer) -> None:
    """Else it would prove nothing that a resumed run draws from the right one."""
    starts = [
        {row: each.tolist() for row, each in read_own_starts(path).items()}
        for path in files_of(trainer)
    ]
    assert len(starts) == 3
    assert all(first != second for first, second in pairwise(starts))


def crash_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = Trainer.train_step

    def train_step(self: Trainer, window: list[Pack]) -> StepResult:
        if self.state.step == step:
            raise RuntimeError("power cut")
        return original(self, window)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize(
    ("step", "shape"), [(4, "plain"), (5, "plain"), (8, "plain"), (5, "dflash2"), (7, "dspark")]
)
def test_a_run_cut_anywhere_resumes_to_the_same_weights(
    build, monkeypatch: pytest.MonkeyPatch, step: int, shape: str
):
    fields = {} if shape == "plain" else VARIANTS[shape]
    whole = build("whole", shape=fields)
    whole.fit()
    assert_each_time_is_another(whole)
    with monkeypatch.context() as patch:
        crash_before(patch, step)
        with pytest.raises(RuntimeError, match="power cut"):
            build("cut", shape=fields).fit()
    cut = build("cut", shape=fields)
    cut.fit()
    assert_same(weights(whole), weights(cut))


def test_blocks_start_where_the_frozen_drafter_would_start_its_steps(build, target32: Target):
    trainer = build("run", num_anchors=3)
    drafter, store = trainer.drafter, trainer.source.store
    trainer.on_policy.update(trainer.state, drafter=lambda: drafter, head=trainer.head)
    rows = [store[place] for place in range(len(store))]
    for row, trace in zip(rows, replay_rows(drafter, target32.head, rows), strict=True):
        assert trainer.on_policy.own_starts[row.id].tolist() == trace.starts
    (pack,) = trainer.next_window(trainer.source.stream(epoch=0, position=0))
    batch = trainer.source.load(pack)
    offsets = batch.blocks.block_offsets
    own = {tuple(each.tolist()) for each in trainer.on_policy.own_starts.values()}
    for begin, end in pairwise(offsets):
        anchors = set(batch.blocks.anchor_positions[begin:end].tolist())
        assert any(anchors <= set(starts) for starts in own)


def test_the_drafter_drafts_again_every_so_many_steps(build, monkeypatch: pytest.MonkeyPatch):
    replayed: list[int] = []
    original = OnPolicyBlocks._replay_ahead

    def replay_ahead(self: OnPolicyBlocks, state: Any, *rest: Any) -> None:
        replayed.append(state.step)
        original(self, state, *rest)

    monkeypatch.setattr(OnPolicyBlocks, "_replay_ahead", replay_ahead)
    trainer = build("run")
    trainer.fit()
    assert replayed == [0, 4, 8]
    names = [path.name for path in files_of(trainer)]
    assert names == [f"own-starts-{step:06d}-000.safetensors" for step in (0, 4, 8)]


def test_files_that_no_kept_state_needs_are_removed(build):
    trainer = build("run", max_steps=20, save_every=1, keep_states=2, on_policy_every=4)
    trainer.fit()
    assert {path.name[11:17] for path in files_of(trainer)} == {"000012", "000016"}


def test_two_processes_find_together_what_one_finds_alone(build):
    alone = build("alone")
    alone.on_policy.update(alone.state, drafter=lambda: alone.drafter, head=alone.head)
    parts = [build("pair"), build("pair")]

    class Rank:
        def __init__(self, index: int) -> None:
            self.process_index, self.num_processes = index, 2
            self.is_main_process = index == 0

        def wait_for_everyone(self) -> None:
            """Each rank runs after the other here, so nobody is waited for."""

    for index, part in enumerate(parts):
        part.on_policy._accelerator = Rank(index)
        drafter = part.drafter
        part.on_policy._replay_ahead(part.state, drafter, part.head)
    parts[0].on_policy._read(0)
    found, expected = parts[0].on_policy.own_starts, alone.on_policy.own_starts
    assert found.keys() == expected.keys()
    for row, starts in expected.items():
        assert found[row].tolist() == starts.tolist()


def test_a_lost_file_is_named(build):
    trainer = build("run")
    trainer.state.step = 5
    with pytest.raises(ValueError, match=r"own-starts-000004.*--force"):
        trainer.on_policy.update(trainer.state, drafter=lambda: trainer.drafter, head=trainer.head)


def test_a_damaged_file_is_named(tmp_path: Path):
    path = tmp_path / "own-starts-000004-000.safetensors"
    write_own_starts(path, {3: torch.tensor([4, 7]), 5: torch.tensor([], dtype=torch.int64)})
    found = read_own_starts(path)
    assert {row: starts.tolist() for row, starts in found.items()} == {3: [4, 7], 5: []}
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"own-starts-000004.* is damaged.*--force"):
        read_own_starts(path)


def test_the_replay_to_come_is_counted_in_minutes(build):
    assert build("plain", on_policy_every=None, loss=LossConfig()).seconds_of_own_starts() == 0
    assert build("own").seconds_of_own_starts() > 0


def test_online_features_and_senseless_values_are_refused(tmp_path: Path, tiny_recipe):
    config: RecipeConfig = tiny_recipe(tmp_path, name="run", on_policy_every=4)
    online = replace(config.data, features=FeaturesFrom.online)
    with pytest.raises(ValueError, match=r"training.on_policy_every \(=4\) .*stored"):
        replace(config, data=online)
    with pytest.raises(ValueError, match=r"training.on_policy_share \(=0.0\)"):
        tiny_recipe(tmp_path, name="run", on_policy_share=0.0)
    with pytest.raises(ValueError, match=r"training.on_policy_every \(=0\)"):
        tiny_recipe(tmp_path, name="run", on_policy_every=0)
