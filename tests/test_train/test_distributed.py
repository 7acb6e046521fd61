"""Two processes over gloo against one: the same losses, the same weights, the same states."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dflash_train.testing import assert_close, tiny_target
from dflash_train.training.keeping import shared_packs
from dflash_train.training.state import latest_state
from tests.test_train.launched_runs import (
    ONE_RANK,
    ROW_TOKENS,
    RUNS,
    TWO_RANKS,
    Run,
    by_torch,
    even_rows,
    fit,
    launch_runs,
    losses,
)

NUM_EVEN_ROWS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, answer_rows, write_split) -> Path:
    """Features, and all runs of two ranks, in one launch."""
    folder = tmp_path_factory.mktemp("distributed")
    target = tiny_target(dtype=torch.float64)
    uneven = answer_rows(target, [5, 9, 7, 12, 6, 8, 10])
    write_split(folder / "uneven", uneven, dtype=torch.float64)
    even = even_rows(answer_rows(target, [ROW_TOKENS - 8] * NUM_EVEN_ROWS, seed=1))
    assert {len(row.input_ids) for row in even} == {ROW_TOKENS}
    write_split(folder / "even", even, dtype=torch.float64)
    fit(folder, RUNS["cut on one"], "cut on one")
    (folder / "said").write_text(launch_runs(by_torch(2), folder, TWO_RANKS))
    return folder


def weights(folder: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}-rank-{rank}" / "model.safetensors")


def assert_same_weights(folder: Path, name: str, want: str, *, ranks: int = 1) -> None:
    for rank in range(ranks):
        got = weights(folder, name, rank)
        for key, tensor in weights(folder, want).items():
            assert_close(f"{name}: {key} on rank {rank}", got[key], tensor, 1e-10)


@pytest.mark.parametrize("name", ["plain", "dflash2", "dspark", "averaged"])
def test_two_processes_equal_one_with_twice_the_accumulation(folder: Path, name: str):
    both = TWO_RANKS[name]
    alone = Run(
        variant=both.variant,
        weighting=both.weighting,
        ema_decay=both.ema_decay,
        accumulation_steps=2,
    )
    fit(folder, alone, f"{name} alone")
    assert_same_weights(folder, name, f"{name} alone", ranks=2)
    assert losses(folder, name) == pytest.approx(losses(folder, f"{name} alone"), rel=1e-10)


def test_four_rows_give_the_same_losses_however_ranks_and_batches_share_them(folder: Path):
    alone = ["one rank x 1 row x 4", "one rank x 4 rows"]
    for name in alone:
        fit(folder, ONE_RANK[name], name)
    want, *others = (
        losses(folder, name) for name in [*alone, "two ranks x 2 rows", "two ranks x 1 row x 2"]
    )
    assert len(want) == 50
    assert want[-1] < 0.9 * want[0], "the drafter learns, so equal losses mean something"
    for got in others:
        assert got == pytest.approx(want, rel=1e-9)


def test_a_state_of_two_processes_goes_on_on_one(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert (folder / "cut-stopped-1").exists()
    fit(folder, ONE_RANK["goes on on one"], "goes on on one")
    said = capsys.readouterr().err
    assert "resuming at step 2" in said
    assert "a step still takes 2 packs, 2 per process" in said
    assert_same_weights(folder, "goes on on one", "plain")


def test_a_state_of_one_process_goes_on_on_two(folder: Path):
    said = (folder / "said").read_text()
    assert "the state is of 1 process(es), and there are 2 now" in said
    assert_same_weights(folder, "goes on on two", "plain", ranks=2)


def test_a_signal_at_one_rank_saves_the_state_of_all_and_the_run_goes_on(folder: Path):
    for rank in range(2):
        stopped = (folder / f"signalled-stopped-{rank}").read_text()
        assert stopped == "KeyboardInterrupt('train state saved at step 2')"
    state = latest_state(folder / "signalled" / "state", key="")
    assert state is not None
    assert {path.name for path in state.glob("random_states_*")} == {
        "random_states_0.pkl",
        "random_states_1.pkl",
    }
    assert_same_weights(folder, "signalled again", "plain", ranks=2)


def test_packs_are_shared_evenly_or_as_near_as_can_be():
    assert [shared_packs(8, ranks) for ranks in (1, 2, 3, 8, 16)] == [8, 4, 3, 1, 1]
