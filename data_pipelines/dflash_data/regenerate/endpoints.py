"""Several servers with OpenAI's API, used as one: the least busy first, failures tried again.

A try that meets a busy server (429), a broken one (5xx, garbage) or a silent one (no connection,
timeout) is repeated after a growing wait, on whichever server is then the least busy. A server
that fails several times in a row while another one works is set aside and named.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import httpx2
import orjson
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

from dflash_data.drops import DropReason, UnusableError
from dflash_data.regenerate.endpoint_replies import (
    BUSY,
    GarbledReplyError,
    RefusedError,
    ServedModel,
    authorization,
    check_status,
    common_model,
    json_object,
    retry_after_s,
    served_model,
)
from dflash_data.regenerate.endpoint_roster import Endpoint, Roster
from dflash_train.config import EndpointsConfig

LONGEST_WAIT_S = 60.0
Answer = TypeVar("Answer")
Probe = Callable[[str], dict[str, Any]]
Check = Callable[[dict[str, Any], str], None]


class _FailedTryError(Exception):
    """One try met a busy, broken or silent server; another may succeed."""

    def __init__(self, problem: str, retry_after_s: float | None = None) -> None:
        super().__init__(problem)
        self.retry_after_s = retry_after_s


@dataclass
class Endpoints:
    """Asks the servers of `data.endpoints`; an async context manager."""

    config: EndpointsConfig

    def __post_init__(self) -> None:
        self._roster = Roster(self.config.urls)
        self._client = httpx2.AsyncClient(
            timeout=self.config.timeout_s,
            limits=httpx2.Limits(max_connections=self.config.concurrency),
            headers={"Content-Type": "application/json"} | authorization(self.config),
        )
        self._growing_wait = wait_exponential_jitter(
            multiplier=self.config.retry_wait_s, max=LONGEST_WAIT_S, jitter=self.config.retry_wait_s
        )

    async def __aenter__(self) -> "Endpoints":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def greet(self, path: str, probe: Probe, check: Check) -> ServedModel:
        """Ask every server for its model and one short answer; silent ones are set aside.

        Args:
            path: Path of the requests to come, such as `/completions`.
            probe: Makes a request like those to come from the model's name.
            check: Checks the reply to it, given the model's name.

        Raises:
            ValueError: The servers do not serve the model, or refuse such a request.
            UnavailableError: None of them answers.
        """

        async def greet_all() -> list[ServedModel]:
            each = (
                self._greet(endpoint, path, probe, check) for endpoint in self._roster.endpoints
            )
            found = [model for model in await asyncio.gather(*each) if model is not None]
            if not found:
                raise _FailedTryError("no server answers")
            return found

        try:
            models = await self._retrying()(greet_all)
        except _FailedTryError as error:
            raise self._roster.none_left() from error
        for endpoint in self._roster.endpoints:
            if endpoint.last_problem:
                self._roster.set_aside(endpoint)
        return common_model(models)

    async def ask(
        self, path: str, request: dict[str, Any], read: Callable[[dict[str, Any]], Answer]
    ) -> Answer:
        """Send a request until some server answers it.

        Args:
            path: Such as `/completions`.
            request: The JSON body.
            read: Reads the reply; GarbledReplyError has it asked for again.

        Raises:
            UnusableError: The servers answer others, but not this one.
            UnavailableError: They answer nothing any more.
        """
        num_answers_before = self._roster.num_answers

        async def ask_once() -> Answer:
            endpoint = self._roster.least_busy()
            return await self._try(endpoint, lambda: self._post(endpoint, path, request, read))

        try:
            return await self._retrying()(ask_once)
        except RefusedError as error:  # servers took the probe: it is this request
            raise UnusableError(DropReason.not_success) from error
        except _FailedTryError as error:
            if self._roster.num_answers > num_answers_before:
                raise UnusableError(DropReason.not_success) from error
            raise self._roster.none_left() from error

    def _retrying(self) -> AsyncRetrying:
        return AsyncRetrying(
            retry=retry_if_exception_type(_FailedTryError),
            stop=stop_after_attempt(1 + self.config.max_retries),
            wait=self._wait,
            reraise=True,
        )

    def _wait(self, state: RetryCallState) -> float:
        """Give the seconds until the next try: the server's own, else growing ones."""
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, _FailedTryError) and error.retry_after_s is not None:
            return error.retry_after_s
        return self._growing_wait(state)

    async def _try(self, endpoint: Endpoint, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Make one call and keep the books of its server."""
        endpoint.num_open += 1
        try:
            answer = await call()
        except httpx2.TransportError as error:
            raise self._failed(endpoint, type(error).__name__) from error
        except GarbledReplyError as error:
            raise self._failed(endpoint, "a reply that is not of the API's form") from error
        except httpx2.HTTPStatusError as error:
            status, wait_s = error.response.status_code, retry_after_s(error.response)
            if status == BUSY:  # it works, and has enough to do
                raise _FailedTryError("busy", wait_s) from None
            raise self._failed(endpoint, f"HTTP status {status}", wait_s) from None
        finally:
            endpoint.num_open -= 1
        self._roster.note_success(endpoint)
        return answer

    def _failed(
        self, endpoint: Endpoint, problem: str, retry_after_s: float | None = None
    ) -> _FailedTryError:
        self._roster.note_failure(endpoint, problem)
        return _FailedTryError(problem, retry_after_s)

    async def _post(
        self,
        endpoint: Endpoint,
        path: str,
        request: dict[str, Any],
        read: Callable[[dict[str, Any]], Answer],
    ) -> Answer:
        response = await self._client.post(endpoint.url + path, content=orjson.dumps(request))
        check_status(response, endpoint.url, request)
        try:
            answer = read(json_object(response))
        except UnusableError:
            self._roster.num_answers += 1  # of good form, if of no use
            raise
        self._roster.num_answers += 1
        return answer

    async def _greet(
        self, endpoint: Endpoint, path: str, probe: Probe, check: Check
    ) -> ServedModel | None:
        """Give what one server serves; None if it is silent."""
        try:
            model = await self._try(endpoint, lambda: self._model_of(endpoint))
            name = model.name
            await self._try(
                endpoint,
                lambda: self._post(endpoint, path, probe(name), lambda reply: check(reply, name)),
            )
        except _FailedTryError:
            return None
        except RefusedError as error:
            raise ValueError(
                f"data.endpoints: {error}. Set data.endpoints.api to the other of completions and "
                "chat, or update the server."
            ) from error
        return model

    async def _model_of(self, endpoint: Endpoint) -> ServedModel:
        response = await self._client.get(endpoint.url + "/models")
        return served_model(response, endpoint.url, self.config)
