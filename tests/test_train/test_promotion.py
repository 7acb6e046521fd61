from dataclasses import replace

import pytest

from dflash_train.release.promotion import Gain, PromotionRule, judge

RULE = PromotionRule(
    min_requests=100, tenant_margin=0.02, fewest_requests=50, resamples=10_000, seed=0
)


def gain(name: str, relative: float, *, spread: float = 0.01, num_requests: int = 200) -> Gain:
    return Gain(
        name=name,
        num_requests=num_requests,
        incumbent=2.0,
        candidate=2.0 * (1 + relative),
        relative=relative,
        low=relative - spread,
        high=relative + spread,
    )


BETTER = gain("traffic", 0.15)


def test_a_candidate_that_gains_and_hurts_nobody_is_promoted():
    verdict = judge(RULE, traffic=BETTER, tenants=[gain("a", 0.2)], failed_checks=[])
    assert verdict.is_promoted
    assert verdict.reasons == verdict.remarks == []


def test_a_tie_promotes_nothing():
    for traffic, word in (
        (gain("traffic", 0.01, spread=0.02), "ties"),
        (gain("traffic", 0.0, spread=0.0), "ties"),
        (gain("traffic", -0.05), "loses"),
    ):
        verdict = judge(RULE, traffic=traffic, tenants=[], failed_checks=[])
        assert not verdict.is_promoted
        assert verdict.reasons[0].startswith(f"it {word} over the whole traffic")


def test_a_candidate_that_is_better_on_average_is_refused_for_one_tenant_beyond_the_margin():
    tenants = [gain("winner", 0.3), gain("loser", -0.05)]
    verdict = judge(RULE, traffic=BETTER, tenants=tenants, failed_checks=[])
    assert not verdict.is_promoted
    assert len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith("loser loses more than 2.0%")


@pytest.mark.parametrize(
    ("relative", "spread"),
    [(-0.015, 0.005), (-0.05, 0.06)],
    ids=["within the margin", "within chance"],
)
def test_a_loss_within_the_margin_or_within_chance_refuses_nobody(relative: float, spread: float):
    tenants = [gain("winner", 0.3), gain("other", relative, spread=spread)]
    assert judge(RULE, traffic=BETTER, tenants=tenants, failed_checks=[]).is_promoted


def test_a_tenant_that_may_lose_within_chance_is_named():
    tenants = [gain("winner", 0.3), gain("other", -0.05, spread=0.06)]
    verdict = judge(RULE, traffic=BETTER, tenants=tenants, failed_checks=[])
    assert [remark.split(" may lose")[0] for remark in verdict.remarks] == ["other"]


def test_too_few_requests_of_a_tenant_make_no_claim_and_are_named():
    tenants = [gain("winner", 0.3), gain("tiny", -0.5, num_requests=49)]
    verdict = judge(RULE, traffic=BETTER, tenants=tenants, failed_checks=[])
    assert verdict.is_promoted
    assert verdict.remarks == ["tiny is not judged: 49 requests, fewer than 50 make no claim"]


def test_a_window_of_too_few_requests_promotes_nothing():
    few = replace(BETTER, num_requests=99)
    verdict = judge(RULE, traffic=few, tenants=[], failed_checks=[])
    assert verdict.reasons == ["the newest window has 99 requests, fewer than 100"]


def test_a_failed_check_of_the_doctor_promotes_nothing():
    verdict = judge(RULE, traffic=BETTER, tenants=[], failed_checks=["taps", "rope"])
    assert verdict.reasons == ["the doctor's checks failed: taps, rope"]


def test_any_changed_number_of_the_rule_changes_its_hash():
    others = [
        replace(RULE, min_requests=101),
        replace(RULE, tenant_margin=0.03),
        replace(RULE, fewest_requests=60),
        replace(RULE, resamples=100),
        replace(RULE, seed=1),
    ]
    assert len({RULE.hash, *(other.hash for other in others)}) == 1 + len(others)
