"""What clients, the log and the process see when the decoder's thread fails under them."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest

from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.engine import Engine, TokenStream
from dflash_inference.sampling import SamplingParams
from dflash_inference.scheduler import Scheduler, Ticket
from dflash_train.config import UnavailableError
from dflash_train.drafter.checkpoint import save_checkpoint
from dflash_train.features.target import Target
from dflash_train.testing import save_tiny_target, tiny_drafter, tiny_target
from tests.test_inference.served_endpoint import (
    TIMEOUT_S,
    Streamed,
    served,
    serving_process,
)

CHAT = "/v1/chat/completions"
ASKED: dict[str, Any] = {
    "model": "tiny", "messages": [{"role": "user", "content": "Is bay 4 free?"}],
    "max_tokens": 1500, "temperature": 1.5, "seed": 1, "return_token_ids": True,
}  # fmt: skip
FAILING_SERVER = """
import sys
from dflash_inference.scheduler import Scheduler, SchedulerCounts
from dflash_train.cli import main

def add(counts, step):
    counts.drafts += 1
    if counts.drafts > 20:
        raise ZeroDivisionError("a fault outside of any request")

SchedulerCounts.add = add
sys.exit(main(sys.argv[1:]))
"""
"""`dflash-train`, whose scheduler fails at its twentieth verify step."""


class FailingScheduler(Scheduler):
    """A scheduler that fails by itself, in no request's name, as soon as it has so many requests.

    The first of them waits for the others after some steps, however slow their clients are.
    """

    fails_at = 2

    def step(self) -> list[Ticket]:
        tickets = self.tickets
        if len(tickets) >= self.fails_at:
            raise ZeroDivisionError("a fault outside of any request")
        if any(len(ticket.state.steps) > 20 for ticket in tickets):
            time.sleep(0.01)
            return []
        return super().step()


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def test_every_client_gets_an_error_and_no_more_requests_are_taken(
    target: Target, tmp_path: Path
) -> None:
    log = tmp_path / "calls.jsonl"
    replies: list[httpx2.Response] = []
    with served(SpeculativeDecoder(target, tiny_drafter(target)), log=log) as endpoint:
        endpoint.scheduler.__class__ = FailingScheduler
        waiting = threading.Thread(
            target=lambda: replies.append(endpoint.post(CHAT, **ASKED | {"max_tokens": 400}))
        )
        url, body, streamed = endpoint.url + CHAT, ASKED | {"stream": True}, Streamed()
        with httpx2.stream("POST", url, json=body, timeout=TIMEOUT_S) as reply:
            for number, line in enumerate(reply.iter_lines()):
                streamed.add(line)
                if number == 1:
                    waiting.start()
        waiting.join(TIMEOUT_S)
        assert endpoint.get("/health").status_code == 503
        assert endpoint.get("/health").json() == {"status": "failed"}
        late = endpoint.post(CHAT, **ASKED)
        assert isinstance(endpoint.engine.failure, ZeroDivisionError)
    assert streamed.is_done
    told = [streamed.chunks[-1]["error"], replies[0].json()["error"], late.json()["error"]]
    assert [reply.status_code for reply in (*replies, late)] == [500, 503]
    for error in told:
        assert error["type"] == "server_error"
        assert "The decoder has failed (ZeroDivisionError), and the server ends" in error["message"]
    calls = [orjson.loads(line) for line in log.read_bytes().splitlines()]
    assert [call["status"] for call in calls] == ["error", "error"]


def test_a_request_that_waits_when_the_engine_fails_ends_and_the_next_is_refused(
    target: Target,
) -> None:
    scheduler = FailingScheduler(
        SpeculativeDecoder(target, tiny_drafter(target)), token_budget=100, most_requests=1
    )
    scheduler.fails_at = 1
    engine = Engine(scheduler)
    params = SamplingParams(max_new_tokens=5)

    async def ask() -> TokenStream:
        stream = engine.submit([1, 2], params)
        assert [new_ids async for new_ids in stream] == [[]]
        with pytest.raises(UnavailableError, match=r"has failed \(ZeroDivisionError\)"):
            engine.submit([1, 2], params)
        return stream

    stream = asyncio.run(asyncio.wait_for(ask(), TIMEOUT_S))
    assert stream.finish_reason == "error"
    assert stream.ticket.error is engine.failure
    engine.close()


def test_the_process_says_why_and_ends_with_an_error(target: Target, tmp_path: Path) -> None:
    save_checkpoint(tiny_drafter(target), tmp_path / "drafter")
    log = tmp_path / "calls.jsonl"
    settings = {
        "checkpoint": tmp_path / "drafter", "serve.log": log,
        "serve.fast": "false", "serve.adaptive": "false",
        "target.name_or_path": save_tiny_target(tmp_path / "tiny"),
    }  # fmt: skip
    said = tmp_path / "said"
    with serving_process(settings, said, program=("-c", FAILING_SERVER)) as (process, url):
        reply = httpx2.post(url + CHAT, json=ASKED, timeout=TIMEOUT_S)
        assert reply.status_code == 500
        assert process.wait(TIMEOUT_S) == 1
    assert "ZeroDivisionError: a fault outside of any request" in said.read_text()
    assert "RuntimeError: The decoder has failed" in said.read_text()
    (line,) = log.read_bytes().splitlines()
    assert orjson.loads(line)["status"] == "error"
