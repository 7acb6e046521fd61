"""The target answers in this process; its features are kept from the passes that wrote the answers.

Each batch leaves one feature shard and then, as its mark of completion, its records, so a batch cut
short is done again whole and a killed run ends with the same bytes. Rows whose answer had to be
redacted stand in no shard: their tokens are not what the target wrote. `collect` runs them through
the target with the placeholders masked.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import orjson
import torch
from tqdm import tqdm

from dflash_data.collect.feature_rows import feature_row, has_exact_ids, index_line
from dflash_data.drops import DropReason
from dflash_data.privacy.pseudonyms import load_pseudonyms
from dflash_data.regenerate.answers import (
    Answer,
    Answers,
    answer_seed,
    answer_text,
    finish_record,
)
from dflash_data.regenerate.plan import OpenShard, ShardPlan
from dflash_train.config import FeaturesFrom, RecipeConfig
from dflash_train.features.generated_row import GeneratedRow
from dflash_train.features.sampling import RowSampler, is_plain_greedy
from dflash_train.features.store import (
    TOKENS_PREFIX,
    FeatureRow,
    IndexLine,
    write_index,
    write_token_shard,
)
from dflash_train.features.store import write_shard as write_feature_shard
from dflash_train.features.target import Target
from dflash_train.records.chat_template import UnstableBoundaryError, render_request
from dflash_train.records.conversation import Conversation, Turn, read_shard, write_shard
from dflash_train.records.manifest import write_bytes


@dataclass
class GeneratedAnswers:
    """Works through shards batch by batch, in one folder."""

    config: RecipeConfig
    target: Target
    folder: Path

    def __post_init__(self) -> None:
        self._pseudonyms = load_pseudonyms(self.config)
        self._keeps_features = self.config.data.features is FeaturesFrom.stored
        self._lines: dict[str, list[IndexLine]] = defaultdict(list)

    def answer(self, shard: OpenShard, progress: "tqdm[NoReturn]") -> Answers:
        """Answer the records of a shard; batches finished by an earlier run are read back."""
        answers = Answers()
        for number, ids in enumerate(shard.plan.groups):
            place = _Batch(shard=shard.plan, number=number, folder=self.folder)
            if not self._is_done(place):
                filled = {i: shard.histories.fill(shard.records[i], answers.records) for i in ids}
                self._answer_batch(place, filled)
            batch = place.read_back()
            answers.records |= batch.records
            answers.dropped |= batch.dropped
            self._note_rows(place, batch)
            progress.update(len(ids))
        return answers

    def write_indexes(self) -> None:
        """Write the index of each split's feature shards."""
        for split, lines in self._lines.items():
            write_index(self.folder / "features" / split, lines)

    def _note_rows(self, place: "_Batch", batch: Answers) -> None:
        """Note where the rows of a batch stand: in its shard, in the order of its plan."""
        shard = self._shard_of(place)
        if shard is None:  # no record has ids
            return
        kept = [batch.records[i] for i in place.ids if i in batch.records]
        for row, record in enumerate(record for record in kept if has_exact_ids(record)):
            line = index_line(record, self.config.data, shard=shard.name, row=row)
            self._lines[place.shard.split].append(line)

    def _answer_batch(self, place: "_Batch", filled: dict[str, Conversation | None]) -> None:
        """Answer records together; write features and teacher of the passes that did, records."""
        prompts, dropped = self._render(filled)
        asked = [record for i, record in filled.items() if record is not None and i in prompts]
        rows = self._generate(asked, list(prompts.values())) if asked else []
        records: list[Conversation] = []
        feature_rows = []
        for record, row in zip(asked, rows, strict=True):
            outcome = self._finish(record, prompts[record.id], row)
            if isinstance(outcome, DropReason):
                dropped[record.id] = outcome
                continue
            records.append(outcome)
            if has_exact_ids(outcome):
                data = self.config.data
                feature_rows.append(feature_row(outcome, row.features, data, teacher=row.teacher))
        if feature_rows:
            self._write_rows(place, feature_rows)
        if dropped:
            reasons = {record_id: reason.value for record_id, reason in dropped.items()}
            write_bytes(place.drops_path, orjson.dumps(reasons))
        write_shard(place.records_path, records)  # last: it says that the batch is done

    def _write_rows(self, place: "_Batch", rows: list[FeatureRow]) -> None:
        """Write the rows of a batch, with their features unless those are computed online."""
        if not self._keeps_features:
            write_token_shard(place.tokens_path, rows)
            return
        write_feature_shard(
            place.features_path,
            rows,
            dtype=getattr(torch, self.config.data.features_dtype.value),
            num_taps=len(self.target.target_layer_ids),
        )

    def _render(
        self, filled: dict[str, Conversation | None]
    ) -> tuple[dict[str, list[int]], dict[str, DropReason]]:
        """Give the prompts of the records that can be asked, and why the others cannot."""
        prompts: dict[str, list[int]] = {}
        dropped: dict[str, DropReason] = {}
        for record_id, record in filled.items():
            if record is None:
                dropped[record_id] = DropReason.content_missing
                continue
            try:
                prompts[record_id] = render_request(self.target.tokenizer, record)
            except UnstableBoundaryError:
                dropped[record_id] = DropReason.unstable_boundary
        return prompts, dropped

    def _generate(self, asked: list[Conversation], prompts: list[list[int]]) -> list[GeneratedRow]:
        data = self.config.data
        samplers = None
        if not is_plain_greedy(data.serving_sampling):
            seeds = [answer_seed(self.config.seed, record.id) for record in asked]
            samplers = [
                RowSampler(prompt, data.serving_sampling, seed=seed)
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
        return self.target.generate_batch(
            prompts,
            max_new_tokens=data.max_new_tokens,
            teacher_top_k=data.teacher_top_k,
            samplers=samplers,
        )

    def _finish(
        self, asked: Conversation, prompt_ids: list[int], row: GeneratedRow
    ) -> Conversation | DropReason:
        text = answer_text(row.output_ids, self.target)
        usage = {"prompt_tokens": len(prompt_ids), "completion_tokens": len(row.output_ids)}
        answer = Answer(
            turn=Turn(role="assistant", content=text),
            finish_reason=row.finish_reason,
            prompt_ids=prompt_ids,
            output_ids=row.output_ids,
            usage=usage,
        )
        return finish_record(asked, answer, target=self.target, pseudonyms=self._pseudonyms)

    def _shard_of(self, place: "_Batch") -> Path | None:
        """Give the shard with the rows of a batch that serves this recipe; None before it is there.

        Where features are online, one that has them serves too.
        """
        paths = [place.features_path]
        if not self._keeps_features:
            paths.append(place.tokens_path)
        return next((path for path in paths if path.exists()), None)

    def _is_done(self, place: "_Batch") -> bool:
        """Say whether an earlier run has finished a batch and nothing of it is missing."""
        if not place.records_path.exists():
            return False
        batch = place.read_back()
        needs_shard = any(has_exact_ids(record) for record in batch.records.values())
        has_shard = self._shard_of(place) is not None or not needs_shard
        return has_shard and len(batch.records) + len(batch.dropped) == len(place.ids)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """One group of a plan, and the files that it leaves."""

    shard: ShardPlan
    number: int
    folder: Path
    """Of the stage."""

    @property
    def ids(self) -> list[str]:
        """The records to answer together."""
        return self.shard.groups[self.number]

    @property
    def records_path(self) -> Path:
        """Answered records; the mark of completion."""
        return self.folder / "batches" / self.shard.name / f"{self.number:05d}.jsonl.gz"

    @property
    def drops_path(self) -> Path:
        """Why the others have no answer."""
        return self.folder / "batches" / self.shard.name / f"{self.number:05d}-dropped.json"

    @property
    def features_path(self) -> Path:
        """Features of the answered records that have exact token ids."""
        return self._folder_of_shards / f"batch-{self._number}.safetensors"

    @property
    def tokens_path(self) -> Path:
        """The same records without features, where those are computed online."""
        return self._folder_of_shards / f"{TOKENS_PREFIX}{self._number}.safetensors"

    @property
    def _folder_of_shards(self) -> Path:
        return self.folder / "features" / self.shard.split

    @property
    def _number(self) -> str:
        return f"{self.shard.name.rsplit('-', 1)[1]}-{self.number:05d}"

    def read_back(self) -> Answers:
        """Read what became of the records of a finished batch."""
        records = {record.id: record for record in read_shard(self.records_path)}
        reasons = orjson.loads(self.drops_path.read_bytes()) if self.drops_path.exists() else {}
        dropped = {record_id: DropReason(reason) for record_id, reason in reasons.items()}
        return Answers(records=records, dropped=dropped)
