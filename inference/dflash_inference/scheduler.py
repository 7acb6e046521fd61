"""Continuous batching: who decodes now, who waits, and who has left.

Requests are admitted in the order of their arrival as long as the rows of their caches, prompt and
generation budget together, fit the token budget; none overtakes another. Between two steps they
join, end or are cancelled, and whoever leaves gives its rows back at once.

A request that raises leaves alone: a step that fails is undone and taken again for each request by
itself, which changes nobody's tokens. One thread calls all of this; engine.py is that thread.
"""

import copy
from collections import Counter, deque
from dataclasses import dataclass, field, fields
from typing import Any

from dflash_inference.cache import KeyValueCache
from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.request import RequestState
from dflash_inference.sampling import SamplingParams
from dflash_inference.trace import StepTrace
from dflash_train.config import require
from dflash_train.drafter.model import ContextCache


@dataclass(kw_only=True, eq=False)
class Ticket:
    """One request from its arrival to its end."""

    state: RequestState
    error: Exception | None = None
    """What it raised; its finish reason is then `error`."""

    @property
    def num_rows(self) -> int:
        """Cache rows that are set aside for it."""
        return self.state.max_length

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, in whichever way."""
        return self.state.finish_reason is not None

    def fail(self, error: Exception) -> None:
        """End with an error; what has ended stays as it is."""
        if not self.is_finished:
            self.error, self.state.finish_reason = error, "error"

    def release(self) -> None:
        """Let go of the caches; tokens and steps stay."""
        self.state.target_cache = KeyValueCache(capacity=0)
        self.state.drafter_cache = ContextCache()
        self.state.pending_parts = []


@dataclass(kw_only=True)
class SchedulerCounts:
    """What has happened since the start; numbers only grow."""

    finished: Counter[str] = field(default_factory=Counter)
    """Requests by finish reason."""
    prompt_tokens: int = 0
    """Prompt tokens of admitted requests."""
    output_tokens: int = 0
    drafts: int = 0
    """Steps that verified at least one drafted token."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: Counter[int] = field(default_factory=Counter)
    """Drafts that verify kept, by position; the first drafted token stands at 0."""

    def add(self, step: StepTrace) -> None:
        """Count one verify step."""
        if step.width == 1:
            return
        self.drafts += 1
        self.draft_tokens += step.width - 1
        self.accepted_tokens += step.num_accepted
        self.accepted_at.update(range(step.num_accepted))


class Scheduler:
    """Decodes the requests of a queue, as many at once as the budget holds."""

    def __init__(
        self, decoder: SpeculativeDecoder, *, token_budget: int, most_requests: int
    ) -> None:
        """Start with an empty queue.

        Args:
            decoder: Takes the steps.
            token_budget: Cache rows that running requests may hold together.
            most_requests: Requests that run at once, at most.

        Raises:
            ValueError: A limit is below 1.
        """
        require(token_budget >= 1, f"token_budget (={token_budget}) must be at least 1.")
        require(most_requests >= 1, f"most_requests (={most_requests}) must be at least 1.")
        self.decoder = decoder
        self.token_budget = token_budget
        self.most_requests = most_requests
        self.counts = SchedulerCounts()
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []

    @property
    def num_running(self) -> int:
        """Requests that hold cache rows."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that have not been admitted."""
        return len(self._waiting)

    @property
    def tokens_held(self) -> int:
        """Cache rows of the running requests."""
        return sum(ticket.num_rows for ticket in self._running)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self._waiting and not self._running

    @property
    def tickets(self) -> list[Ticket]:
        """Give all unfinished requests, those that run first."""
        return [*self._running, *self._waiting]

    def new_ticket(self, prompt_ids: list[int], params: SamplingParams) -> Ticket:
        """Make a request that fits the budget; any thread may ask.

        Raises:
            ValueError: The prompt is empty, or the request is larger than the whole budget.
        """
        num_rows = len(prompt_ids) + params.max_new_tokens
        require(
            num_rows <= self.token_budget,
            f"max_tokens (={params.max_new_tokens}) and a prompt of {len(prompt_ids)} tokens need "
            f"{num_rows} cache rows, more than the token budget (={self.token_budget}). Lower "
            "max_tokens, or raise serve.token_budget.",
        )
        return Ticket(state=self.decoder.new_request(prompt_ids, params))

    def enqueue(self, ticket: Ticket) -> None:
        """Put a request at the end of the queue."""
        self._waiting.append(ticket)

    def submit(self, prompt_ids: list[int], params: SamplingParams) -> Ticket:
        """Make a request and put it at the end of the queue.

        Raises:
            ValueError: As `new_ticket`.
        """
        ticket = self.new_ticket(prompt_ids, params)
        self.enqueue(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request now, waiting or running; one that has ended stays as it is."""
        if ticket.is_finished:
            return
        ticket.state.finish_reason = "cancelled"
        self._retire()

    def step(self) -> list[Ticket]:
        """Admit, take one step, retire; give the requests that took part, the ended ones too."""
        self._admit()
        taking_part = list(self._running)
        before = [len(ticket.state.steps) for ticket in taking_part]
        lengths = [len(ticket.state.token_ids) for ticket in taking_part]
        self._step(taking_part)
        for ticket, num_steps, length in zip(taking_part, before, lengths, strict=True):
            self.counts.output_tokens += len(ticket.state.token_ids) - length
            for step in ticket.state.steps[num_steps:]:
                self.counts.add(step)
        self._retire()
        return taking_part

    def _admit(self) -> None:
        """Let the first of the queue in as long as they fit."""
        held = self.tokens_held
        while self._waiting and len(self._running) < self.most_requests:
            held += self._waiting[0].num_rows
            if held > self.token_budget:
                return
            ticket = self._waiting.popleft()
            self.counts.prompt_tokens += ticket.state.prompt_length
            self._running.append(ticket)

    def _step(self, tickets: list[Ticket]) -> None:
        """Step together; if that raises, each request by itself, from where it was."""
        if not tickets:
            return
        saved = [_saved(ticket.state) for ticket in tickets]
        try:
            self.decoder.step([ticket.state for ticket in tickets])
        except Exception as error:  # a boundary: whatever it is, only its request may end of it
            for ticket, fields_before in zip(tickets, saved, strict=True):
                _restore(ticket.state, fields_before)
            if len(tickets) == 1:
                tickets[0].fail(error)
                return
            for ticket in tickets:
                self._step([ticket])

    def _retire(self) -> None:
        """Take the finished requests off both lists and free their rows."""
        for ticket in [each for each in self.tickets if each.is_finished]:
            assert ticket.state.finish_reason is not None
            self.counts.finished[ticket.state.finish_reason] += 1
            ticket.release()
        self._running = [ticket for ticket in self._running if not ticket.is_finished]
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.is_finished)


def _saved(state: RequestState) -> dict[str, Any]:
    """Copy what a step changes; a step replaces tensors and never writes into rows that count."""
    saved = {each.name: copy.copy(getattr(state, each.name)) for each in fields(state)}
    saved["sampler"] = copy.deepcopy(state.sampler)  # its random stream moves
    return saved


def _restore(state: RequestState, saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        setattr(state, name, value)
