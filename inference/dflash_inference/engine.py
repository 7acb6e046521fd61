"""A scheduler on a thread of its own, and coroutines that listen to it.

The event loop only makes tickets and reads queues; all else happens on the engine's thread, which
takes orders (join, cancel, stop) between two steps. Tokens go to each listener as they are
committed.

A request that raises ends alone (scheduler.py). If the scheduler itself raises, no request can be
trusted to its caches any more: all of them end as errors, `failure` says why, and serve.py ends
the server with it, so that whoever watches the process starts a fresh one.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from dflash_inference.sampling import SamplingParams
from dflash_inference.scheduler import Scheduler, Ticket
from dflash_train.config import UnavailableError


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a step brought one request."""

    new_ids: list[int]
    finish_reason: str | None = None


class TokenStream:
    """The tokens of one request as they come; iterate it once."""

    def __init__(self, ticket: Ticket, cancel: Callable[["TokenStream"], None]) -> None:
        """Listen from the running event loop."""
        self.ticket = ticket
        self.finish_reason: str | None = None
        """None until the iteration has ended."""
        self._cancel = cancel
        self._loop = asyncio.get_running_loop()
        self._arrivals: asyncio.Queue[Progress] = asyncio.Queue()
        self._num_sent = 0

    async def __aiter__(self) -> AsyncIterator[list[int]]:
        """Yield the new tokens of each step; the last list may be empty."""
        while self.finish_reason is None:
            progress = await self._arrivals.get()
            self.finish_reason = progress.finish_reason
            yield progress.new_ids

    def cancel(self) -> None:
        """Ask for the end of the request; nothing happens if it has ended."""
        self._cancel(self)

    def publish(self) -> None:
        """Send what is new; the engine's thread calls it."""
        state = self.ticket.state
        new_ids = state.output_ids[self._num_sent :]
        self._num_sent += len(new_ids)
        if (new_ids or state.finish_reason) and not self._loop.is_closed():
            progress = Progress(new_ids=new_ids, finish_reason=state.finish_reason)
            self._loop.call_soon_threadsafe(self._arrivals.put_nowait, progress)


class Engine:
    """Runs a scheduler until it is closed or fails."""

    def __init__(self, scheduler: Scheduler) -> None:
        """Start the thread; it sleeps while there is nothing to decode."""
        self.scheduler = scheduler
        self.failure: Exception | None = None
        """What ended the thread, if it did not end because it was asked to."""
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[Ticket, TokenStream] = {}
        self._is_closing = False
        self._last_call = threading.Lock()
        """Held while an order of `submit` is put, so that none comes after the last were taken."""
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._is_closing

    def submit(self, prompt_ids: list[int], params: SamplingParams) -> TokenStream:
        """Queue a request from the event loop's thread.

        Raises:
            ValueError: The request is empty, or larger than the whole budget.
            UnavailableError: The engine is shutting down, or has failed.
        """
        stream = TokenStream(self.scheduler.new_ticket(prompt_ids, params), self._order_cancel)
        with self._last_call:
            if not self.is_running:
                raise UnavailableError(self.why_not())
            self._orders.put(lambda: self._join(stream))
        return stream

    def why_not(self) -> str:
        """Say, for clients, why no requests are taken."""
        if self.failure is None:
            return "The server is shutting down. Start it again."
        kind = type(self.failure).__name__
        return f"The decoder has failed ({kind}), and the server ends. Start it again."

    def stop(self) -> None:
        """End all requests as cancelled and take no more; returns at once, from any thread."""
        self._is_closing = True
        self._orders.put(lambda: None)  # wakes it up

    def close(self) -> None:
        """Stop, and wait until the step in progress has ended."""
        self.stop()
        self._thread.join()

    def _order_cancel(self, stream: TokenStream) -> None:
        self._orders.put(lambda: self._cancel(stream))

    def _join(self, stream: TokenStream) -> None:
        self._streams[stream.ticket] = stream
        self.scheduler.enqueue(stream.ticket)

    def _cancel(self, stream: TokenStream) -> None:
        """End a request; without the scheduler, if that is what has failed."""
        if self.failure is None:
            self.scheduler.cancel(stream.ticket)
        else:
            stream.ticket.fail(self.failure)
        self._publish(stream.ticket)

    def _publish(self, ticket: Ticket) -> None:
        """Tell the listener, and forget it once the request has ended."""
        stream = self._streams.get(ticket)
        if stream is None:
            return
        stream.publish()
        if ticket.is_finished:
            del self._streams[ticket]

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._take_orders()
                for ticket in self.scheduler.step():
                    self._publish(ticket)
        except Exception as error:  # a boundary: nobody may wait for a thread that has ended
            self.failure = error
        self._is_closing = True
        with self._last_call:
            self._take_orders()
        for stream in list(self._streams.values()):
            self._cancel(stream)

    def _take_orders(self) -> None:
        """Do what was asked for since the last step; wait for it if there is nothing else."""
        if self.scheduler.is_idle and not self._is_closing:
            self._orders.get()()
        while not self._orders.empty():
            self._orders.get()()
