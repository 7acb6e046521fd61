from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench_tune import Others, main, summary, table
from benchmarks.tune_runs import FLEET, OTHER, PROMPTS, SETS, Protocol, own_run


def gain(name: str, relative: float, *, low: float | None = None, num: int = 300) -> dict[str, Any]:
    return {
        "name": name,
        "num_requests": num,
        "incumbent": 2.0,
        "candidate": 2.0 * (1 + relative),
        "relative": relative,
        "low": relative - 0.02 if low is None else low,
        "high": relative + 0.02,
    }


def verdict(*gains: dict[str, Any]) -> dict[str, Any]:
    return {"verdict": "promoted", "gains": list(gains)}


EARLIER = gain("earlier runs", 0.03)


def test_goals_are_the_tuned_tenants_gain_and_everybody_elses_loss():
    good = summary(
        verdict(gain("traffic", 0.2), EARLIER, gain("earlier runs, tenant b", -0.01, num=60))
    )
    assert all(good["met"].values())
    assert [each["name"] for each in good["others"]] == ["earlier runs, tenant b"]
    cases = {
        "gain": gain("traffic", 0.14, low=0.1),
        "gain_low": gain("traffic", 0.16, low=0.04),
        "num_requests": gain("traffic", 0.2, num=199),
    }
    for goal, own in cases.items():
        met = summary(verdict(own, EARLIER, gain("earlier runs, tenant b", 0.0)))["met"]
        assert [name for name, is_met in met.items() if not is_met] == [goal]


def test_one_who_loses_is_not_hidden_by_those_who_gain():
    found = summary(
        verdict(
            gain("traffic", 0.2),
            gain("earlier runs", 0.1),
            gain("earlier runs, tenant b", 0.3),
            gain("earlier runs, tenant c", -0.05),
        )
    )
    assert not found["met"]["loss"]
    assert Others(gains=found["others"]).worst["name"] == "earlier runs, tenant c"


def test_a_single_other_tenant_is_counted_too():
    found = summary(verdict(gain("traffic", 0.2), gain("earlier runs", -0.03)))
    assert not found["met"]["loss"]


def test_the_table_has_a_row_for_each_tuning_and_names_the_loser():
    kinds = {
        kind: summary(verdict(gain("traffic", 0.2), gain("earlier runs, tenant b", loss)))
        for kind, loss in (("alone", -0.1), ("replayed", 0.0))
    }
    figures = {"tuned": {"a": kinds}, "both": {"gains": [gain("traffic, tenant a", 0.1)]}}
    lines = table("fleet", figures).splitlines()
    assert len(lines) == 5
    assert "fleet: a, alone" in lines[2]
    assert "b | -10.0% (-12.0% to -8.0%)" in lines[2]


def test_each_set_begins_with_a_drafter_that_has_seen_none_of_its_tenants(tmp_path: Path):
    protocol = Protocol(
        out=tmp_path,
        minutes=20,
        generic_minutes=15,
        replay_share=0.3,
        generic={},
        num_steps=None,
        overrides=("training.num_anchors=8",),
    )
    for tenants in SETS.values():
        assert not set(tenants.tenants) & set(OTHER[tenants.name].tenants)
        config = own_run(protocol, tenants)
        assert config.training.minutes == 15
        assert config.training.max_steps is None
        assert config.training.num_anchors == 8
        assert config.data.max_new_tokens == tenants.max_new_tokens
    assert OTHER == {"fleet": PROMPTS, "prompts": FLEET}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--generic", "fleet"], r"--generic \(=fleet\) must be SET=DIR"),
        (["--generic", "desk=x"], "SET one of fleet, prompts"),
        (["training.minute=3"], "training.minute"),
    ],
)
def test_a_wrong_word_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert message.replace("\\", "") in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()
