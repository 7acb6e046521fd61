"""A tiny random target for every recipe, of the architecture class that the recipe names.

`target.shapes` of the recipe is taken as it stands and only its sizes are made small: routing,
windows, kinds of layers, scaled embeddings, soft caps and RoPE are what the recipe says. Text parts
of multimodal models get their wrapper around them, as the files on the Hub have it.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4TextConfig,
    PreTrainedConfig,
    Qwen3_5Config,
    Qwen3_5TextConfig,
)

from dflash_train.config import TargetConfig
from dflash_train.testing import STOP_TOKEN_ID, tiny_tokenizer

SIZES = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16,
    "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_global_key_value_heads": 1, "head_dim": 16, "global_head_dim": 32,
    "query_pre_attn_scalar": 16, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "sliding_window": 8,
    "max_position_embeddings": 4096,
}  # fmt: skip
"""Sizes in place of the written ones: 12 layers are two periods of every pattern."""
TOKENS = {"bos_token_id": 1, "eos_token_id": STOP_TOKEN_ID, "pad_token_id": 0}
VISION: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    },
    "qwen3_5_text": {
        "hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4,
        "num_position_embeddings": 16, "out_hidden_size": SIZES["hidden_size"],
    },
}  # fmt: skip
"""The smallest vision towers, which text never enters."""


def tiny_text_config(config: TargetConfig) -> PreTrainedConfig:
    """Give the written text configuration of a recipe's target in small sizes."""
    written = config.shapes[config.name_or_path]
    small: dict[str, Any] = TOKENS | {"initializer_range": 0.2}
    small |= {key: SIZES.get(key, value) for key, value in written.items()}
    return AutoConfig.for_model(**small)


def save_recipe_target(config: TargetConfig, folder: Path, *, seed: int = 0) -> Path:
    """Write the tiny target of a recipe with a tokenizer, as `target.name_or_path` takes it."""
    torch.manual_seed(seed)
    text = tiny_text_config(config)
    whole = _with_wrapper(text)
    kind = AutoModelForCausalLM if whole is text else AutoModelForImageTextToText
    kind.from_config(whole, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _with_wrapper(text: PreTrainedConfig) -> PreTrainedConfig:
    """Give the configuration that stands in the files of the Hub; it may hold a vision tower."""
    tied = {"tie_word_embeddings": text.tie_word_embeddings, **TOKENS}
    if isinstance(text, Gemma3TextConfig):
        return Gemma3Config(
            text_config=text, vision_config=VISION[text.model_type], mm_tokens_per_image=4, **tied
        )
    if isinstance(text, Gemma4TextConfig):
        return Gemma4Config(text_config=text, **tied)
    if isinstance(text, Qwen3_5TextConfig):
        return Qwen3_5Config(text_config=text, vision_config=VISION[text.model_type], **tied)
    return text
