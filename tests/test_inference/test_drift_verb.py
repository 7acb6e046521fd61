from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import pytest

from benchmarks.bench_drift import read_measured, resampled
from dflash_inference.decoder import SpeculativeDecoder
from dflash_train.cli import main
from dflash_train.config import DriftConfig, TargetConfig, compose
from dflash_train.features.target import load_target
from dflash_train.release.promotion import Gain
from dflash_train.stages.drift import planned_hours, read_choice, read_served
from dflash_train.stages.estimates import plan_training
from dflash_train.stages.tune.judging import VERDICT_NAME
from dflash_train.stages.tune.start import TUNING_FOLDER
from dflash_train.testing import save_tiny_target, tiny_drafter
from tests.test_inference.served_endpoint import served

CHAT = "/v1/chat/completions"
BEGIN = 1_792_000_800


def logged(folder: Path, *, fall: str | None, num_requests: int = 6000) -> Path:
    """Write a resampled log as vLLM's answers would be logged, the newest file first."""
    rows = resampled(
        read_measured()["gsm8k"], num_requests=num_requests, fall=fall, seed=0
    ).rows  # fmt: skip
    lines = [
        orjson.dumps(
            {
                "id": f"req-{number}",
                "created": BEGIN + 60 * number,
                "request": {"model": "m", "messages": [{"role": "user", "content": "How many?"}]},
                "response": {
                    "choices": [{"message": {"role": "assistant", "content": "Ten."}}],
                    "usage": {
                        "prompt_tokens": int(row["prompt_tokens"]),
                        "completion_tokens": int(row["tokens"]) + 1,
                    },
                    "metrics": {
                        "speculative_decoding": {
                            "num_spec_steps": int(row["steps"]),
                            "num_accepted_draft_tokens": int(row["tokens"] - row["steps"]),
                        }
                    },
                },
            }
        )
        for number, row in enumerate(rows)
    ]
    folder.mkdir()
    half = num_requests // 2
    (folder / "b-old.jsonl").write_bytes(b"\n".join(lines[:half]) + b"\n{cut off\n")
    (folder / "a-new.jsonl").write_bytes(b"\n".join(lines[half:]) + b"\n")
    return folder


def drift(folder: Path, *more: str) -> int:
    settings = ["recipe=smollm2", f"runs_dir={folder / 'runs'}", "evaluate.resamples=200"]
    return main(["drift", *settings, "drift.reference_requests=2000", *more])


def test_a_fallen_log_is_told_in_tables_a_file_and_by_the_exit_code_of_a_gate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = logged(tmp_path / "logs", fall="slower")
    payback = ["drift.tpot_ms=20", "drift.run_hours=2", "drift.requests_at_once=8"]
    assert drift(tmp_path, f"data.logs={logs}", *payback) == 0
    said = capsys.readouterr().out
    assert "Verdict: fell" in said
    assert "unparsable 1" in said
    assert "Tuning pays after" in said
    folder = tmp_path / "runs" / "smollm2" / "drift"
    assert said.splitlines()[-1] == str(folder)
    assert drift(tmp_path, f"data.logs={logs}", "json=true", "fail_if_fallen=true") == 3
    told = orjson.loads(capsys.readouterr().out)
    assert told == orjson.loads((folder / "drift.json").read_bytes())
    assert told["verdict"] == "fell"
    alarm = told["streams"][0]["alarm_row"]
    assert 3000 <= alarm < 3060 + 140
    assert told["streams"][0]["alarm_at"].startswith("2026-10-")


def test_an_undisturbed_log_passes_the_gate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = logged(tmp_path / "logs", fall=None)
    assert drift(tmp_path, f"data.logs={logs}", "fail_if_fallen=true") == 0
    assert "no fall beyond chance" in capsys.readouterr().out


def test_the_gain_of_an_earlier_tuning_weighs_a_tuning_without_a_fall(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = logged(tmp_path / "logs", fall=None)
    weighed = [f"data.logs={logs}", f"drift.gain_from={tmp_path / 'tuned'}", "drift.tpot_ms=20"]
    assert drift(tmp_path, *weighed, "drift.run_hours=2") == 2
    assert "holds no verdict of a tuning" in capsys.readouterr().err
    gain = Gain(
        name="traffic", num_requests=200, incumbent=2.0, candidate=2.5, relative=0.25, low=0.1,
        high=0.4,
    )  # fmt: skip
    (tmp_path / "tuned" / TUNING_FOLDER).mkdir(parents=True)
    verdict = tmp_path / "tuned" / TUNING_FOLDER / VERDICT_NAME
    verdict.write_bytes(orjson.dumps({"gains": [asdict(gain)]}))
    assert drift(tmp_path, *weighed, "drift.run_hours=2", "json=true") == 0
    payback = orjson.loads(capsys.readouterr().out)["payback"]
    busy_hours = payback["tokens_per_day"] * 0.020 / 3600
    assert payback["saved_hours_per_day"]["value"] == pytest.approx(busy_hours * 0.2)
    assert payback["days"]["value"] == pytest.approx(2 / (busy_hours * 0.2))
    assert payback["days"]["interval"]["high"] == pytest.approx(2 / (busy_hours * (1 - 1 / 1.1)))


def test_what_came_before_the_drafter_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = logged(tmp_path / "logs", fall="slower")
    since = "drift.since=2026-10-16T20:00:00Z"  # the fall lies before it
    assert drift(tmp_path, f"data.logs={logs}", since, "json=true") == 0
    told = orjson.loads(capsys.readouterr().out)
    assert told["verdict"] == "no fall beyond chance"
    assert told["dropped"]["before_since"] == 3000


def test_exactly_one_source_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert drift(tmp_path) == 2
    assert "no source is given" in capsys.readouterr().err
    assert drift(tmp_path, "data.logs=a.jsonl", "drift.metrics_url=http://localhost/metrics") == 2
    assert "exactly one of" in capsys.readouterr().err
    assert drift(tmp_path, "json=maybe") == 2


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"smallest_fall": 1.0}, r"drift.smallest_fall \(=1.0\) must lie between 0 and 1"),
        ({"polls": 0}, r"drift.polls \(=0\) must be at least 1"),
        ({"tpot_ms": float("inf")}, r"drift.tpot_ms \(=inf\) must be a number above 0"),
        ({"since": "yesterday"}, r"drift.since \(=yesterday\) must be a date"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DriftConfig(**settings)


def test_our_own_endpoint_is_watched_by_its_log_and_by_its_counts(tmp_path: Path) -> None:
    target = load_target(
        TargetConfig(name_or_path=str(save_tiny_target(tmp_path / "tiny"))), [1, 3]
    )
    decoder = SpeculativeDecoder(target, tiny_drafter(target))
    log = tmp_path / "calls.jsonl"
    asked = ["recipe=smollm2", f"runs_dir={tmp_path / 'runs'}"]
    with served(decoder, log=log) as endpoint:
        url = f"drift.metrics_url={endpoint.url}/metrics"
        pages = compose([*asked, url])
        hello = [{"role": "user", "content": "Where does the train stop?"}]
        endpoint.post(CHAT, messages=hello)
        read_served(pages, tmp_path / "drift")
        for number in range(6):
            endpoint.post(CHAT, messages=hello, seed=number, temperature=1.0, user=f"u{number % 2}")
        counted = read_served(pages, tmp_path / "drift")
        counts = endpoint.scheduler.counts
    by_call = read_served(compose([*asked, f"data.logs={log}"]), tmp_path / "drift")
    assert len(by_call.rows) == 7
    assert len(by_call.tenants) == 3
    lines = [orjson.loads(line) for line in log.read_bytes().splitlines()]
    told = [line["response"]["metrics"]["speculative_decoding"] for line in lines]
    assert sum(each["num_spec_steps"] for each in told) == counts.drafts
    assert sum(each["num_accepted_draft_tokens"] for each in told) == counts.accepted_tokens
    lengths = by_call.rows["tokens"] / by_call.rows["steps"]
    want = [1 + each["num_accepted_draft_tokens"] / each["num_spec_steps"] for each in told]
    assert sorted(lengths) == pytest.approx(sorted(want))
    assert counted.unit == "intervals"
    first = told[0]["num_spec_steps"]
    assert counted.rows["steps"].tolist() == [counts.drafts - first]


def test_the_hours_of_a_run_come_from_its_minutes_or_from_its_plan(tmp_path: Path) -> None:
    runs = f"runs_dir={tmp_path}"
    half_an_hour = ["training.max_steps=null", "training.minutes=30"]
    assert planned_hours(compose(["recipe=smollm2", runs, *half_an_hour])) == 0.5
    planned = compose(["recipe=qwen3", runs, "plan.gpu=h100", "plan.num_gpus=8"])
    days = plan_training(planned).days
    assert days is not None
    assert planned_hours(planned) == 24 * days > 0
    unknown = compose(["recipe=qwen3", runs, "plan.gpu=no-such-gpu"])
    assert planned_hours(unknown) is None


def test_the_words_of_the_verb_are_no_part_of_the_recipe() -> None:
    choice, others = read_choice(["recipe=smollm2", "json=true", "drift.polls=2"])
    assert (choice.json, choice.fails_if_fallen) == (True, False)
    assert others == ["recipe=smollm2", "drift.polls=2"]
