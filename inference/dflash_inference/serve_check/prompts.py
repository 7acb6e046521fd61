"""The held-out prompts that are replayed: token ids, whoever rendered them.

A place is a file of JSON lines with `prompt_token_ids`, a folder of features (the test split of a
run), or an evaluation set as `evaluate.eval_sets` names it (eval_sets.py), which the target's chat
template renders.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from dflash_inference.eval_sets import load_eval_set
from dflash_inference.live import choose_prompts
from dflash_train.config import EvaluateConfig, require
from dflash_train.features.store import FeatureStore
from dflash_train.features.target import Target
from dflash_train.records.chat_template import render_prompt

_KEY = "prompt_token_ids"


@dataclass(kw_only=True)
class Prompt:
    """One request."""

    id: str
    token_ids: list[int]


def read_prompts(
    place: str, *, num_prompts: int, target: Target, config: EvaluateConfig
) -> list[Prompt]:
    """Read at most so many prompts.

    Args:
        place: A file, a folder of features or the name of an evaluation set.
        num_prompts: At least 1.
        target: Whose chat template renders messages.
        config: Seed of the choice, folder of datasets.

    Raises:
        ValueError: There is no prompt, or a line is none.
        UnavailableError: The evaluation set is not there.
    """
    path = Path(place)
    if path.is_dir():
        wanted = replace(config, live_traffic=num_prompts)
        chosen = choose_prompts(wanted, {"test": FeatureStore.open(path)})
        prompts = [Prompt(id=each.row.id, token_ids=each.token_ids) for each in chosen]
    elif path.is_file() and _holds_ids(path):
        lines = path.read_bytes().splitlines()[:num_prompts]
        prompts = [_read_line(line, path, number) for number, line in enumerate(lines, start=1)]
    else:
        records = load_eval_set(place, num_prompts=num_prompts, datasets_dir=config.datasets_dir)
        # Later turns build on an answer of the target's own, which nobody has written here.
        prompts = [
            Prompt(id=each.id, token_ids=render_prompt(target.tokenizer, each.messages))
            for each in records
            if all(turn.content for turn in each.messages)
        ]
    require(bool(prompts), f"prompts (={place}) holds no prompt. Give a file or folder with some.")
    return prompts


def _holds_ids(path: Path) -> bool:
    with path.open("rb") as stream:
        return b'"prompt_token_ids"' in stream.readline()


def _read_line(line: bytes, path: Path, number: int) -> Prompt:
    try:
        return Prompt(id=f"{path.name}:{number}", token_ids=orjson.loads(line)[_KEY])
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"prompts (={path}): line {number} is no JSON object with {_KEY} "
            f"({type(error).__name__}). Give one a line."
        ) from error
