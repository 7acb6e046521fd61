"""`dflash-train serve` as a process, under sixteen clients that come, go and err: `make soak`.

Two minutes on a tiny random target; some seconds of it in every test run. The same with a real
target and its drafter, in the mode that `serve` has by itself, where a machine has both:

    SOAK_TARGET=DIR SOAK_CHECKPOINT=DIR pytest -m soak tests/end_to_end/test_serve_under_load.py

`SOAK_SETTINGS="serve.fast=false ..."` adds recipe keys. What is shown of it: nothing crashes, no
slot leaks, each answer stands in the log with the tokens that its client got, every completed
greedy answer is the target's own by one teacher-forced pass over it in eager float32 (near-ties are
listed), and `ingest` keeps every call but those that ended early.
"""

import os
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from dflash_data.privacy.text_of_ids import CUT_CHARACTER
from dflash_inference.live_check import NEAR_TIE
from dflash_train.config import TargetConfig
from dflash_train.drafter.checkpoint import save_checkpoint
from dflash_train.features.target import Target, load_target
from dflash_train.testing import save_tiny_target, tiny_drafter
from tests.end_to_end.load import Completed, Load
from tests.test_inference.recorded_log import ingested, recorded
from tests.test_inference.served_endpoint import TIMEOUT_S, serving_process

MODEL = "soaked"


@dataclass(kw_only=True)
class Models:
    """What is served, and how."""

    target: str
    checkpoint: str
    settings: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    place = save_tiny_target(folder / "tiny")
    target = load_target(TargetConfig(name_or_path=str(place)), [1, 3])
    save_checkpoint(tiny_drafter(target), folder / "drafter")
    return Models(
        target=str(place), checkpoint=str(folder / "drafter"), settings={"serve.fast": "false"}
    )


def test_clients_that_come_go_and_err_leave_no_trace(
    tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DFLASH_HOME", str(tmp_path / "home"))  # the machine is measured for it
    serve_under_load(tiny_models, tmp_path, seconds=3)


@pytest.mark.soak
def test_two_minutes_of_clients_that_come_go_and_err_leave_no_trace(
    tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tiny_models
    if "SOAK_TARGET" not in os.environ:
        monkeypatch.setenv("DFLASH_HOME", str(tmp_path / "home"))
    else:
        given = [each.split("=", 1) for each in os.environ.get("SOAK_SETTINGS", "").split()]
        models = Models(
            target=os.environ["SOAK_TARGET"],
            checkpoint=os.environ["SOAK_CHECKPOINT"],
            settings=dict(given),
        )
    serve_under_load(models, tmp_path, seconds=120)


def serve_under_load(models: Models, folder: Path, *, seconds: float) -> None:
    log, said = folder / "calls.jsonl", folder / "said"
    settings = {
        "target.name_or_path": models.target, "checkpoint": models.checkpoint, "serve.log": log,
        "serve.model_name": MODEL, "serve.token_budget": 1500, **models.settings,
    }  # fmt: skip
    with serving_process(settings, said) as (process, url):
        load = Load(url=url, model=MODEL, seconds=seconds)
        load.run()
        assert not load.faults, load.faults
        finished = finished_when_idle(url)
        assert httpx2.get(f"{url}/health", timeout=TIMEOUT_S).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
    assert not re.search("Traceback|Error", said.read_text()), said.read_text()
    target = load_target(TargetConfig(name_or_path=models.target), [0])
    check_log(load, log, finished)
    check_greedy_answers(load.completed, target)
    check_ingest(load, models, log, folder)


def finished_when_idle(url: str) -> Counter[str]:
    """Wait until nothing is held, and give the number of requests by finish reason."""
    end = time.monotonic() + TIMEOUT_S
    while True:
        text = httpx2.get(f"{url}/metrics", timeout=TIMEOUT_S).text
        held = re.findall(r"^vllm:(?:num_requests|kv_cache)\w+{.*} (\S+)$", text, re.MULTILINE)
        assert len(held) == 3
        if not any(map(float, held)):
            found = re.findall(r'request_success_total{.*finished_reason="(\w+)"} (\d+)', text)
            return Counter({reason: int(number) for reason, number in found})
        assert time.monotonic() < end, f"a slot has leaked: {held}"
        time.sleep(0.05)


def check_log(load: Load, log: Path, finished: Counter[str]) -> None:
    """Each request that the decoder ended stands in the log once, answers as they were read."""
    calls = {call["id"]: call for call in recorded(log)}
    assert len(calls) == len(recorded(log)) == sum(finished.values())
    assert set(finished) <= {"stop", "length", "cancelled"}
    assert len(calls) <= load.seen["completed"] + load.seen["cancelled"]
    for answer in load.completed:
        (choice,) = calls[answer.id]["response"]["choices"]
        assert choice["token_ids"] == answer.output_ids
        assert "status" not in calls[answer.id]
    assert sum("status" in call for call in calls.values()) <= load.seen["cancelled"]


def check_greedy_answers(completed: list[Completed], target: Target) -> None:
    """Every greedy token is the target's own in one exact pass, or a near-tie that is printed."""
    greedy = [answer for answer in completed if answer.is_greedy]
    ties: list[tuple[float, float]] = []
    for answer in greedy:
        ties += doubtful(target, answer)
    print(f"{len(greedy)} greedy answers of {len(completed)}; near-ties (logits): {ties}")
    assert greedy
    limit = NEAR_TIE[target.model.dtype]
    for best, chosen in ties:
        assert best - chosen <= limit * max(1.0, abs(best)), (best, chosen)


@torch.inference_mode()
def doubtful(target: Target, answer: Completed) -> list[tuple[float, float]]:
    """Give both logits where the target, reading the answer, would have said something else."""
    ids = torch.tensor([[*answer.prompt_ids, *answer.output_ids[:-1]]])
    logits = target.forward(ids).logits[0, len(answer.prompt_ids) - 1 :]
    chosen = logits.gather(1, torch.tensor(answer.output_ids)[:, None])[:, 0]
    best = logits.max(-1).values
    return [(float(best[at]), float(chosen[at])) for at in (best > chosen).nonzero()[:, 0]]


def check_ingest(load: Load, models: Models, log: Path, folder: Path) -> None:
    """Nothing is dropped but what was planted: calls that ended early, and empty answers."""
    manifest, records = ingested(models.target, log, folder, served_as=MODEL)
    assert manifest.counts is not None
    dropped = {reason: number for reason, number in manifest.counts.dropped.items() if number}
    whole = [call for call in recorded(log) if "status" not in call]
    answers = [call["response"]["choices"][0]["message"]["content"] for call in whole]
    planted = {"not_success": len(recorded(log)) - len(whole), "empty_output": answers.count("")}
    assert dropped == {reason: number for reason, number in planted.items() if number}
    # The recipe's serving sampling is greedy, so answers drawn otherwise are kept without ids; so
    # are those of cut characters alone, from which nobody can tell whose tokens they are.
    greedy = [
        call["response"]["choices"][0]["token_ids"]
        for call, answer in zip(whole, answers, strict=True)
        if call["request"]["temperature"] == 0 and answer.strip(CUT_CHARACTER)
    ]
    on_policy = [record.output_token_ids or [] for record in records if record.on_policy]
    assert sorted(on_policy) == sorted(greedy)
    print(f"{dict(load.seen)}; ingest kept {len(records)}, dropped {dropped}")
