"""A drafter and its target put to use: an endpoint, or a chat in a terminal."""

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dflash_train.config import RecipeConfig, require
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target, load_target
from dflash_train.stages.drafters import import_drafter
from dflash_train.stages.workshop import Workshop


@dataclass(frozen=True, kw_only=True)
class _Models:
    target: Target
    drafter: Drafter
    fast: bool


def serve(config: RecipeConfig) -> None:
    """Serve the target with the drafter on a port until a signal comes.

    Raises:
        ValueError: There is no such drafter or target, or a setting cannot be served.
        UnavailableError: The port is taken, or the log cannot be written.
        RuntimeError: The decoder has failed.
    """
    from dflash_inference import serve as endpoint
    from dflash_inference.adaptive import new_decoder

    models = _load_models(config)
    decoder = new_decoder(
        models.target,
        models.drafter,
        fast=models.fast,
        adapts_to=config.serve.most_requests if config.serve.adaptive else None,
    )
    endpoint.serve(decoder, config)


def generate(config: RecipeConfig, prompt: str | None) -> None:
    """Answer one prompt, or chat: lines of the terminal, or of whatever stdin is.

    Raises:
        ValueError: There is no such drafter or target.
    """
    from dflash_inference import terminal_chat
    from dflash_inference.adaptive import new_decoder

    models = _load_models(config)
    chat = terminal_chat.Chat(
        decoder=new_decoder(
            models.target,
            models.drafter,
            fast=models.fast,
            adapts_to=1 if config.serve.adaptive else None,
        ),
        sampling=config.data.serving_sampling,
        max_new_tokens=config.serve.max_new_tokens,
        seed=config.seed,
    )
    console = Console(highlight=False)
    if prompt is not None:
        terminal_chat.show_answer(chat, prompt, console)
    elif sys.stdin.isatty():
        terminal_chat.greet(console)
        terminal_chat.converse(chat, terminal_chat.typed_questions(), console)
    else:
        terminal_chat.converse(chat, (line.rstrip("\n") for line in sys.stdin), console)


def measure_costs(config: RecipeConfig, *, force: bool) -> Path:
    """Time draft and verify passes on this machine, print them, and give the file that has them.

    The file is what `serve` reads, and what `evaluate.cost_tables` takes on another machine.

    Args:
        config: The recipe; `serve` says in which mode and for how many requests.
        force: Measure again although there is such a file.

    Raises:
        ValueError: There is no such drafter or target.
    """
    from dflash_inference.adaptive import measured_batches
    from dflash_inference.cost_table import costs_file
    from dflash_inference.decoder import SpeculativeDecoder
    from dflash_inference.serving_costs import read_cost_table

    models = _load_models(config)
    decoder = SpeculativeDecoder(models.target, models.drafter, fast=models.fast)
    path = costs_file(decoder, batches=measured_batches(config.serve.most_requests), force=force)
    table = read_cost_table(path)
    print(table.hardware)
    print("requests  tokens each  draft ms  verify ms")
    for row in table.rows:
        times = f"{1000 * row.draft_s:>8.2f}  {1000 * row.verify_s:>9.2f}"
        print(f"{row.batch:>8}  {row.width:>11}  {times}")
    return path


def _load_models(config: RecipeConfig) -> _Models:
    """Load the recipe's drafter, or the best one of its run, and the target it was made for."""
    from dflash_inference.fast_mode import missing_compiler

    folder = Workshop(config).checkpoint
    drafter = import_drafter(folder, config.target).drafter
    target = load_target(config.target, drafter.config.target_layer_ids)
    width = target.head.embedding_weight.shape[1]
    require(
        drafter.config.hidden_size == width,
        f"checkpoint (={folder}) has hidden_size {drafter.config.hidden_size}, and "
        f"target.name_or_path (={config.target.name_or_path}) has {width}. Give the target that "
        "the drafter was trained for.",
    )
    fast = config.serve.fast and target.device.type == "cpu"
    missing = missing_compiler()
    require(
        not fast or missing is None,
        f"serve.fast (=true) needs a C++ compiler, and {missing} is not there. Install one, or "
        "set serve.fast to false.",
    )
    return _Models(target=target, drafter=drafter.to(target.device), fast=fast)
