"""The routes: models, chat and text completions, health and counts.

Each request becomes a call: its tokens come from the engine's stream, its text from
`IncrementalText`, and when it ends, in whichever way, it frees its slot and stands in the log.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from dflash_inference.endpoint.answers import Answer
from dflash_inference.endpoint.metrics import prometheus_text
from dflash_inference.endpoint.refusal import RefusedError
from dflash_inference.endpoint.request_log import RequestLog
from dflash_inference.endpoint.requests import Ask, ServingDefaults, read_ask
from dflash_inference.engine import Engine, TokenStream
from dflash_inference.incremental_text import IncrementalText
from dflash_train.config import UnavailableError
from dflash_train.features.target import Target

SESSION_HEADER = "x-session-id"
"""Names the conversation that a call belongs to; the log keeps it."""


class Endpoint:
    """What all routes share."""

    def __init__(
        self,
        engine: Engine,
        *,
        target: Target,
        defaults: ServingDefaults,
        log: RequestLog | None = None,
    ) -> None:
        """Join an engine, the target's tokenizer and what requests may leave open."""
        self.engine = engine
        self.target = target
        self.defaults = defaults
        self.log = log
        self.began = int(time.time())

    def app(self) -> Starlette:
        """Give the ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/models", self.list_models),
                Route("/v1/models/{model:path}", self.show_model),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ],
            exception_handlers={
                RefusedError: _refusal,
                HTTPException: _http_refusal,
                Exception: _fault,
            },
        )

    async def list_models(self, request: Request) -> Response:
        """List the one model."""
        return _json({"object": "list", "data": [self._model()]})

    async def show_model(self, request: Request) -> Response:
        """Describe the one model.

        Raises:
            RefusedError: Another one is asked for.
        """
        asked = request.path_params["model"]
        if asked != self.defaults.model:
            raise RefusedError(
                f"model (={asked}) is not served here. Ask for {self.defaults.model}.",
                param="model", status=404, kind="not_found_error", code="model_not_found",
            )  # fmt: skip
        return _json(self._model())

    async def health(self, request: Request) -> Response:
        """Say whether requests are taken."""
        if self.engine.is_running:
            return _json({"status": "ok"})
        status = "closing" if self.engine.failure is None else "failed"
        return _json({"status": status}, status=503)

    async def metrics(self, request: Request) -> Response:
        """Give the counts as Prometheus text."""
        text = prometheus_text(self.engine.scheduler, model=self.defaults.model)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def chat(self, request: Request) -> Response:
        """Answer messages."""
        return await self._answer(request, is_chat=True)

    async def complete(self, request: Request) -> Response:
        """Continue a prompt."""
        return await self._answer(request, is_chat=False)

    async def _answer(self, request: Request, *, is_chat: bool) -> Response:
        began = time.time()
        ask = read_ask(
            await _body(request),
            is_chat=is_chat,
            defaults=self.defaults,
            tokenizer=self.target.tokenizer,
            moment=datetime.fromtimestamp(began, UTC).isoformat(),
        )
        try:
            stream = self.engine.submit(ask.prompt_ids, ask.params)
        except ValueError as error:  # larger than the whole token budget
            raise RefusedError(str(error), param="max_tokens") from error
        except UnavailableError as error:
            raise RefusedError(str(error), status=503, kind="server_error") from error
        session = request.headers.get(SESSION_HEADER)
        call = Call(self, ask, stream, began=began, session=session)
        if ask.is_streamed:
            return StreamedReply(call)
        return await _unless_gone(request, call)

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.defaults.model,
            "object": "model",
            "created": self.began,
            "owned_by": "dflash-train",
            "root": f"{self.target.name}@{self.target.revision}",
            "max_model_len": self.defaults.max_positions,
        }


class Call:
    """One accepted request until its end."""

    def __init__(
        self,
        endpoint: Endpoint,
        ask: Ask,
        stream: TokenStream,
        *,
        began: float,
        session: str | None,
    ) -> None:
        """Start listening to the engine."""
        self.endpoint = endpoint
        self.stream = stream
        self.answer = Answer(
            id=f"{'chatcmpl' if ask.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            created=int(began),
            model=endpoint.defaults.model,
            ask=ask,
        )
        self._text = IncrementalText(endpoint.target.tokenizer, ask.params.stop)
        self._began = began
        self._session = session
        self._is_closed = False

    async def pieces(self) -> AsyncIterator[tuple[str, list[int]]]:
        """Yield text and tokens as they come; the last piece comes with the finish reason.

        Raises:
            RefusedError: Decoding this request failed.
        """
        async for new_ids in self.stream:
            text = self._take(new_ids)
            if self.stream.finish_reason == "error":
                raise RefusedError(self._what_failed(), status=500, kind="server_error")
            yield text, new_ids

    async def whole(self) -> Answer:
        """Wait for the end and give the whole answer."""
        async for _ in self.pieces():
            pass
        return self.answer

    def close(self) -> None:
        """Free the slot, whatever has happened, and write the call down, once."""
        if self._is_closed:
            return
        self._is_closed = True
        self.stream.cancel()
        if self.answer.finish_reason is None:
            self.answer.finish_reason = "cancelled"
            self.answer.text += self._text.finish()
        if self.endpoint.log is not None:
            self.endpoint.log.write(
                self.answer,
                list(self.stream.ticket.state.steps),
                revision=self.endpoint.target.revision,
                began=self._began,
                ended=time.time(),
                session=self._session,
            )

    def _what_failed(self) -> str:
        engine = self.endpoint.engine
        if engine.failure is not None:
            return engine.why_not()
        kind = type(self.stream.ticket.error).__name__
        return f"Decoding this request failed ({kind}); others are not affected. Send it again."

    def _take(self, new_ids: list[int]) -> str:
        """Add what a step brought to the answer and give the text that is certain now."""
        text = self._text.push(new_ids)
        if self.stream.finish_reason is not None:
            text += self._text.finish()
            self.answer.finish_reason = self.stream.finish_reason
        self.answer.output_ids += new_ids
        self.answer.text += text
        return text


class StreamedReply(StreamingResponse):
    """Server-sent events of one call, which ends when the client goes."""

    def __init__(self, call: Call) -> None:
        """Send nothing yet."""
        super().__init__(_events(call), media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; the call is closed even if it was never begun."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.close()


async def _events(call: Call) -> AsyncIterator[bytes]:
    """Yield the chunks of a stream, its usage if asked for, and its end."""
    answer = call.answer
    opening = answer.opening()
    if opening is not None:
        yield sse_event(opening)
    try:
        async for text, new_ids in call.pieces():
            if text or answer.finish_reason or (new_ids and answer.ask.returns_token_ids):
                yield sse_event(answer.piece(text, new_ids))
    except RefusedError as error:
        yield sse_event(error.body)
    else:
        if answer.ask.includes_usage:
            yield sse_event(answer.usage_chunk())
    yield b"data: [DONE]\n\n"


async def _unless_gone(request: Request, call: Call) -> Response:
    """Wait for the whole answer; if the client goes before, end the call."""
    answering = asyncio.ensure_future(call.whole())
    leaving = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            return Response(status_code=499)  # nobody reads it
        answer = answering.result()
        return _json(answer.whole(with_token_ids=answer.ask.returns_token_ids))
    finally:
        answering.cancel()
        leaving.cancel()
        call.close()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> Any:
    """Read the JSON body.

    The content type must be JSON's: a web page of another origin cannot send that to a server on
    this machine without asking, and so cannot write into its log.

    Raises:
        RefusedError: It is of another type, or no JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(
            f"The header content-type (={kind}) must be application/json. Set it.", status=415
        )
    try:
        return orjson.loads(await request.body())
    except orjson.JSONDecodeError as error:
        raise RefusedError(
            f"The body is not JSON (line {error.lineno}, column {error.colno}). Send a JSON object."
        ) from None
    except ClientDisconnect:
        raise RefusedError("The client has gone.", status=499) from None


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _json(error.body, status=error.status)


async def _http_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = RefusedError(
        f"{request.method} {request.url.path}: {error.detail}. Known paths are /v1/models, "
        "/v1/chat/completions, /v1/completions, /health and /metrics."
    )
    return _json(refused.body, status=error.status_code)


async def _fault(request: Request, error: Exception) -> Response:
    refused = RefusedError(
        f"The server failed ({type(error).__name__}). Its terminal says where.", kind="server_error"
    )
    return _json(refused.body, status=500)


def _json(content: Any, *, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status_code=status, media_type="application/json")


def sse_event(content: Any) -> bytes:
    """Give one server-sent event.

    In ASCII: several clients take U+2028 or U+0085 within a text for the end of a line.
    """
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
