"""A drafter and its target put to use: an endpoint, or a chat in a terminal."""

import os
import shutil
import sys
from dataclasses import dataclass

from rich.console import Console

from dflash_train.config import RecipeConfig, require
from dflash_train.drafter.checkpoint import load_checkpoint
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target, load_target
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
    """
    from dflash_inference import serve as endpoint
    from dflash_inference.decoder import SpeculativeDecoder

    models = _load_models(config)
    endpoint.serve(SpeculativeDecoder(models.target, models.drafter, fast=models.fast), config)


def generate(config: RecipeConfig, prompt: str | None) -> None:
    """Answer one prompt, or chat: lines of the terminal, or of whatever stdin is.

    Raises:
        ValueError: There is no such drafter or target.
    """
    from dflash_inference import terminal_chat
    from dflash_inference.decoder import SpeculativeDecoder

    models = _load_models(config)
    chat = terminal_chat.Chat(
        decoder=SpeculativeDecoder(models.target, models.drafter, fast=models.fast),
        sampling=config.data.serving_sampling,
        max_new_tokens=config.serve.max_new_tokens,
        seed=config.seed,
    )
    console = Console(highlight=False)
    if prompt is not None:
        terminal_chat.show_answer(chat, prompt, console)
    elif sys.stdin.isatty():
        terminal_chat.converse(chat, terminal_chat.typed_questions(), console)
    else:
        terminal_chat.converse(chat, (line.rstrip("\n") for line in sys.stdin), console)


def _load_models(config: RecipeConfig) -> _Models:
    """Load the recipe's drafter, or the best one of its run, and the target it was made for."""
    folder = Workshop(config).checkpoint
    require(
        folder.is_dir(),
        f"checkpoint (={folder}) is not a folder. Give checkpoint=DIR with config.json in it, or "
        "train a drafter with `dflash-train run`.",
    )
    drafter = load_checkpoint(folder)
    target = load_target(config.target, drafter.config.target_layer_ids)
    width = target.head.embedding_weight.shape[1]
    require(
        drafter.config.hidden_size == width,
        f"checkpoint (={folder}) has hidden_size {drafter.config.hidden_size}, and "
        f"target.name_or_path (={config.target.name_or_path}) has {width}. Give the target that "
        "the drafter was trained for.",
    )
    fast = config.serve.fast and target.device.type == "cpu"
    compiler = os.environ.get("CXX", "g++")
    require(
        not fast or shutil.which(compiler) is not None,
        f"serve.fast (=true) needs a C++ compiler, and {compiler} is not there. Install one, or "
        "set serve.fast to false.",
    )
    return _Models(target=target, drafter=drafter.to(target.device), fast=fast)
