"""Servers answer in the target's place: sessions side by side, the turns of each in order.

As many sessions are under way as `data.endpoints.concurrency` allows requests, across the border of
two shards where one ends. Each answer goes into its shard's log before its session goes on. There
are no features then: `collect` computes them, as for logged answers that the target wrote itself.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from dflash_data.drops import DropReason, UnusableError, worst_first
from dflash_data.privacy.pseudonyms import load_pseudonyms
from dflash_data.regenerate.answer_log import AnswerLog, Outcome
from dflash_data.regenerate.answers import Answers, answer_seed, finish_record
from dflash_data.regenerate.completion_api import CompletionApi, Question
from dflash_data.regenerate.endpoint_replies import ServedModel
from dflash_data.regenerate.endpoints import Endpoints
from dflash_data.regenerate.plan import OpenShard
from dflash_train.config import DataConfig, RecipeConfig, require
from dflash_train.features.target_text import WrittenTarget
from dflash_train.records.chat_template import UnstableBoundaryError, render_request
from dflash_train.records.conversation import Conversation, Turn

Finish = Callable[[OpenShard, Answers], None]
"""Takes a shard once all of its records are answered or dropped."""


def answer_by_servers(
    shards: Iterator[OpenShard],
    *,
    config: RecipeConfig,
    target: WrittenTarget,
    folder: Path,
    finish: Finish,
    progress: "tqdm[NoReturn]",
) -> None:
    """Answer all records of the shards; what an earlier run has logged is not asked for again.

    Args:
        shards: Opened one by one, as the sessions of the one before are under way.
        config: The recipe.
        target: Its tokenizer renders the prompts.
        folder: Of the stage; the logs of answers go into its `answers/`.
        finish: Called once for each shard, in the order in which they are done.
        progress: Counts records; its total is their number.

    Raises:
        ValueError: The servers do not serve the target or refuse our requests, or one reason drops
            more than `data.max_drop_share`.
        UnavailableError: No server answers any more.
    """
    work = _ServedWork(
        config=config, target=target, folder=folder, finish=finish, progress=progress
    )
    try:
        asyncio.run(work.run(shards))
    finally:
        work.close_logs()
    _check_drops(work.dropped, num_asked=progress.n, data=config.data)


@dataclass(kw_only=True)
class _ShardUnderWay:
    """A shard whose sessions are being walked."""

    shard: OpenShard
    log: AnswerLog
    num_left: int
    """Sessions that are not answered yet."""
    answers: Answers = field(default_factory=Answers)


@dataclass(kw_only=True)
class _ServedWork:
    """The sessions of all shards, those under way in memory."""

    config: RecipeConfig
    target: WrittenTarget
    folder: Path
    finish: Finish
    progress: "tqdm[NoReturn]"
    dropped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._api = CompletionApi(self.config.data, self.target)
        self._pseudonyms = load_pseudonyms(self.config)
        self._greeting = asyncio.Lock()
        self._model: ServedModel | None = None
        self._logs: set[AnswerLog] = set()

    async def run(self, shards: Iterator[OpenShard]) -> None:
        """Walk all sessions, as many at once as there may be requests."""
        sessions = self._sessions(shards)
        async with Endpoints(self.config.data.endpoints) as endpoints:
            try:
                async with asyncio.TaskGroup() as walks:
                    for _ in range(self.config.data.endpoints.concurrency):
                        walks.create_task(self._walk(sessions, endpoints))
            except ExceptionGroup as group:
                first = group.exceptions[0]
                raise first from first.__cause__

    def close_logs(self) -> None:
        """Close the logs of shards that were under way."""
        for log in self._logs:
            log.close()

    def _sessions(self, shards: Iterator[OpenShard]) -> Iterator[tuple[_ShardUnderWay, list[str]]]:
        """Yield session by session; a shard is opened when the first of its own is wanted."""
        for shard in shards:
            groups = shard.plan.groups
            if not groups:
                self.finish(shard, Answers())
                continue
            log = AnswerLog(self.folder / "answers" / f"{shard.plan.name}.jsonl")
            self._logs.add(log)
            under_way = _ShardUnderWay(shard=shard, log=log, num_left=len(groups))
            for ids in groups:
                yield under_way, ids

    async def _walk(
        self, sessions: Iterator[tuple[_ShardUnderWay, list[str]]], endpoints: Endpoints
    ) -> None:
        """Take one session after the other and answer its turns in order."""
        for under_way, ids in sessions:
            shard, answers = under_way.shard, under_way.answers
            for record_id in ids:
                record = shard.histories.fill(shard.records[record_id], answers.records)
                if record is None:
                    answers.add(record_id, DropReason.content_missing)
                else:
                    outcome = await self._answer(record, under_way.log, endpoints)
                    answers.add(record_id, outcome)
                self.progress.update()
            under_way.num_left -= 1
            if under_way.num_left == 0:
                self._close(under_way)

    def _close(self, under_way: _ShardUnderWay) -> None:
        """Put the log of an answered shard in order and hand the shard on."""
        log, plan = under_way.log, under_way.shard.plan
        log.close()
        self._logs.remove(log)
        log.put_in_order(record_id for ids in plan.groups for record_id in ids)
        self.dropped.update(reason.value for reason in under_way.answers.dropped.values())
        self.finish(under_way.shard, under_way.answers)

    async def _answer(self, record: Conversation, log: AnswerLog, endpoints: Endpoints) -> Outcome:
        try:
            prompt_ids = render_request(self.target.tokenizer, record)
        except UnstableBoundaryError:
            return DropReason.unstable_boundary
        known = log.find(record.id, prompt_ids)
        if known is not None:
            return known
        seed = answer_seed(self.config.seed, record.id)
        question = Question(record=record, prompt_ids=prompt_ids, seed=seed)
        try:
            outcome = await self._ask(question, endpoints)
        except UnusableError as error:
            outcome = error.reason
        if outcome is not DropReason.not_success:  # another run may have better luck with that
            log.add(record.id, prompt_ids, outcome)
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


def _check_drops(dropped: Counter[str], *, num_asked: int, data: DataConfig) -> None:
    """Stop a run whose servers answer, but not with what can be kept."""
    for reason, count in dropped.items():
        require(
            count <= data.max_drop_share * num_asked,
            f"data.endpoints.urls: {count} of {num_asked} answers are unusable as {reason}, more "
            f"than data.max_drop_share (={data.max_drop_share}) allows (dropped: "
            f"{worst_first(dropped)}). See whether the servers serve the target with its own "
            "tokenizer, or raise that share.",
        )
