import numpy as np
import pytest

from dflash_inference.paired_gains import paired_gains
from dflash_inference.statistics import RequestSums, paired_difference, relative_difference
from dflash_inference.trace import DecodeTrace
from tests.test_inference.conftest import invent_trace

SIZES = {"h:a": 80, "h:b": 60, "h:c": 20, "h:d": 15}


def replayed(rates: dict[str, float], seed: int = 0) -> list[DecodeTrace]:
    generator = np.random.default_rng(seed)
    return [
        invent_trace(f"{tenant}-{number}", generator, group=tenant, rate=rates[tenant])
        for tenant, size in SIZES.items()
        for number in range(size)
    ]


OLD = replayed(dict.fromkeys(SIZES, 0.4), seed=1)


def test_the_whole_window_comes_first_then_tenants_by_size_then_the_small_ones_together():
    gains = paired_gains("traffic", new=OLD, old=OLD, fewest_requests=50, resamples=100, seed=0)
    assert [(gain.name, gain.difference.num_requests) for gain in gains] == [
        ("traffic", 175),
        ("traffic, tenant h:a", 80),
        ("traffic, tenant h:b", 60),
        ("traffic, 2 small tenants", 35),
    ]
    assert all(gain.difference.value == 0 for gain in gains)
    assert all(gain.difference.interval.low == gain.difference.interval.high == 0 for gain in gains)


def test_a_gain_here_and_a_loss_there_are_both_seen():
    new = replayed({"h:a": 0.7, "h:b": 0.1, "h:c": 0.4, "h:d": 0.4}, seed=2)
    gains = paired_gains("traffic", new=new, old=OLD, fewest_requests=50, resamples=500, seed=0)
    whole, winner, loser, others = gains
    assert winner.difference.interval.low > 0.2
    assert loser.difference.interval.high < -0.2
    assert others.difference.interval.low < 0 < others.difference.interval.high
    assert loser.difference.value < whole.difference.value < winner.difference.value
    assert winner.new / winner.old - 1 == pytest.approx(winner.difference.value)


def test_a_window_of_one_tenant_has_no_parts_and_an_empty_one_no_gain():
    one = [trace for trace in OLD if trace.group == "h:a"]
    gains = paired_gains("traffic", new=one, old=one, fewest_requests=50, resamples=10, seed=0)
    assert [gain.name for gain in gains] == ["traffic"]
    assert paired_gains("earlier", new=[], old=[], fewest_requests=50, resamples=10, seed=0) == []


def test_replays_of_other_answers_are_refused():
    with pytest.raises(ValueError, match="of different answers"):
        paired_gains("traffic", new=OLD[1:], old=OLD, fewest_requests=50, resamples=10, seed=0)


def test_a_relative_difference_is_zero_where_the_absolute_one_is_and_of_its_sign():
    sums = RequestSums.of(OLD)
    assert relative_difference(sums, sums, resamples=50, seed=0).interval.high == 0
    for seed in range(5):
        other = RequestSums.of(replayed(dict.fromkeys(SIZES, 0.42), seed=seed))
        absolute = paired_difference(other, sums, resamples=400, seed=0)
        relative = relative_difference(other, sums, resamples=400, seed=0)
        assert (relative.interval.low > 0) == (absolute.interval.low > 0)
        assert (relative.interval.high < 0) == (absolute.interval.high < 0)
        assert np.sign(relative.value) == np.sign(absolute.value)
