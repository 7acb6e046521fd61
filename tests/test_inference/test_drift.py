import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from rich.console import Console

from benchmarks.bench_drift import first_alarm, read_measured, resampled, settings
from dflash_inference.drift import alarm
from dflash_inference.drift.alarm import Rules, Watched, watch
from dflash_inference.drift.findings import Drift, find_drift
from dflash_inference.drift.payback import Payback, weigh
from dflash_inference.drift.shares import Division, Estimate, divide_change
from dflash_inference.drift.table import payback_sentence, print_drift
from dflash_inference.drift.traced import rows_of_traces
from dflash_inference.statistics import Interval
from dflash_inference.trace import DecodeTrace, StepTrace, write_traces
from dflash_train.config import DriftConfig, EvaluateConfig, PromptKind
from dflash_train.records.served import SERVED_ROW, Rows, ServedRows

RULES = Rules(false_alarm=0.01, fall=0.1, half_life=10_000)
FEW = EvaluateConfig(resamples=200)
WITHIN = 200
"""Two per cent of the 10,000 requests after the fall."""


def gaussian(
    num_rows: int, *, seed: int, spread: float = 0.2, fall_at: int | None = None, fall: float = 0.1
) -> np.ndarray:
    lengths = 0.7 + spread * np.random.default_rng(seed).standard_normal(num_rows)
    if fall_at is not None:
        lengths[fall_at:] += math.log(1 - fall)
    return lengths


def watched(lengths: np.ndarray, num_reference: int, rules: Rules = RULES) -> Watched:
    return watch(lengths, np.zeros(len(lengths), np.int64), num_reference, rules)


# Noticing


@pytest.mark.parametrize("name", ["fleet", "gsm8k"])
@pytest.mark.parametrize("fall", ["slower", "other"])
def test_a_fall_of_ten_percent_is_noticed_within_two_percent_of_the_requests_after_it(
    name: str, fall: str
):
    measured = read_measured()[name]
    for seed in range(4):
        log = resampled(measured, num_requests=20_000, fall=fall, seed=seed)
        found = first_alarm(log, settings())
        assert found is not None
        assert 10_000 <= found < 10_000 + WITHIN


@pytest.mark.parametrize("name", ["fleet", "gsm8k"])
def test_no_undisturbed_log_raises_an_alarm(name: str):
    measured = read_measured()[name]
    logs = (resampled(measured, num_requests=20_000, fall=None, seed=each) for each in range(20))
    assert [first_alarm(log, settings()) for log in logs] == [None] * 20


def test_the_sum_over_all_starts_is_the_sum_over_all_starts():
    evidence = np.random.default_rng(0).standard_normal(40)
    weights = alarm._log_prior(40, 7)
    want = [
        sum(math.exp(weights[j] + evidence[j : n + 1].sum()) for j in range(n + 1))
        for n in range(40)
    ]
    got = np.exp(alarm._log_sum_over_starts(evidence, weights))
    np.testing.assert_allclose(got, want, rtol=1e-10)


def test_the_prior_sums_to_one_and_half_of_it_lies_before_the_half_life():
    shares = np.exp(alarm._log_prior(1_000_000, 500))
    assert shares.sum() == pytest.approx(1, abs=1e-3)
    assert shares[:500].sum() == pytest.approx(0.5)


def test_a_factor_of_evidence_has_mean_one_over_a_skewed_reference():
    lengths = np.random.default_rng(1).gamma(0.5, 0.3, 3000)
    groups = np.arange(3000) % 3
    past = alarm._Reference(lengths, groups)
    assert past.dependence == 1
    assert np.exp(past.evidence(lengths, groups, 0.1)).mean() == pytest.approx(1)


def test_cells_that_are_rare_share_what_is_usual():
    cells = np.repeat([5, 6, 7, 8, 9], [40, 20, 20, 3, 50])
    groups = alarm._grouped(cells, 83)
    assert len(set(groups[:40])) == 1
    assert len(set(groups[40:83])) == 1
    assert groups[0] != groups[40]
    assert set(groups[83:]) == {alarm.UNKNOWN}


def test_false_alarms_stay_below_what_was_asked_for_whatever_the_size_of_the_reference():
    rules = replace(RULES, false_alarm=0.1)
    for num_reference in (100, 400, 2000):
        found = [watched(gaussian(6000, seed=seed), num_reference, rules) for seed in range(150)]
        alarms = sum(each.alarm is not None for each in found)
        assert alarms <= 0.1 * 150 + 3 * math.sqrt(0.09 * 150)


def test_neighbours_that_are_alike_raise_no_false_alarm_and_are_noticed():
    generator = np.random.default_rng(2)
    alarms = 0
    for _ in range(30):
        sessions = np.repeat(generator.standard_normal(400), 25)
        lengths = 0.7 + 0.15 * sessions + 0.15 * generator.standard_normal(10_000)
        found = watched(lengths, 4000)
        alarms += found.alarm is not None
        assert found.dependence > 5
    assert alarms <= 1
    assert watched(gaussian(10_000, seed=3), 4000).dependence == 1


def test_a_request_a_thousand_times_longer_than_others_decides_nothing():
    log = resampled(read_measured()["gsm8k"], num_requests=20_000, fall=None, seed=1)
    log.rows["tokens"][9000] *= 1000
    log.rows["steps"][9000] *= 1200
    assert first_alarm(log, settings()) is None


def test_the_onset_lies_near_the_beginning_of_the_fall():
    onsets = []
    for seed in range(20):
        found = watched(gaussian(8000, seed=seed, fall_at=6000), 4000).alarm
        assert found is not None
        onsets.append(found.onset)
    assert abs(np.median(onsets) - 2000) < 10


def test_a_small_reference_looks_for_larger_falls_and_finds_them():
    lengths = gaussian(3000, seed=4, spread=0.4, fall_at=1500, fall=0.5)
    found = watched(lengths, 300)
    assert found.fall is not None
    assert found.fall > 0.15
    assert found.alarm is not None
    assert watched(lengths[:40], 20).fall is None


def test_cells_that_the_reference_does_not_have_tell_nothing():
    lengths = gaussian(3000, seed=5)
    cells = np.zeros(3000, np.int64)
    cells[2000:], lengths[2000:] = 1, 0.1
    found = watch(lengths, cells, 1000, RULES)
    assert (found.num_unknown, found.alarm) == (1000, None)


# Shares


def rows_of(*groups: tuple[int, int, float, int], seed: int = 0, noise: float = 0.2) -> Rows:
    """Make rows of groups (tenant, kind, acceptance length, number), shuffled."""
    generator = np.random.default_rng(seed)
    found = []
    for tenant, kind, length, number in groups:
        tokens = generator.integers(20, 200, number).astype(float)
        steps = tokens / length * np.exp(noise * generator.standard_normal(number))
        rows = np.zeros(number, SERVED_ROW)
        rows["tenant"], rows["template"] = tenant, kind
        rows["tokens"], rows["steps"] = tokens, steps
        found.append(rows)
    rows = np.concatenate(found)
    rows["moment"] = rows["decode_s"] = rows["temperature"] = np.nan
    return generator.permutation(rows)


def divided(before: Rows, now: Rows) -> Division:
    kinds = (before["template"].astype(np.int64), now["template"].astype(np.int64))
    return divide_change(before, now, kinds, resamples=200, seed=0)


def pooled(rows: Rows) -> float:
    return rows["tokens"].sum() / rows["steps"].sum()


def test_the_parts_add_up_exactly_whatever_happened():
    before = rows_of((0, 1, 2.0, 300), (0, 2, 3.0, 50), (1, 1, 4.0, 100), (2, 5, 1.5, 90), seed=1)
    now = rows_of((0, 1, 1.7, 100), (0, 3, 2.0, 80), (1, 1, 4.4, 7), (3, 9, 2.5, 200), seed=2)
    found = divided(before, now)
    parts = (found.tenant_mix, found.kind_mix, found.content)
    assert sum(part.value for part in parts) == pytest.approx(found.change.value, abs=1e-12)
    assert found.change.value == pytest.approx(pooled(now) - pooled(before), abs=1e-12)
    for name in ("tenant_mix", "kind_mix", "content"):
        by_tenant = sum(getattr(tenant, name) for tenant in found.tenants)
        assert by_tenant == pytest.approx(getattr(found, name).value, abs=1e-12)


def test_other_shares_of_the_same_tenants_are_mix_of_tenants():
    before = rows_of((0, 0, 4.0, 900), (1, 0, 2.0, 300))
    now = rows_of((0, 0, 4.0, 300), (1, 0, 2.0, 900), seed=1)
    found = divided(before, now)
    assert found.change.value < -0.5
    assert found.share_of(found.tenant_mix) == pytest.approx(1, abs=0.1)
    assert found.content.interval.low < 0 < found.content.interval.high


def test_other_shares_of_the_same_prompts_are_mix_of_kinds():
    before = rows_of((0, 1, 4.0, 900), (0, 2, 2.0, 300))
    now = rows_of((0, 1, 4.0, 300), (0, 2, 2.0, 900), seed=1)
    found = divided(before, now)
    assert found.share_of(found.kind_mix) == pytest.approx(1, abs=0.1)
    assert found.tenant_mix.value == pytest.approx(0, abs=1e-12)


def test_other_text_of_the_same_prompts_is_content_and_names_its_tenant():
    before = rows_of((0, 0, 4.0, 600), (1, 0, 2.0, 600))
    now = rows_of((0, 0, 3.0, 600), (1, 0, 2.0, 600), seed=1)
    found = divided(before, now)
    assert found.share_of(found.content) == pytest.approx(1, abs=0.15)
    by_tenant = {tenant.tenant: tenant for tenant in found.tenants}
    assert by_tenant[0].content < -0.2
    assert abs(by_tenant[1].content) < 0.05


def test_a_tenant_that_came_or_went_is_mix():
    found = divided(rows_of((0, 0, 3.0, 500)), rows_of((0, 0, 3.0, 500), (1, 0, 1.5, 500), seed=1))
    assert found.share_of(found.tenant_mix) == pytest.approx(1, abs=0.1)
    (new,) = (tenant for tenant in found.tenants if tenant.tenant == 1)
    assert (new.reference, new.content) == (None, 0)


def test_tenants_too_small_to_be_compared_are_compared_together():
    many = [(tenant, 0, 3.0, 15) for tenant in range(10)]
    fewer = [(tenant, 0, 2.5, 15) for tenant in range(10)]
    found = divided(rows_of(*many), rows_of(*fewer, seed=1))
    assert [tenant.tenant for tenant in found.tenants] == [-1]
    assert found.content.value == pytest.approx(found.change.value, abs=1e-12)


def test_a_change_that_may_be_chance_is_not_divided():
    found = divided(rows_of((0, 0, 3.0, 200)), rows_of((0, 0, 3.0, 200), seed=1))
    assert found.share_of(found.content) is None


def test_intervals_hold_what_they_promise():
    held = 0
    for seed in range(60):
        before = rows_of((0, 0, 3.0, 150), (1, 0, 2.0, 150), seed=2 * seed, noise=0.3)
        now = rows_of((0, 0, 2.7, 150), (1, 0, 1.8, 150), seed=2 * seed + 1, noise=0.3)
        interval = divided(before, now).relative.interval
        held += interval.low <= -0.1 <= interval.high
    assert held >= 50  # 57 are expected, 50 or fewer come one time in 500


# Payback


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, interval=Interval(low=low, high=high))


def weighed(config: DriftConfig, *, content: Estimate, has_fallen: bool = True) -> Payback:
    return weigh(
        config, tokens_per_day=36e6, tpot_ms=None, content_of_steps=content, has_fallen=has_fallen,
        planned_hours=lambda: 6.0,
    )  # fmt: skip


def test_payback_is_the_arithmetic_of_the_guide():
    priced = DriftConfig(
        tpot_ms=10, requests_at_once=4, run_price_per_hour=30, serving_price_per_hour=3
    )
    found = weighed(priced, content=estimate(0.2, 0.1, 0.3))
    # 36e6 tokens x 10 ms / 4 = 25 server hours a day, of which a fifth comes from content.
    assert found.gain is not None
    assert found.saved_hours_per_day is not None
    assert found.days is not None
    assert found.gain.value == pytest.approx(0.25)
    assert found.saved_hours_per_day.value == pytest.approx(5)
    assert found.cost == 180
    assert found.days.value == pytest.approx(180 / 15)
    assert found.days.interval.low == pytest.approx(180 / 22.5)
    assert "Tuning pays after 12 days" in payback_sentence(found)


def test_a_gain_that_may_be_none_may_never_pay():
    found = weighed(DriftConfig(tpot_ms=10), content=estimate(0.1, -0.1, 0.3))
    assert found.days is not None
    assert found.days.interval.high == math.inf
    assert "never" in payback_sentence(found)


def test_what_is_not_known_is_named_and_nothing_is_guessed():
    found = weighed(DriftConfig(), content=estimate(0.1, 0, 0.2), has_fallen=False)
    assert found.days is None
    assert found.missing == ["drift.tpot_ms", "drift.gain", "drift.run_hours"]
    given = weighed(DriftConfig(gain=0.15, tpot_ms=8), content=estimate(0, 0, 0), has_fallen=False)
    assert (given.missing, given.gain_from) == ([], "drift.gain")


# All together


def drift_of(served: ServedRows, **settings: Any) -> Drift:
    return find_drift(served, config=DriftConfig(**settings), evaluate=FEW)


def shown(drift: Drift) -> str:
    text = io.StringIO()
    print_drift(drift, Console(width=130, file=text))
    return text.getvalue()


def test_a_fall_of_one_tenant_is_told_with_its_name_its_time_and_its_share():
    log = resampled(read_measured()["fleet"], num_requests=8000, fall=None, seed=0)
    fallen = log.rows["tenant"] == log.tenants.index("humaneval")
    fallen &= np.arange(8000) >= 5000
    log.rows["steps"][fallen] *= 1.3
    found = drift_of(log, reference_requests=3000)
    assert found.has_fallen
    alarmed = {stream.name for stream in found.streams if stream.has_fallen}
    assert "humaneval" in alarmed
    assert not alarmed & {f"tenant-{number}" for number in range(1, 6)}
    stream = found.stream_of("humaneval")
    assert stream is not None
    assert stream.onset_row == pytest.approx(5000, abs=30)
    assert stream.alarm_at is not None
    assert stream.alarm_at.startswith("1970-01-01T1")
    assert found.division is not None
    assert found.division.share_of(found.division.content) == pytest.approx(1, abs=0.25)
    text = shown(found)
    assert "humaneval" in text
    assert "Verdict: fell" in text
    plain = orjson.loads(orjson.dumps(found.as_json()))
    assert plain["verdict"] == "fell"
    assert plain["division"]["tenants"][0]["name"] in log.tenants


def test_a_fall_by_mix_alone_is_noticed_and_no_tenant_is_blamed():
    measured = read_measured()["fleet"]
    log = resampled(measured, num_requests=12_000, fall=None, seed=1)
    low = measured.only(measured.tenants == measured.names.index("humaneval"))
    late = resampled(low, num_requests=12_000, fall=None, seed=2)
    log.rows[6000::2] = late.rows[6000::2]
    log.rows["moment"] = np.arange(12_000)
    found = drift_of(log, kinds=[])
    assert [stream.name for stream in found.streams if stream.has_fallen] == ["traffic"]
    assert found.division is not None
    assert found.division.share_of(found.division.tenant_mix) == pytest.approx(1, abs=0.15)


def test_system_prompts_that_are_new_each_time_do_not_hide_a_fall():
    log = resampled(read_measured()["gsm8k"], num_requests=8000, fall="slower", seed=3)
    log.rows["template"] = np.arange(1, 8001)
    found = drift_of(log, reference_requests=3000, kinds=[PromptKind.template])
    assert found.streams[0].has_fallen
    assert found.streams[0].watched.num_unknown == 0


def test_few_requests_make_no_claim_and_show_their_length():
    log = resampled(read_measured()["gsm8k"], num_requests=60, fall=None, seed=0)
    found = drift_of(log)
    assert (found.verdict, found.division) == ("too few requests", None)
    assert "2." in shown(found)
    with pytest.raises(ValueError, match="none of 5 requests"):
        drift_of(ServedRows(rows=log.rows[:0], tenants=[], read=5))


def test_counts_of_positions_are_compared_where_a_server_has_them():
    log = resampled(read_measured()["gsm8k"], num_requests=400, fall=None, seed=0)
    kept = log.rows["steps"][:, None] * np.array([[0.8, 0.5]])
    kept[200:, 1] /= 2
    found = drift_of(replace(log, accepted_at=kept, unit="intervals"), reference_requests=200)
    assert found.positions is not None
    assert found.positions[0] == pytest.approx([0.8, 0.5])
    assert found.positions[1] == pytest.approx([0.8, 0.25])
    assert "Steps that kept their i-th draft" in shown(found)


def test_our_traces_are_rows_in_their_order(tmp_path: Path):
    def trace(name: str, accepted: list[int]) -> DecodeTrace:
        steps = [
            StepTrace(start=place, width=8, num_accepted=number, committed=number + 1)
            for place, number in enumerate(accepted)
        ]
        return DecodeTrace(
            id=name, group="desk", prompt_length=9, block_size=8, output_ids=[1], steps=steps,
            finish_reason="stop",
        )  # fmt: skip

    path = tmp_path / "calls.jsonl"
    write_traces(path, [trace("b", [1, 2]), trace("a", [0]), trace("c", [])])
    served = rows_of_traces([str(path)])
    assert served.rows["tokens"].tolist() == [5, 1]
    assert served.rows["steps"].tolist() == [2, 1]
    assert served.tenants == ["desk"]
