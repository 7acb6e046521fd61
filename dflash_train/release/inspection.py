"""One conversation of a run as training will see it: which tokens are supervised, and why.

    dflash-train inspect recipe=smollm2 index=0
    dflash-train inspect recipe=smollm2 id=sha256:5be1 | less

Supervised tokens are green, tokens of an answer that a privacy placeholder takes out of training
are red, the prompt is dim. Where there is no colour (a pipe, NO_COLOR) they stand in `{+ +}` and
`[- -]`, as wdiff writes them. Control characters are spelt out: a log must not steer a terminal.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dflash_train.config import ServingSampling, require, take_keys
from dflash_train.records.chat_template import (
    RenderedRow,
    UnstableBoundaryError,
    render_request,
)
from dflash_train.records.conversation import Conversation, read_shard

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
del _CONTROLS[ord("\n")], _CONTROLS[ord("\t")]


@dataclass(frozen=True)
class _Look:
    """How tokens of one kind are shown: rich style, and marks where there is no colour."""

    style: str
    before: str = ""
    behind: str = ""


_PROMPT, _SUPERVISED, _MASKED = _Look("dim"), _Look("green", "{+", "+}"), _Look("red", "[-", "-]")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which conversation to show: the one with an id, or the n-th."""

    id: str | None = None
    """The id or its beginning, as long as that is no other's."""
    index: int | None = None
    """Place among the records that `ingest` wrote, from 0, shards in name order."""
    split: str | None = None
    """Look in this split only."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A record and the tokens that training would see of it."""

    record: Conversation
    tokenizer: PreTrainedTokenizerBase
    row: RenderedRow | None
    """None where no row can be made of it."""
    remark: str
    """Where the ids come from, or why there is no row or nothing supervised."""


def read_choice(arguments: list[str]) -> tuple[Choice, list[str]]:
    """Take `id=`, `index=` and `split=` out of the command line's arguments; give the others too.

    Raises:
        ValueError: Not exactly one of id and index is there, or index is no whole number.
    """
    found, others = take_keys(arguments, ("id", "index", "split"))
    require(
        ("id" in found) != ("index" in found),
        "id or index must be set, one of them: add id=sha256:... or index=0.",
    )
    index = found.get("index")
    require(
        index is None or index.isdecimal(),
        f"index (={index}) must be a whole number, 0 or more: the place of a record in the run.",
    )
    require(
        found.get("id") != "", "id (=) must not be empty. Give the beginning of an id, sha256:..."
    )
    number = None if index is None else int(index)
    return Choice(id=found.get("id"), index=number, split=found.get("split")), others


def find_record(run_dir: Path, choice: Choice) -> Conversation:
    """Read the chosen record, with the target's answer where `regenerate` has written it.

    Raises:
        ValueError: There is no such record, or several; the message names the key.
    """
    conversations = run_dir / "conversations"
    shards = sorted(conversations.glob("*.jsonl.gz"))
    require(
        bool(shards),
        f"{conversations} holds no record. Run `dflash-train ingest` with this recipe first.",
    )
    splits = sorted({_split_of(path) for path in shards})
    require(
        choice.split is None or choice.split in splits,
        f"split (={choice.split}) is not in this run. Known splits: {', '.join(splits)}.",
    )
    if choice.split is not None:
        shards = [path for path in shards if _split_of(path) == choice.split]
    record = _record_named(shards, choice) if choice.id else _record_at(shards, choice)
    answered = sorted((run_dir / "regenerated").glob(f"{record.split}-*.jsonl.gz"))
    twins = (twin for path in answered for twin in read_shard(path) if twin.id == record.id)
    return next(twins, record)


def prompt_view(
    record: Conversation, tokenizer: PreTrainedTokenizerBase, *, serving: ServingSampling
) -> View:
    """Show what the target will be asked: nothing of an off-policy record is supervised."""
    remark = f"{text_source(record)}, prompt only: `regenerate` has not written its answer"
    try:
        ids = render_request(tokenizer, record, serving=serving)
    except UnstableBoundaryError as error:
        return View(record=record, tokenizer=tokenizer, row=None, remark=f"none: {error}")
    row = RenderedRow(input_ids=ids, loss_mask=[False] * len(ids))
    return View(record=record, tokenizer=tokenizer, row=row, remark=remark)


def text_source(record: Conversation) -> str:
    """Say how the text of a record becomes tokens."""
    return "text as logged, no template" if record.has_rendered_prompt else "chat template"


def describe(view: View) -> Iterator[str]:
    """Yield what is known of a record beside its text, one fact a line; no content."""
    record, row = view.record, view.row
    yield f"id          {record.id}"
    yield f"split       {record.split}, turn {record.turn}, weight {record.weight}"
    served = [record.model, record.model_revision, record.adapter]
    yield f"model       {', '.join(part for part in served if part) or 'not logged'}"
    verdict = "on-policy" if record.on_policy else "off-policy"
    yield f"written by  {record.origin}, {verdict} ({record.on_policy_reason})"
    yield f"finished    {record.finish_reason or 'not logged'}"
    yield f"ids         {view.remark}"
    if row is not None:
        looks = list(_looks(row))
        counts = [looks.count(look) for look in (_PROMPT, _SUPERVISED, _MASKED)]
        yield f"tokens      {counts[0]} prompt, {counts[1]} supervised, {counts[2]} masked"
    redactions = [f"{kind} {number}" for kind, number in sorted(record.privacy.redactions.items())]
    yield f"redactions  {', '.join(redactions) or 'none'}"
    for index, start, end, kind in record.privacy.spans:
        role = record.messages[index].role
        yield f"            message {index} ({role}), characters {start} to {end}: {kind}"


def print_view(view: View, console: Console) -> None:
    """Print a record's facts and its tokens, supervised ones coloured or marked."""
    for line in describe(view):
        console.print(Text(line.translate(_CONTROLS)), soft_wrap=True)
    if view.row is None:
        return
    has_colour = console.color_system is not None and not console.no_color
    shown = Text()
    for look, text in _runs(view.row, view.tokenizer):
        spelt = text.translate(_CONTROLS)
        if has_colour:
            shown.append(spelt, style=look.style)
        else:
            shown.append(f"{look.before}{spelt}{look.behind}")
    console.print()
    console.print(shown, soft_wrap=True)


def _looks(row: RenderedRow) -> Iterator[_Look]:
    """Yield the look of each token: what is not supervised after the first that is, is masked."""
    first = row.loss_mask.index(True) if True in row.loss_mask else len(row.loss_mask)
    for place, wrote in enumerate(row.loss_mask):
        yield _SUPERVISED if wrote else _PROMPT if place < first else _MASKED


def _runs(row: RenderedRow, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[_Look, str]]:
    """Yield the text of each run of tokens that look the same."""
    read_to, text_before = 0, ""
    for look, run in itertools.groupby(_looks(row)):
        start, read_to = read_to, read_to + len(list(run))
        text = str(tokenizer.decode(row.input_ids[:read_to]))
        # Some tokenizers drop the space at a text's start, so a run is what it adds to the text.
        if text.startswith(text_before):
            yield look, text.removeprefix(text_before)
        else:  # a character ends only with this run
            yield look, str(tokenizer.decode(row.input_ids[start:read_to]))
        text_before = text


def _record_at(shards: list[Path], choice: Choice) -> Conversation:
    num_records = 0
    for record in (record for path in shards for record in read_shard(path)):
        if num_records == choice.index:
            return record
        num_records += 1
    where = f"the split {choice.split}" if choice.split else "this run"
    raise ValueError(
        f"index (={choice.index}) must be below {num_records}, the records of {where}. Lower it."
    )


def _record_named(shards: list[Path], choice: Choice) -> Conversation:
    """Give the record with this id, or the only one whose id begins with it."""
    assert choice.id is not None, "a search is for an id"
    found: list[Conversation] = []
    for record in (record for path in shards for record in read_shard(path)):
        if record.id == choice.id:
            return record
        if record.id.startswith(choice.id):
            found.append(record)
    require(
        bool(found),
        f"id (={choice.id}) is no record's here. Take one from the run's data, or give index=0.",
    )
    require(
        len(found) == 1,
        f"id (={choice.id}) begins the ids of {len(found)} records. Give more of it.",
    )
    return found[0]


def _split_of(shard: Path) -> str:
    return shard.name.rsplit("-", 1)[0]
