"""The verb `serve-check`: a drafter in a real server, compared with our decoder step by step.

    dflash-train serve-check checkpoint=DIR target.name_or_path=NAME [key=value ...]

Keys of its own, no part of a recipe:

    prompts=           a file, a folder of features or an evaluation set; default: the test split
    num_prompts=32     max_new_tokens=64
    dialects=stored    or zlab,speculators: the drafter is converted and each folder served
    demand=true        agreement must rest on 500 accepted drafts at 1.5 tokens a step
    python=            of an environment with vLLM 0.32; else one is made
    as_released=true   repair nothing in vLLM
    url=  api=vllm|sglang  model=      a server that runs already, and nobody else uses
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import orjson

from dflash_train.config import RecipeConfig, read_flag, require, take_keys
from dflash_train.drafter.checkpoint import drafter_hash
from dflash_train.features.target import Target, load_target
from dflash_train.features.target_folder import dflash_home
from dflash_train.features.target_weights import locate_target
from dflash_train.records.manifest import content_hash, write_bytes
from dflash_train.release.formats import Format, write_drafter
from dflash_train.stages.drafters import import_drafter, target_facts
from dflash_train.stages.workshop import Workshop

STORED = "stored"
DIALECTS = (STORED, Format.zlab.value, Format.speculators.value)
REPORT_NAME = "serve-check.json"


@dataclass(kw_only=True)
class ServeCheck:
    """What is checked, beside drafter and target."""

    prompts: str | None = None
    num_prompts: int = 32
    max_new_tokens: int = 64
    dialects: list[str] = field(default_factory=lambda: [STORED])
    demand: bool = False
    as_released: bool = False
    python: str | None = None
    url: str | None = None
    api: str = "vllm"
    model: str | None = None


def read_choice(arguments: list[str]) -> tuple[ServeCheck, list[str]]:
    """Take the keys of this verb out of a command line; what is left is the recipe's.

    Raises:
        ValueError: A value is not of its key's kind.
    """
    found, overrides = take_keys(arguments, {each.name for each in fields(ServeCheck)})
    words: dict[str, Any] = dict(found)
    for key in words.keys() & {"num_prompts", "max_new_tokens"}:
        is_number = words[key].isdecimal() and int(words[key]) > 0
        require(is_number, f"serve-check: {key} (={words[key]}) must be a whole number above 0.")
        words[key] = int(words[key])
    for key in words.keys() & {"demand", "as_released"}:
        words[key] = read_flag(f"serve-check: {key}", words[key])
    if "dialects" in words:
        words["dialects"] = words["dialects"].strip("[]").split(",")
    choice = ServeCheck(**words)
    unknown = [each for each in choice.dialects if each not in DIALECTS]
    require(not unknown, f"serve-check: dialects (={unknown}) must be of {', '.join(DIALECTS)}.")
    require(
        choice.api in ("vllm", "sglang"),
        f"serve-check: api (={choice.api}) must be vllm or sglang.",
    )
    return choice, overrides


def serve_check(config: RecipeConfig, choice: ServeCheck) -> int:
    """Check, print differences, near-ties and verdicts, and end in one line of JSON.

    Returns:
        0 if every server agrees (and, with `demand`, agrees on enough), else 1.

    Raises:
        ValueError: There is no such drafter, target or prompt.
        UnavailableError: vLLM stopped, or the address does not answer.
    """
    from dflash_inference.decoder import SpeculativeDecoder
    from dflash_inference.serve_check.check import (
        OwnAnswers,
        VllmSettings,
        check_server,
        check_vllm,
    )
    from dflash_inference.serve_check.prompts import read_prompts
    from dflash_inference.serve_check.running_server import Api, RunningServer

    folder = Workshop(config).checkpoint
    imported = import_drafter(folder, config.target)
    target = load_target(config.target, imported.drafter.config.target_layer_ids)
    prompts = read_prompts(
        choice.prompts or str(config.run_dir / "features" / "test"),
        num_prompts=choice.num_prompts,
        target=target,
        config=config.evaluate,
    )
    python = _vllm_python(choice)  # before our own minutes of decoding, since it may fail
    drafter = imported.drafter.to(target.device, target.model.dtype)
    decoder = SpeculativeDecoder(target, drafter)
    own = OwnAnswers.decode(decoder, prompts, max_new_tokens=choice.max_new_tokens)
    work_dir = dflash_home() / "serve-check" / _name_of(folder, config)
    if choice.url is not None:
        server = RunningServer(
            url=choice.url,
            api=Api(choice.api),
            model=choice.model,
            max_new_tokens=choice.max_new_tokens,
            stop_token_ids=sorted(target.stop_token_ids),
        )
        verdicts = [check_server(own, server)]
    else:
        folders = {
            imported.format.value if dialect == STORED else dialect: _written(
                dialect, folder, config, target, work_dir
            )
            for dialect in choice.dialects
        }
        settings = VllmSettings(
            python=python,
            target=locate_target(config.target),
            dtype=config.target.dtype.value,
            work_dir=work_dir,
            as_released=choice.as_released,
        )
        verdicts = check_vllm(own, folders, settings)
    print("\n".join(line for verdict in verdicts for line in verdict.lines()))
    passed = all(each.agrees and (each.proves_enough or not choice.demand) for each in verdicts)
    report = {
        "checkpoint": str(folder),
        "target": config.target.name_or_path,
        "prompts": len(prompts),
        "max_new_tokens": choice.max_new_tokens,
        "sides": [each.as_json() for each in verdicts],
        "folder": str(work_dir),
        "passed": passed,
    }
    line = orjson.dumps(report)
    write_bytes(work_dir / REPORT_NAME, line + b"\n")
    print(line.decode())
    return 0 if passed else 1


def _vllm_python(choice: ServeCheck) -> Path:
    """Give the interpreter that has vLLM; the environment is made where none was named."""
    from dflash_inference.serve_check.vllm_environment import environment_folder, make_environment

    if choice.python is not None or choice.url is not None:
        return Path(choice.python or "")
    return make_environment(environment_folder())


def _written(
    dialect: str, folder: Path, config: RecipeConfig, target: Target, work_dir: Path
) -> Path:
    """Give the drafter's folder in a dialect, converted if another was asked for."""
    if dialect == STORED:
        return folder
    imported = import_drafter(folder, config.target, dtype=None)
    is_reduced = imported.drafter.config.draft_vocab_size is not None
    written = write_drafter(
        imported.drafter,
        work_dir / f"drafter-{dialect}",
        format=Format(dialect),
        metadata=imported.metadata,
        target=target_facts(config.target),
        head=target.head if is_reduced else None,
    )
    return written.folder


def _name_of(folder: Path, config: RecipeConfig) -> str:
    """Name the work folder by what is checked, so that checks of two drafters stay apart."""
    identity = [drafter_hash(folder), config.target.name_or_path, config.target.revision]
    return content_hash(identity).removeprefix("sha256:")[:16]
