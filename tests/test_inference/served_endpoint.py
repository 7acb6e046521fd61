"""The endpoint of a tiny target on a free port of this machine, and how its clients see it."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.endpoint.app import Endpoint
from dflash_inference.endpoint.request_log import RequestLog
from dflash_inference.engine import Engine
from dflash_inference.scheduler import Scheduler
from dflash_inference.serve import serving_defaults
from dflash_train.config import DataConfig, RecipeConfig, ServeConfig, ServingSampling

TIMEOUT_S = 30.0
START_S = 300.0
"""Longest wait for a process to listen: a real target is loaded, compiled and measured first."""


@dataclass
class Served:
    """A running endpoint."""

    url: str
    engine: Engine
    decoder: SpeculativeDecoder

    @property
    def scheduler(self) -> Scheduler:
        return self.engine.scheduler

    def post(self, path: str, **body: Any) -> httpx2.Response:
        """Send a request to the one model, unless the body says otherwise."""
        content = {"model": "tiny"} | body
        return httpx2.post(f"{self.url}{path}", json=content, timeout=TIMEOUT_S)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(f"{self.url}{path}", timeout=TIMEOUT_S)

    def stream(self, path: str, **body: Any) -> "Streamed":
        """Read a whole stream."""
        streamed = Streamed()
        content = {"model": "tiny", "stream": True} | body
        with httpx2.stream("POST", f"{self.url}{path}", json=content, timeout=TIMEOUT_S) as reply:
            assert reply.status_code == 200, reply.read()
            for line in reply.iter_lines():
                streamed.add(line)
        return streamed


@dataclass
class Streamed:
    """What the chunks of a stream add up to."""

    chunks: list[dict[str, Any]] = field(default_factory=list)
    is_done: bool = False

    def add(self, line: str) -> None:
        if not line:
            return
        assert not self.is_done
        data = line.removeprefix("data: ")
        assert data != line
        if data == "[DONE]":
            self.is_done = True
        else:
            self.chunks.append(json.loads(data))

    @property
    def choices(self) -> list[dict[str, Any]]:
        return [choice for chunk in self.chunks for choice in chunk["choices"]]

    @property
    def pieces(self) -> list[str]:
        """The text of each chunk."""
        return [
            choice["text"] if "text" in choice else choice["delta"].get("content", "")
            for choice in self.choices
        ]

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def token_ids(self) -> list[int]:
        return [token for choice in self.choices for token in choice.get("token_ids", [])]

    @property
    def finish_reason(self) -> str:
        assert self.is_done
        *others, last = [choice["finish_reason"] for choice in self.choices]
        assert others == [None] * len(others)
        return last


def recipe_of(*, sampling: dict[str, float] | None = None, **limits: Any) -> RecipeConfig:
    serving = ServingSampling(**(sampling or {}))  # pyright: ignore[reportArgumentType]
    limits = {"model_name": "tiny", "max_new_tokens": 24, "token_budget": 2000} | limits
    return RecipeConfig(
        name="serve", serve=ServeConfig(**limits), data=DataConfig(serving_sampling=serving)
    )


@contextmanager
def served(
    decoder: SpeculativeDecoder, *, log: Path | None = None, config: RecipeConfig | None = None
) -> Iterator[Served]:
    """Serve on a free port until the block ends."""
    config = config or recipe_of()
    engine = Engine(
        Scheduler(
            decoder,
            token_budget=config.serve.token_budget,
            most_requests=config.serve.most_requests,
        )
    )
    book = None if log is None else RequestLog(log)
    defaults = serving_defaults(decoder, config)
    endpoint = Endpoint(engine, target=decoder.target, defaults=defaults, log=book)
    settings = uvicorn.Config(endpoint.app(), log_level="error", lifespan="off", port=0)
    server = uvicorn.Server(settings)
    listening = settings.bind_socket()
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield Served(url=url, engine=engine, decoder=decoder)
    finally:
        engine.stop()
        server.should_exit = True
        thread.join()
        engine.close()
        if book is not None:
            book.close()


@contextmanager
def serving_process(
    settings: dict[str, Any], said: Path, *, program: tuple[str, ...] = ("-m", "dflash_train")
) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """Run `dflash-train serve` until the block ends; give the process and its address.

    Args:
        settings: Recipe keys; the port is a free one.
        said: File that gets what it writes to stderr.
        program: What Python runs instead of the package.
    """
    arguments = [f"{key}={value}" for key, value in {"serve.port": 0, **settings}.items()]
    command = [sys.executable, *program, "serve", *arguments]
    with said.open("wb") as stream:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream)
    try:
        yield process, _address(process, said)
    finally:
        process.kill()
        process.wait()


def _address(process: "subprocess.Popen[bytes]", said: Path) -> str:
    end = time.monotonic() + START_S
    while not (found := re.search(r"http://127\.0\.0\.1:\d+", said.read_text())):
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < end, "the server does not begin to listen"
        time.sleep(0.05)
    return found[0]
