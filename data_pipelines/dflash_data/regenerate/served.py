"""Servers answer in the target's place: sessions side by side, the turns of each in order.

As many sessions are under way as `data.endpoints.concurrency` allows requests. Each answer goes
into the log before its session goes on. There are no features then: `collect` computes them, as for
logged answers that the target wrote itself.
"""

import asyncio
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from dflash_data.drops import DropReason, UnusableError, worst_first
from dflash_data.privacy.pseudonyms import load_pseudonyms
from dflash_data.regenerate.answer_log import AnswerLog, Outcome
from dflash_data.regenerate.answers import Answers, Histories, answer_seed, finish_record
from dflash_data.regenerate.completion_api import CompletionApi, Question
from dflash_data.regenerate.endpoint_replies import ServedModel
from dflash_data.regenerate.endpoints import Endpoints
from dflash_data.regenerate.plan import Group, Plan
from dflash_train.config import DataConfig, RecipeConfig, require
from dflash_train.features.target_text import WrittenTarget
from dflash_train.records.chat_template import UnstableBoundaryError, render_request
from dflash_train.records.conversation import Conversation, Turn


def answer_by_servers(
    plan: Plan,
    open_records: dict[str, Conversation],
    histories: Histories,
    *,
    config: RecipeConfig,
    target: WrittenTarget,
    folder: Path,
) -> Answers:
    """Answer all records of a plan; what an earlier run has logged is not asked for again.

    Raises:
        ValueError: The servers do not serve the target or refuse our requests, or one reason drops
            more than `data.max_drop_share`.
        UnavailableError: No server answers any more.
    """
    ids = [record_id for group in plan.groups for record_id in group.ids]
    with AnswerLog(folder) as log:
        work = _ServedWork(
            config=config,
            target=target,
            open_records=open_records,
            histories=histories,
            log=log,
        )
        if ids:
            asyncio.run(work.run(plan))
        _check_drops(work.answers, config.data)
        log.put_in_order(ids)
    return work.answers


@dataclass(kw_only=True)
class _ServedWork:
    """The sessions of one plan under way."""

    config: RecipeConfig
    target: WrittenTarget
    open_records: dict[str, Conversation]
    histories: Histories
    log: AnswerLog
    answers: Answers = field(default_factory=Answers)

    def __post_init__(self) -> None:
        self._api = CompletionApi(self.config.data, self.target)
        self._pseudonyms = load_pseudonyms(self.config)
        self._greeting = asyncio.Lock()
        self._model: ServedModel | None = None

    async def run(self, plan: Plan) -> None:
        """Walk all sessions, as many at once as there may be requests."""
        sessions = iter(plan.groups)
        num_rows = sum(len(group.ids) for group in plan.groups)
        async with Endpoints(self.config.data.endpoints) as endpoints:
            with tqdm(total=num_rows, desc="regenerate", unit="row", file=sys.stderr) as progress:
                try:
                    async with asyncio.TaskGroup() as walks:
                        for _ in range(min(self.config.data.endpoints.concurrency, num_rows)):
                            walks.create_task(self._walk(sessions, endpoints, progress))
                except ExceptionGroup as group:
                    first = group.exceptions[0]
                    raise first from first.__cause__

    async def _walk(
        self, sessions: Iterator[Group], endpoints: Endpoints, progress: "tqdm[NoReturn]"
    ) -> None:
        """Take one session after the other and answer its turns in order."""
        for session in sessions:
            for record_id in session.ids:
                record = self.histories.fill(self.open_records[record_id], self.answers.records)
                if record is None:
                    self.answers.add(record_id, DropReason.content_missing)
                else:
                    self.answers.add(record_id, await self._answer(record, endpoints))
                progress.update()

    async def _answer(self, record: Conversation, endpoints: Endpoints) -> Outcome:
        try:
            prompt_ids = render_request(self.target.tokenizer, record)
        except UnstableBoundaryError:
            return DropReason.unstable_boundary
        known = self.log.find(record.id, prompt_ids)
        if known is not None:
            return known
        seed = answer_seed(self.config.seed, record.id)
        question = Question(record=record, prompt_ids=prompt_ids, seed=seed)
        try:
            outcome = await self._ask(question, endpoints)
        except UnusableError as error:
            outcome = error.reason
        if outcome is not DropReason.not_success:  # another run may have better luck with that
            self.log.add(record.id, prompt_ids, outcome)
        return outcome

    async def _ask(self, question: Question, endpoints: Endpoints) -> Outcome:
        """Ask one question and finish its record.

        Raises:
            UnusableError: There is no answer to keep, for the reason that it carries.
        """
        model = await self._greet(endpoints)
        budget = self.config.data.max_new_tokens
        if model.max_tokens is not None and len(question.prompt_ids) + budget > model.max_tokens:
            raise UnusableError(DropReason.too_long)
        answer = await endpoints.ask(
            self._api.path,
            self._api.request(question, model.name, max_tokens=budget),
            lambda reply: self._api.read(reply, question, model.name),
        )
        return finish_record(
            question.record, answer, target=self.target, pseudonyms=self._pseudonyms
        )

    async def _greet(self, endpoints: Endpoints) -> ServedModel:
        """Get to know the servers before the first question."""
        async with self._greeting:
            if self._model is None:
                self._model = await endpoints.greet(self._api.path, self._probe, self._api.check)
            return self._model

    def _probe(self, model: str) -> dict[str, object]:
        """Write a request like those to come, without anybody's words in it."""
        hello = Conversation(id="", source="", messages=[Turn(role="user", content="Hello.")])
        prompt_ids = render_request(self.target.tokenizer, hello)
        question = Question(record=hello, prompt_ids=prompt_ids, seed=0)
        return self._api.request(question, model, max_tokens=1)


def _check_drops(answers: Answers, data: DataConfig) -> None:
    """Stop a run whose servers answer, but not with what can be kept."""
    counts = Counter(reason.value for reason in answers.dropped.values())
    num_asked = len(answers.records) + len(answers.dropped)
    for reason, count in counts.items():
        require(
            count <= data.max_drop_share * num_asked,
            f"data.endpoints.urls: {count} of {num_asked} answers are unusable as {reason}, more "
            f"than data.max_drop_share (={data.max_drop_share}) allows (dropped: "
            f"{worst_first(counts)}). See whether the servers serve the target with its own "
            "tokenizer, or raise that share.",
        )
