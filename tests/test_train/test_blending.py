"""How much of a tuning its candidate takes over: the mixture, the choice, the rows behind it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dflash_train.config import compose
from dflash_train.features.mixed_rows import ChosenRows
from dflash_train.features.store import FeatureRow, FeatureStore
from dflash_train.features.target import Target
from dflash_train.stages.tune.blending import Blend, blended, choose, some_of_each_tenant
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


def test_the_first_blend_at_which_nobody_loses_is_taken_and_no_other_is_measured():
    asked: list[float] = []

    def measured() -> Iterator[Blend]:
        for each in (blend(1, -0.06), blend(0.75, -0.02), blend(0.5, -0.01), blend(0.25, 0.01)):
            asked.append(each.share)
            yield each

    chosen, seen = choose(measured(), least=-0.01)
    assert chosen.share == 0.5
    assert asked == [each.share for each in seen] == [1, 0.75, 0.5]


def test_where_somebody_loses_in_all_blends_the_smallest_loss_is_taken():
    blends = [blend(1, -0.06), blend(0.75, -0.02), blend(0.5, -0.03)]
    chosen, seen = choose(blends, least=-0.01)
    assert chosen.share == 0.75
    assert seen == blends


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
