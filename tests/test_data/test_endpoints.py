"""Servers that answer: which is asked what, what is tried again, what is set aside or refused."""

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dflash_data.regenerate.answer_log import AnswerLog
from dflash_train.config import (
    EndpointsConfig,
    RecipeConfig,
    ServingSampling,
    TargetConfig,
    UnavailableError,
)
from dflash_train.features.target import Target
from dflash_train.records.manifest import Manifest
from dflash_train.stages.walk import run_stage
from dflash_train.stages.workshop import Workshop
from dflash_train.testing import ask, save_tiny_target, write_conversations
from tests.test_data.answer_server import (
    Handler,
    Server,
    broken,
    busy,
    dropped,
    garbled,
    refuse,
    shapeless,
    silent,
)
from tests.test_data.served_run import RECORDS, counted, files, run, served_by


def test_failures_and_the_order_of_arrival_leave_no_trace_in_the_files(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    plain = served_by(config, servers(), name="plain")
    run(plain, target)
    faults = deque([broken, garbled, shapeless, dropped, busy, silent])
    troubled = servers(faults=faults)
    tried = served_by(config, troubled, servers(), name="tried", timeout_s=1.5, concurrency=4)
    assert counted(run(tried, target)) == (6, 6, {})
    assert files(tried) == files(plain)


def test_a_busy_servers_own_waiting_time_is_kept(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    server = servers(faults=deque([busy]))
    began = time.monotonic()
    run(served_by(config, server), target, [ask("a0", "one")])
    assert time.monotonic() - began >= 0.3
    assert len(server.asked) == 2


def test_a_server_that_keeps_failing_is_set_aside_and_named(
    config: RecipeConfig,
    target: Target,
    servers: Callable[..., Server],
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing, working = servers(always=broken), servers()
    manifest = run(served_by(config, failing, working), target)
    assert counted(manifest) == (6, 6, {})
    assert f"{failing.url} is set aside (HTTP status 503)" in capsys.readouterr().err
    assert len(failing.asked) == 3


def test_a_server_that_is_down_from_the_start_is_set_aside(
    config: RecipeConfig,
    target: Target,
    servers: Callable[..., Server],
    capsys: pytest.CaptureFixture[str],
) -> None:
    gone, working = servers(), servers()
    gone.close()
    assert counted(run(served_by(config, gone, working), target)) == (6, 6, {})
    assert f"{gone.url} is set aside (ConnectError)" in capsys.readouterr().err


def test_the_least_busy_server_is_asked_first(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    done = threading.Event()

    def wait(handler: Handler) -> None:
        assert done.wait(20)
        handler.send_json(handler.app.answer(handler.body))

    def last(handler: Handler) -> None:
        handler.send_json(handler.app.answer(handler.body))
        done.set()

    def plain(handler: Handler) -> None:
        handler.send_json(handler.app.answer(handler.body))

    slow, quick = servers(faults=deque([wait])), servers(faults=deque([plain] * 3 + [last]))
    records = [ask(f"{name}0", f"question {name}") for name in "abcde"]
    run(served_by(config, slow, quick, concurrency=2), target, records)
    assert (len(slow.asked), len(quick.asked)) == (1, 4)


def test_a_run_whose_servers_died_goes_on_where_it_stopped(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    undisturbed = served_by(config, servers(), name="undisturbed")
    run(undisturbed, target)
    dying = servers()
    dying.faults.extend([lambda handler: handler.send_json(handler.app.answer(handler.body))] * 3)
    dying.always = broken
    stopped = served_by(config, dying, max_retries=1)
    with pytest.raises(UnavailableError, match=r"no server of data\.endpoints\.urls .* status 503"):
        run(stopped, target)
    logs = sorted((stopped.run_dir / "regenerated" / "answers").iterdir())
    assert sum(len(log.read_bytes().splitlines()) for log in logs) == 3
    logs[0].write_bytes(logs[0].read_bytes()[:-5])  # a kill in the midst of a line
    revived = servers()
    run(served_by(config, revived), target)
    assert len(revived.asked) == 4
    assert files(stopped) == files(undisturbed)


def test_a_finished_log_is_enough_to_write_the_files_again(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    server = servers()
    run(served := served_by(config, server), target)
    before = files(served)
    (served.run_dir / "regenerated" / "train-00000.jsonl.gz").unlink()
    server.close()
    run(served, target)
    assert files(served) == before


def test_settings_are_sent_even_where_they_change_nothing(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    server = servers()
    run(served_by(config, server), target, [ask("a0", "one")])
    body = server.asked[0]
    assert (
        body["prompt"]
        == target.tokenizer(
            "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
        ).input_ids
    )
    settings = {key: body[key] for key in body if key not in ("prompt", "seed")}
    assert settings == {
        "model": "tiny", "max_tokens": 12, "temperature": 0.0, "top_p": 1.0, "top_k": -1,
        "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "repetition_penalty": 1.0, "stop_token_ids": [2], "return_token_ids": True,
    }  # fmt: skip


def test_a_refused_request_names_our_fields_and_quotes_nothing(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    with pytest.raises(ValueError, match=r"status 422; its reply names prompt\.") as caught:
        run(served_by(config, servers(always=refuse)), target)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("server", "keys", "message"),
    [
        ({"model": "other"}, {}, r"model \(=tiny\) was asked, and another one answered"),
        ({}, {"model": "large"}, r"model \(=large\) is not served by .*, which serves tiny"),
        ({}, {"api_key_env": "NO_SUCH_KEY"}, r"api_key_env \(=NO_SUCH_KEY\) is not set"),
    ],
)
def test_servers_that_do_not_fit_are_refused(
    config: RecipeConfig,
    target: Target,
    servers: Callable[..., Server],
    server: dict[str, Any],
    keys: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        run(served_by(config, servers(**server), **keys), target)


def test_another_address_leaves_the_stage_complete_and_another_engine_does_not(
    config: RecipeConfig, servers: Callable[..., Server], target: Target, tmp_path: Path
) -> None:
    folder = save_tiny_target(tmp_path / "target")
    config.target = TargetConfig(name_or_path=str(folder))
    write_conversations(config, RECORDS)
    Manifest(stage="ingest", recipe_hash="sha256:test").write(config.run_dir / "conversations")
    moved = servers()
    assert run_stage(Workshop(served_by(config, servers())), "regenerate")
    assert not run_stage(Workshop(served_by(config, moved)), "regenerate")
    assert not moved.asked
    sampled = served_by(config, moved)
    sampled.data.serving_sampling = ServingSampling(temperature=1.0)
    assert run_stage(Workshop(sampled), "regenerate")
    assert moved.asked
    assert run_stage(Workshop(config), "regenerate")
    assert (config.run_dir / "regenerated" / "features").exists()


@pytest.mark.parametrize("url", ["localhost:8000", "http://user:word@host/v1"])
def test_addresses_are_checked_and_a_login_is_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"data\.endpoints\.urls \(=") as caught:
        EndpointsConfig(urls=[url])
    assert "word@" not in str(caught.value)


def test_the_log_gives_back_whole_lines_of_the_same_prompt_only(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.jsonl"
    log = AnswerLog(path)
    log.add("a", [1], ask("a", "one", "two"))
    log.close()
    path.open("ab").write(b'not json\n{"id": "b", "pro')
    log = AnswerLog(path)
    assert log.find("a", [1]) == ask("a", "one", "two")
    assert log.find("a", [2]) is None
    assert log.find("b", [1]) is None
    log.close()
    log.put_in_order(["a"])
    assert len(path.read_bytes().splitlines()) == 1
