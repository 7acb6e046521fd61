"""The z-lab layout: what the package `dflash` 0.1.0, vLLM, SGLang and llama.cpp's converter read.

It is also our own; `dflash_train.drafter.checkpoint` writes and reads it. Here is what else a file
of others needs, and what no server would draft as it was trained.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from dflash_train.drafter.checkpoint import DSPARK, describe_config, parse_config
from dflash_train.drafter.config import DrafterConfig
from dflash_train.release.formats.specforge import complete


def to_config(content: dict[str, Any], folder: Path) -> tuple[DrafterConfig, list[str]]:
    """Read a drafter's shape from `config.json`, and what was filled in to do so.

    Raises:
        ValueError: A key is missing that readers fill differently, or cannot be honoured.
    """
    content, notes = complete(content, folder)
    return parse_config(content, folder), notes


def from_tensors(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Give DFlash 2's codebooks the names of released files; `save_pretrained` writes others."""
    renamed = {name.replace("_codebook.weight", "_codebook"): t for name, t in tensors.items()}
    if renamed.keys() == tensors.keys():
        return tensors, []
    return renamed, ["candidate_selector: codebooks renamed to those of released files."]


def to_content(config: DrafterConfig, dtype: str) -> dict[str, Any]:
    """Give the content of `config.json`."""
    return describe_config(config, dtype)


def obstacles(config: DrafterConfig) -> list[str]:
    """Name what readers of the z-lab layout would draft in another way than was trained."""
    found = []
    if config.draft_vocab_size is not None:
        found.append(
            f"draft_vocab_size (={config.draft_vocab_size}): dflash 0.1.0 drafts from the whole "
            "vocabulary. Use format=speculators."
        )
    if config.markov_gated:
        found.append(
            "markov_gated (=true): vLLM has no gate and refuses its tensors. Use "
            "format=speculators, which the package speculators loads."
        )
    return found


def remarks(config: DrafterConfig) -> list[str]:
    """Name what some readers do differently; a server must be chosen accordingly."""
    found = []
    if config.is_shifted:
        found.append(f"{DSPARK} is read by vLLM; dflash 0.1.0 has no such class.")
    if config.sliding_window is not None:
        found.append(
            "sliding layers: vLLM needs its V2 runner where full ones stand beside them, and "
            "llama.cpp has one causal flag for all layers."
        )
    elif config.is_causal:
        found.append("is_causal (=true) in full layers: dflash 0.1.0, vLLM and SGLang honour it.")
    if config.input_embedding_scale != 1 and not config.is_dflash2:
        found.append("input_embedding_scale: vLLM applies it for DFlash 2 only, SGLang not at all.")
    if config.output_multiplier != 1 or config.final_logit_softcapping is not None:
        found.append("output_multiplier, final_logit_softcapping: vLLM leaves them out.")
    return found
