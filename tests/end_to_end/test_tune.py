"""A drafter tuned on one tenant's traffic, by the commands that a user types, on a tiny target.

Two tenants ask four questions each, over and over. The serving drafter knows birch's answers; the
new log is alder's, and birch comes back in its newest window. Tuned on alder alone the drafter
forgets birch; with rows of the earlier run among the new ones it does not.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dflash_train.cli import main
from dflash_train.drafter.checkpoint import drafter_hash
from dflash_train.release.registry import Registry
from dflash_train.stages.tune.judging import VERDICT_NAME

START, HOUR = 1_792_000_800, 3600
QUESTIONS = {
    "alder": ["red fox", "old boat", "nine bells", "dry ink"],
    "birch": ["wet stone", "blue jar", "tin roof", "soft wool"],
}
MASK_TOKEN_ID = 15
"""No answer of the tiny target to these questions holds it, which the doctor demands."""
NUM_ALDER, NUM_BIRCH = 330, 54


def call(tenant: str, number: int, hour: float) -> str:
    question = QUESTIONS[tenant][number % 4]
    request = {"user": tenant, "messages": [{"role": "user", "content": question}]}
    created = START + int(hour * HOUR)
    line = {"id": f"{tenant}-{number}", "created": created, "request": request, "response": None}
    return json.dumps(line) + "\n"


def write_logs(folder: Path) -> None:
    """Write birch's past, and alder's traffic with birch in its newest window."""
    past = [call("birch", 1000 + number, number) for number in range(200)]
    (folder / "past.jsonl").write_text("".join(past))
    new = [call("alder", number, number) for number in range(NUM_ALDER)]
    new += [call("birch", number, NUM_ALDER - 50 + number / 2) for number in range(NUM_BIRCH)]
    (folder / "new.jsonl").write_text("".join(new))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_target_folder: Path) -> Path:
    """A folder with the logs and a finished run on birch's; no registry yet."""
    folder = tmp_path_factory.mktemp("served")
    write_logs(folder)
    shutil.copytree(tiny_target_folder, folder / "target")
    (folder / "key").write_text("0123456789abcdef" * 2)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for stage in ("ingest", "regenerate", "collect", "train"):
            words = ["name=old", "data.logs=past.jsonl", "training.validate_every=100"]
            assert main([stage, *SETTINGS, *words]) == 0
    return folder


@pytest.fixture(scope="module")
def alone(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder after a tuning on the new log alone, without replayed rows."""
    folder = Path(shutil.copytree(served, tmp_path_factory.mktemp("alone") / "f", symlinks=True))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert main([*TUNE, "name=alone", "init=runs/old/checkpoint/best"]) == 0
    return folder


@pytest.fixture
def _in_alone(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shutil.copytree(alone, tmp_path / "f", symlinks=True))


RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SETTINGS = [
    "--recipes", str(RECIPES), "recipe=smollm2", "target.name_or_path=target",
    f"drafter.mask_token_id={MASK_TOKEN_ID}", "drafter.num_taps=2", "drafter.num_hidden_layers=2",
    "drafter.block_size=4", "data.max_new_tokens=24", "data.batch_size=16", "data.max_drop_share=1",
    "data.hmac_key_file=key", "training.num_anchors=16", "training.pack_tokens=400",
    "training.log_every=60", "training.save_every=60", "training.head_sample=0",
    "training.max_steps=100", "training.validation_rows=8", "optim.lr=6e-3",
    "evaluate.eval_sets=[]", "evaluate.resamples=500", "launch.num_threads=1",
    "launch.mixed_precision=no",
]  # fmt: skip
TUNE = [
    "tune", *SETTINGS, "data.logs=new.jsonl", "training.validate_every=25", "tune.lr_factor=1",
]  # fmt: skip
TOGETHER = [*TUNE, "name=together", "tune.replay_from=[runs/old]", "tune.replay_share=0.5"]


def verdict_of(name: str) -> dict[str, Any]:
    return json.loads((Path("runs") / name / "tuning" / VERDICT_NAME).read_bytes())


def gains_of(name: str) -> dict[str, dict[str, Any]]:
    """Give the gains over all and by tenant; its number of requests tells birch."""
    return {
        "birch" if gain["num_requests"] == NUM_BIRCH else gain["name"]: gain
        for gain in verdict_of(name)["gains"]
    }


@pytest.mark.usefixtures("_in_alone")
def test_a_candidate_that_is_better_on_average_is_refused_for_the_tenant_that_loses(
    capsys: pytest.CaptureFixture[str],
):
    gains, verdict = gains_of("alone"), verdict_of("alone")
    assert gains["traffic"]["low"] > 0.1
    assert gains["birch"]["high"] < -0.1
    assert verdict["verdict"] == "kept"
    (reason,) = verdict["reasons"]
    assert gains["birch"]["name"] in reason
    assert "loses more than 2.0%" in reason
    assert not verdict["doctor"]["failed"]
    registry = Registry(Path("registry"))
    old, best = (
        drafter_hash(Path("runs") / name / "checkpoint" / "best") for name in ("old", "alone")
    )
    roles = registry.roles
    assert (roles.current, roles.candidate, roles.previous) == (old, best, None)

    assert main([*TUNE, "name=alone", "fail_if_kept=true"]) == 3
    assert len(registry.history()) == 3  # adopted, nominated, kept
    out, err = capsys.readouterr()
    *_, line, folder = out.splitlines()
    assert json.loads(line)["rule"] == verdict["rule"]
    assert folder == "runs/alone/tuning"
    assert "tune: complete and unchanged, nothing to do" in err


@pytest.mark.usefixtures("_in_alone")
def test_a_changed_rule_makes_the_verdict_stale_and_the_new_one_says_so(
    capsys: pytest.CaptureFixture[str],
):
    before = verdict_of("alone")["rule"]["hash"]
    assert main([*TUNE, "name=alone", "tune.tenant_margin=0.9", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "train: complete and unchanged, nothing to do" in lines
    assert lines[-1].startswith("tune: two drafters on ")
    assert main([*TUNE, "name=alone", "tune.tenant_margin=0.9"]) == 0
    verdict = verdict_of("alone")
    assert verdict["verdict"] == "promoted"
    assert verdict["rule"]["hash"] != before
    assert verdict["rule"]["judged_before"] == [before]
    assert any("judged 1 time(s) before" in remark for remark in verdict["remarks"])
    registry = Registry(Path("registry"))
    assert registry.roles.current == verdict["candidate"]
    assert main(["rollback", "registry=registry"]) == 0
    assert registry.roles.current == verdict["incumbent"]


@pytest.mark.usefixtures("_in_alone")
def test_replayed_rows_keep_what_others_had_and_the_candidate_is_promoted_once(
    capsys: pytest.CaptureFixture[str],
):
    assert main([*TOGETHER, "--dry-run"]) == 0
    assert "promoted if:" in capsys.readouterr().out
    assert not Path("runs/together").exists()
    assert main(TOGETHER) == 0
    gains, verdict = gains_of("together"), verdict_of("together")
    assert verdict["verdict"] == "promoted", verdict["reasons"]
    assert gains["traffic"]["low"] > 0.1
    assert gains["birch"]["low"] > -0.02
    assert "earlier runs" in gains
    registry = Registry(Path("registry"))
    assert drafter_hash(Path("registry/current")) == verdict["candidate"]
    events = registry.history()
    assert events[-1].kind == "promoted"
    assert events[-1].facts["rule"] == verdict["rule"]["hash"]

    Path("runs/together/tuning/manifest.json").unlink()  # a kill behind the switch
    assert main(TOGETHER) == 0
    assert registry.history() == events
    assert verdict_of("together") == verdict

    capsys.readouterr()
    assert main([*TOGETHER, "tune.lr_factor=0.5"]) == 2
    assert "was promoted at" in capsys.readouterr().err
    assert registry.history() == events


@pytest.mark.usefixtures("_in_alone")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["name=other", "tune.registry=empty"], "has no current drafter yet"),
        (["name=other", "checkpoint=runs/old/checkpoint/best"], "a tuning trains one"),
        (["name=other", "training.patience=2"], "is tune.patience in a tuning"),
        (["name=other", "tune.min_requests=20"], "must be at least 50"),
        (["name=alone", "tune.replay_from=[runs/alone]"], "is the folder of this run"),
        (["name=alone", "tune.replay_from=[runs/none]"], "holds no complete features"),
    ],
)
def test_a_tuning_that_cannot_begin_says_why_and_writes_nothing(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    before = Registry(Path("registry")).history()
    assert main([*TUNE, *words]) == 2
    assert message in capsys.readouterr().err
    assert Registry(Path("registry")).history() == before
    assert not Path("empty").exists()
    assert not Path("runs/other").exists()


@pytest.mark.usefixtures("_in_alone")
def test_where_the_tuned_weights_forget_somebody_the_candidate_takes_a_part_of_them():
    words = ["name=part", "tune.replay_from=[runs/old]", "tune.replay_share=0"]
    assert main([*TUNE, *words]) == 0
    found = json.loads(Path("runs/part/blend/blends.json").read_bytes())
    whole, *parts = found["measured"]
    assert whole["share"] == 1
    assert whole["worst"] < -0.01  # birch, whom the earlier run validates with
    assert parts
    assert all(part["worst"] > whole["worst"] for part in parts)
    allowed = [part["share"] for part in parts if part["worst"] >= -0.01]
    smallest_loss = max(found["measured"], key=lambda each: each["worst"])["share"]
    assert found["share"] == max(allowed, default=smallest_loss) < 1
    weights = {
        name: load_file(Path(folder) / "model.safetensors")
        for name, folder in {
            "start": "runs/old/checkpoint/best",
            "tuned": "runs/part/checkpoint/best",
            "candidate": "runs/part/blend/candidate",
        }.items()
    }
    for name, tensor in weights["candidate"].items():
        want = torch.lerp(weights["start"][name], weights["tuned"][name], found["share"])
        assert torch.equal(tensor, want)
    verdict = verdict_of("part")
    assert verdict["candidate"] == drafter_hash(Path("runs/part/blend/candidate"))
    assert not verdict["doctor"]["failed"]


@pytest.mark.usefixtures("_in_alone")
def test_an_unfinished_tuning_is_not_judged_against_a_drafter_that_serves_no_more(
    capsys: pytest.CaptureFixture[str],
):
    roles, registry = Registry(Path("registry")).roles, Registry(Path("registry"))
    assert roles.current is not None
    assert roles.candidate is not None
    shutil.copytree("runs/alone", "runs/other")
    for name in ("promotion_rule.json", "tuning", "checkpoint"):
        place = Path("runs/other") / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    stop = [*TUNE, "name=other"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("dflash_train.stages.tune.walk.run_stage", _interrupt)
        assert main(stop) == 130
    registry.promote(roles.candidate, against=roles.current, facts={"rule": "another"})
    assert main(stop) == 2
    assert "has changed since" in capsys.readouterr().err


def _interrupt(*_arguments: object, **_words: object) -> None:
    raise KeyboardInterrupt
