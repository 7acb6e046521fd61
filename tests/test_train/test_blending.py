"""How much of a tuning its candidate takes over: the mixture, the choice, the rows behind it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dflash_train.config import compose
from dflash_train.features.mixed_rows import ChosenRows
from dflash_train.features.store import FeatureRow, FeatureStore
from dflash_train.features.target import Target
from dflash_train.stages.tune.blending import (
    Blend,
    blended,
    choose,
    most_measured,
    some_of_each_tenant,
)
from dflash_train.testing import VARIANTS, tiny_drafter


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_blend_lies_between_both_drafters(variant: str, target32: Target):
    torch.manual_seed(1)
    start = tiny_drafter(target32, **VARIANTS[variant])
    tuned = tiny_drafter(target32, **VARIANTS[variant])
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += torch.randn_like(parameter)
    random_before = torch.get_rng_state()
    old, new = start.state_dict(), tuned.state_dict()
    mixed = blended(start, tuned, 0.25).state_dict()
    assert torch.equal(torch.get_rng_state(), random_before)
    for name, tensor in mixed.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.75 * old[name] + 0.25 * new[name])
        else:
            assert torch.equal(tensor, new[name])
    whole = blended(start, tuned, 1.0).state_dict()
    assert all(torch.equal(tensor, new[name]) for name, tensor in whole.items())


def blend(share: float, worst: float) -> Blend:
    return Blend(share=share, gain=share, worst=worst, whose="birch")


TENTHS = [place / 10 for place in range(10, 0, -1)]


@pytest.mark.parametrize(
    ("losing_above", "asked"),
    [
        (1.0, [1.0]),
        (0.9, [1.0, 0.5, 0.7, 0.8, 0.9]),
        (0.4, [1.0, 0.5, 0.2, 0.3, 0.4]),
        (0.1, [1.0, 0.5, 0.2, 0.1]),
    ],
)
def test_the_largest_share_at_which_nobody_loses_is_found_by_halves(
    losing_above: float, asked: list[float]
):
    def measure(share: float) -> Blend:
        return blend(share, -0.01 if share <= losing_above else -0.02)

    chosen, seen = choose(TENTHS, measure, least=-0.01)
    assert chosen.share == losing_above
    assert [each.share for each in seen] == asked


@pytest.mark.parametrize("number", range(1, 12))
def test_a_dry_run_knows_how_many_shares_are_looked_at(number: int):
    shares = list(range(number, 0, -1))
    lengths = [
        len(choose(shares, lambda share: blend(share, -share), least=-limit)[1])
        for limit in range(number + 1)
    ]
    assert max(lengths) == most_measured(number)


def test_where_somebody_loses_in_all_blends_the_smallest_loss_is_taken():
    worst = {1.0: -0.06, 0.75: -0.03, 0.5: -0.02, 0.25: -0.03}
    chosen, seen = choose(list(worst), lambda share: blend(share, worst[share]), least=-0.01)
    assert chosen.share == 0.5
    assert [each.share for each in seen] == [1.0, 0.5, 0.25]


def test_each_tenant_has_rows_up_to_the_number_spread_over_its_own(
    target32: Target,
    answer_rows: Callable[..., list[FeatureRow]],
    write_split: Callable[..., FeatureStore],
    tmp_path: Path,
):
    tenants = ["alder"] * 7 + ["birch"] * 2 + [None]
    rows = answer_rows(target32, [5] * len(tenants))
    named = [replace(row, tenant=name) for row, name in zip(rows, tenants, strict=True)]
    store = write_split(tmp_path / "rows", named)
    some = some_of_each_tenant(store, 3)
    assert isinstance(some, ChosenRows)
    places = [store.lines.index(line) for line in some.lines]
    assert places == [0, 2, 4, 7, 8, 9]


@pytest.mark.parametrize("blends", ["[]", "[0]", "[1.5]", "[0.5,0.5]"])
def test_senseless_shares_are_refused(blends: str):
    with pytest.raises(ValueError, match=r"tune\.blends"):
        compose(["recipe=smollm2", f"tune.blends={blends}"])
