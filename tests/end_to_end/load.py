"""Clients that come, go and err at random, and what they remember of it."""

import json
import random
import socket
import string
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.test_inference.served_endpoint import Streamed

CHAT = "/v1/chat/completions"
NUM_CLIENTS = 16
FEWEST = {"completed": 30, "cancelled": 5, "malformed": 5}
"""Requests by kind that a load holds at least, however slow the server is."""
TIMEOUT_S = 300.0
"""Longest silence: fifteen others may come first."""
TOPICS = ("bay", "train", "parcel", "invoice", "room", "pump", "ticket", "valve")


@dataclass(kw_only=True)
class Completed:
    """An answer that its client has read to the end."""

    id: str
    prompt_ids: list[int]
    output_ids: list[int]
    is_greedy: bool


@dataclass(kw_only=True)
class Load:
    """Sixteen clients of one server, and what became of their requests."""

    url: str
    model: str
    seconds: float
    seen: Counter[str] = field(default_factory=Counter)
    """Requests by kind: completed, cancelled, malformed."""
    completed: list[Completed] = field(default_factory=list)
    faults: list[BaseException] = field(default_factory=list)
    """What a client could not explain; the first one ends all."""

    def run(self) -> None:
        """Send requests from all clients until the time is over and there are some of each kind."""
        end = time.monotonic() + self.seconds
        clients = [
            threading.Thread(target=self._be_a_client, args=(random.Random(seed), end))
            for seed in range(NUM_CLIENTS)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    def _be_a_client(self, chance: random.Random, end: float) -> None:
        kinds: dict[str, Callable[[random.Random], None]] = {
            "completed": self._read_to_the_end, "cancelled": self._leave,
            "malformed": self._err,
        }  # fmt: skip
        try:
            while not self.faults and (
                time.monotonic() < end or any(self.seen[kind] < FEWEST[kind] for kind in kinds)
            ):
                (kind,) = chance.choices(list(kinds), weights=(2, 1, 1))
                kinds[kind](chance)
                self.seen[kind] += 1
        except BaseException as error:
            self.faults.append(error)

    def _body(self, chance: random.Random, *, is_greedy: bool) -> dict[str, Any]:
        words = " and ".join(f"{chance.choice(TOPICS)} {_invented_name(chance)}" for _ in range(3))
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": f"What is known of {words}?"}],
            "max_tokens": chance.randrange(1, 60),
            "stream": True,
            "return_token_ids": True,
            "temperature": 0,
        }
        return body if is_greedy else body | {"temperature": 1.0, "seed": chance.randrange(99)}

    def _read_to_the_end(self, chance: random.Random) -> None:
        is_greedy = chance.random() < 0.5
        streamed = Streamed()
        body = self._body(chance, is_greedy=is_greedy)
        with httpx2.stream("POST", self.url + CHAT, json=body, timeout=TIMEOUT_S) as reply:
            assert reply.status_code == 200, reply.read()
            for line in reply.iter_lines():
                streamed.add(line)
        assert streamed.finish_reason in ("stop", "length")
        assert 1 <= len(streamed.token_ids) <= body["max_tokens"]
        first = streamed.chunks[0]
        self.completed.append(
            Completed(
                id=first["id"],
                prompt_ids=first["prompt_token_ids"],
                output_ids=streamed.token_ids,
                is_greedy=is_greedy,
            )
        )

    def _leave(self, chance: random.Random) -> None:
        """Hang up before the first line, within the answer, or while waiting for a whole one."""
        body = self._body(chance, is_greedy=chance.random() < 0.5) | {"max_tokens": 400}
        most = chance.randrange(0, 8)
        if chance.random() < 0.3:
            try:
                body["stream"] = False
                httpx2.post(self.url + CHAT, json=body, timeout=chance.uniform(0.01, 0.5))
            except httpx2.TimeoutException:
                return
        with httpx2.stream("POST", self.url + CHAT, json=body, timeout=TIMEOUT_S) as reply:
            assert reply.status_code == 200, reply.read()
            for number, _ in enumerate(reply.iter_lines()):
                if number >= most:
                    return

    def _err(self, chance: random.Random) -> None:
        """Send what is no request; it must be refused in words, or die with its connection."""
        good = self._body(chance, is_greedy=True)
        wrong: dict[str, Any] = chance.choice(
            [
                {"temperature": "x"}, {"n": 3}, {"messages": 1}, {"odd": 1}, {"messages": []},
                {"max_tokens": 10**9}, {"stop": [""]}, {"model": "another"}, {"top_p": -1},
            ]
        )  # fmt: skip
        content = json.dumps(good | wrong).encode()
        as_json = {"content-type": "application/json"}
        match chance.randrange(6):
            case 0:
                return self._hang_up_within(content)
            case 1:
                reply = httpx2.post(self.url + CHAT, content=content, timeout=TIMEOUT_S)
                assert reply.status_code == 415
            case 2:
                cut = content[: chance.randrange(1, len(content))]
                reply = self._post(cut, as_json)
                assert reply.status_code == 400
            case 3:
                reply = self._post(chance.randbytes(200), as_json)
                assert reply.status_code == 400
            case 4:
                reply = httpx2.get(self.url + CHAT, timeout=TIMEOUT_S)
                assert reply.status_code == 405
            case _:
                reply = self._post(content, as_json)
                assert reply.status_code in (400, 404)
                assert reply.json()["error"]["param"] in wrong
        assert reply.json()["error"]["message"]

    def _post(self, content: bytes, headers: dict[str, str]) -> httpx2.Response:
        return httpx2.post(self.url + CHAT, content=content, headers=headers, timeout=TIMEOUT_S)

    def _hang_up_within(self, content: bytes) -> None:
        """Promise more of a body than is sent."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        head = f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
            connection.sendall(f"{head}content-length: {len(content) + 9}\r\n\r\n".encode())
            connection.sendall(content)


def _invented_name(chance: random.Random) -> str:
    """Give a word without digits: `ingest` would hide numbers, and with them exact token ids."""
    return "".join(chance.choices(string.ascii_lowercase, k=7))
