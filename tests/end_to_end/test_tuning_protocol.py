"""The tuning protocol on a tiny random target: every run of it happens, figures mean nothing."""

import json

import pytest

from benchmarks.bench_tune import main, measure
from benchmarks.tune_logs import Call, spread_over_time, write_logs
from benchmarks.tune_runs import FLEET, SETS, Protocol, Way
from dflash_train.records.manifest import Manifest
from dflash_train.release.registry import Registry
from dflash_train.testing import MASK_TOKEN_ID, save_tiny_target

NUM_STEPS = 2


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    """Write short logs for every tenant of both sets, without answers."""
    out = tmp_path_factory.mktemp("tuning")
    protocol = Protocol(
        out=out / "bench",
        minutes=20,
        generic_minutes=15,
        replay_share=0.3,
        generic={},
        num_steps=NUM_STEPS,
        overrides=(
            f"target.name_or_path={save_tiny_target(out / 'target')}",
            f"drafter.mask_token_id={MASK_TOKEN_ID}",
            "drafter.num_hidden_layers=2",
            "drafter.num_taps=2",
            "data.max_new_tokens=24",
            f"training.max_steps={NUM_STEPS}",
            "training.minutes=null",
            "training.num_anchors=8",
            "training.validate_every=2",
            "tune.min_requests=50",
            "evaluate.resamples=200",
            "launch.num_threads=1",
        ),
    )
    for tenants in SETS.values():
        for tenant in tenants.tenants:
            calls = [
                Call(
                    tenant=tenant,
                    session=f"{tenant}-{number}",
                    messages=[{"role": "user", "content": f"{tenant} asks {number} " * 2}],
                )
                for number in range(16)
            ]
            write_logs(protocol.logs / tenants.name, spread_over_time(calls, seed=0))
    return protocol


@pytest.mark.slow  # seven runs of all stages
def test_each_tuning_measures_its_tenant_and_everybody_else_and_is_resumed(
    protocol: Protocol, capsys: pytest.CaptureFixture[str]
):
    words = [
        "--out", str(protocol.out), "--sets", "fleet", "--steps", str(NUM_STEPS),
        *protocol.overrides,
    ]  # fmt: skip
    assert main(words) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["sets"]["fleet"]
    assert figures["num_steps"] == NUM_STEPS
    runs = protocol.out / "runs"
    for tenant in FLEET.tuned:
        trained = {}
        for way in Way:
            found = figures["tuned"][tenant][way]
            assert found["gain"]["num_requests"] == 4
            # All but the own tenant: four others of the fleet, two of the prompts; 4 calls or 5.
            others = found["others"]
            assert sum(gain["num_requests"] for gain in others) >= 4 * (len(SETS) * 3)
            manifest = Manifest.read(runs / f"fleet-{tenant}-{way.run}" / "checkpoint")
            assert manifest is not None
            trained[way] = manifest.details["training_rows"]
        assert trained[Way.replayed] == trained[Way.blended] > trained[Way.alone]
        blends = {
            way: json.loads((runs / f"fleet-{tenant}-{way.run}/blend/blends.json").read_bytes())
            for way in (Way.alone, Way.blended)
        }
        assert (blends[Way.alone]["share"], blends[Way.alone]["measured"]) == (1.0, [])
        assert blends[Way.blended]["measured"]
    assert set(figures["both"]["over_one_each"]) == set(FLEET.tuned)
    roles = {
        name: Registry(protocol.out / "registries" / name).roles.current
        for name in ("fleet-code-tour-alone", "fleet-pair-replayed")
    }
    assert len(set(roles.values())) == 1, "all begin with the same drafter"
    done = {path: path.stat().st_mtime_ns for path in runs.rglob("manifest.json")}
    assert measure(protocol, FLEET) == figures
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("manifest.json")} == done
