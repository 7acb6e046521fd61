"""A server of the tiny target that speaks OpenAI's API, and what can go wrong with its replies."""

import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dflash_train.config import (
    ServingSampling,
)
from dflash_train.features.sampling import RowSampler
from dflash_train.features.target import Target

Fault = Callable[["Handler"], None]


@dataclass
class Server:
    """A server of the tiny target that speaks OpenAI's API, and errs where it is told to."""

    target: Target
    model: str = "tiny"
    """Name in replies."""
    faults: deque[Fault] = field(default_factory=deque)
    """What goes wrong with the next requests, after the probe."""
    always: Fault | None = None
    gives_ids: bool = True
    keeps_stop_token: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of all requests but the probe."""
    closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"app": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def close(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Write the reply to one request; the target's own answer to its prompt."""
        prompt = body.get("prompt") or self._render(body["messages"])
        sampling = ServingSampling(temperature=body["temperature"])
        sampler = RowSampler(prompt, sampling, seed=body["seed"])
        with self._lock:
            row = self.target.generate_batch(
                [prompt], max_new_tokens=body["max_tokens"], samplers=[sampler]
            )[0]
        text = str(self.target.tokenizer.decode(row.output_ids, skip_special_tokens=True))
        ids = row.output_ids
        if not self.keeps_stop_token and row.finish_reason == "stop":
            ids = ids[:-1]
        known = {"token_ids": ids, "prompt_token_ids": prompt} if self.gives_ids else {}
        return self.reply(body, text, finish_reason=row.finish_reason, **known)

    def reply(self, body: dict[str, Any], text: str, **choice: Any) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}}
        choice = {"index": 0, "finish_reason": "stop"} | choice
        choice |= {"text": text} if "prompt" in body else said
        return {"model": self.model, "choices": [choice], "usage": {"prompt_tokens": 3}}

    def _render(self, messages: list[dict[str, Any]]) -> list[int]:
        text = self.target.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.target.tokenizer(str(text), add_special_tokens=False).input_ids


class Handler(BaseHTTPRequestHandler):
    app: Server
    body: dict[str, Any]

    def do_GET(self) -> None:
        self.send_json({"data": [{"id": "tiny", "max_model_len": 500}]})

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.app.always
        if self.body["max_tokens"] > 1:
            self.app.asked.append(self.body)
            fault = self.app.faults.popleft() if self.app.faults else fault
        elif fault is not refuse:  # the probe
            fault = None
        if fault is not None:
            fault(self)
        else:
            self.send_json(self.app.answer(self.body))

    def send_json(self, content: object, status: int = 200, **headers: str) -> None:
        self.send_text(json.dumps(content), status, **headers)

    def send_text(self, text: str, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


def busy(handler: Handler) -> None:
    handler.send_json({}, 429, Retry_After="0.3")


def broken(handler: Handler) -> None:
    handler.send_json({"error": "boom"}, 503)


def dropped(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


def garbled(handler: Handler) -> None:
    handler.send_text('{"choices": [')


def shapeless(handler: Handler) -> None:
    handler.send_json({"choices": [{"text": 7, "finish_reason": "stop"}], "model": "tiny"})


def silent(handler: Handler) -> None:
    handler.app.closing.wait()


def refuse(handler: Handler) -> None:
    quoted = {"detail": [{"loc": ["body", "prompt"], "input": handler.body}], "words": "secret one"}
    handler.send_json(quoted, 422)


def says(text: str, **choice: Any) -> Fault:
    return lambda handler: handler.send_json(handler.app.reply(handler.body, text, **choice))
