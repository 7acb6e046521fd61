"""Tiny real models for tests: a byte-level chat tokenizer, random targets, random drafters.

Everything is built in code from a seed; nothing is downloaded. Used by tests only.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dflash_train.config import DrafterSettings, RecipeConfig
from dflash_train.drafter.config import DrafterConfig, Visibility
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target
from dflash_train.records.conversation import Conversation, Turn, write_shard

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
STOP_TOKEN_ID = 2
MASK_TOKEN_ID = 3

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LIMITS = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-3, 2e-2)}
"""Relative RMS error allowed for (outputs, gradients), by dtype."""


def assert_close(name: str, got: Tensor, want: Tensor, rel: float) -> None:
    """Compare by RMS error over RMS value and print both on failure."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} is not {tuple(want.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    error = (got.double() - want.double()).square().mean().sqrt().item()
    value = want.double().square().mean().sqrt().item()
    assert error <= rel * value, (
        f"{name}: RMS error {error:.3e} of RMS value {value:.3e} exceeds {rel:.0e}"
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer with ChatML and 260 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


SHAPES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(SPECIAL_TOKENS) + 256,
    "max_position_embeddings": 4096, "tie_word_embeddings": True, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": STOP_TOKEN_ID, "pad_token_id": 0,
}  # fmt: skip
"""Every tiny target: 6 layers of width 32, tied embeddings."""

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gpt_oss": (
        GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
}
"""Target families by name: configuration class and what it needs beside `SHAPES`."""

SLIDING_LAYERS = ["sliding_attention", "sliding_attention"]
SLIDING, FULL = "sliding_attention", "full_attention"
VISIBILITIES = {
    "full": Visibility(),
    "causal": Visibility(is_causal=True),
    "sliding causal": Visibility(window=9, is_causal=True),
    "sliding": Visibility(window=9),
    "W < K, causal": Visibility(window=3, is_causal=True),
    "W < K": Visibility(window=3),
    "W = 1": Visibility(window=1),
    "W > T": Visibility(window=999),
}
"""Who sees whom: each layer type, and windows narrower than a block and wider than a document."""
DECODED_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sliding": {"layer_types": [SLIDING, FULL], "sliding_window": 6},
    "sliding, bidirectional, narrower than a block": {
        "layer_types": [FULL, SLIDING], "sliding_window": 3, "is_causal": False,
    },
    "causal": {"is_causal": True},
    "dflash2": {
        "conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 4, "selector_top_k": 5,
    },
    "dspark": {"markov_rank": 4, "has_confidence_head": True},
    "dspark, gated, sliding": {
        "markov_rank": 4, "markov_gated": True, "layer_types": [FULL, SLIDING],
        "sliding_window": 5,
    },
    "reduced vocabulary": {"draft_vocab_size": 45},
    "dspark, reduced vocabulary": {"markov_rank": 4, "draft_vocab_size": 45},
}  # fmt: skip
"""Kinds of two-layer drafters that decode differently, for blocks of four; fields of
`DrafterSettings`."""

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "sliding_causal": {"layer_types": SLIDING_LAYERS, "sliding_window": 6},
    "sliding_bidirectional": {
        "layer_types": SLIDING_LAYERS, "sliding_window": 6, "is_causal": False
    },
    "narrow_causal": {"layer_types": SLIDING_LAYERS, "sliding_window": 2},
    "narrow_bidirectional": {
        "layer_types": SLIDING_LAYERS, "sliding_window": 2, "is_causal": False
    },
    "window_of_one": {"layer_types": SLIDING_LAYERS, "sliding_window": 1},
    "mixed": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6},
    "biased": {"attention_bias": True},
    "scaled": {
        "input_embedding_scale": 3.0, "output_multiplier": 0.5, "final_logit_softcapping": 2.0
    },
    "dflash2": {
        "conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 4
    },
    "dspark": {"markov_rank": 6, "has_confidence_head": True},
    "dspark_gated": {
        "markov_rank": 6, "markov_gated": True, "has_confidence_head": True,
        "confidence_sees_markov": False,
    },
    "reduced": {"draft_vocab_size": 100},
    "reduced_dspark": {"draft_vocab_size": 100, "markov_rank": 6},
}  # fmt: skip
"""Drafter variants of 2 layers by name: what `tiny_drafter` and `DrafterSettings` take."""

STARTS_AS_NO_CHANGE = (
    "_proj.bias", "base_kernel", "kernel_projection.weight", "successor_codebook",
    "markov_w2.weight",
)  # fmt: skip
"""Ends of the parameter names that tiny drafters stir, so that a variant is not plain DFlash."""


def tiny_llama_config() -> LlamaConfig:
    """Give the configuration of the usual tiny target."""
    return LlamaConfig(**SHAPES)


def tiny_config(family: str = "llama") -> PreTrainedConfig:
    """Give the configuration of a tiny target of one of `FAMILIES`."""
    kind, extra = FAMILIES[family]
    return kind(**(SHAPES | extra))


def save_tiny_target(folder: Path, *, seed: int = 0) -> Path:
    """Write a random tiny target with tokenizer, as `target.name_or_path` takes it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.float32)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_target(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, family: str = "llama"
) -> Target:
    """Build a random tiny target in memory, with taps 1 and 3."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype)
    return Target(model, tiny_tokenizer(), [1, 3], name="tiny", revision=f"seed-{seed}")


def tiny_drafter(
    target: Target,
    *,
    seed: int = 0,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Drafter:
    """Build a random drafter of 2 layers for a target.

    Args:
        target: Any target; its taps are the drafter's.
        seed: Seed of the weights.
        block_size: K.
        dtype: Number format of the weights.
        **settings: Further fields of `DrafterSettings`, such as those of `VARIANTS`. A reduced
            vocabulary holds evenly spread ids, the stop token among them.
    """
    torch.manual_seed(seed)
    recipe = DrafterSettings(
        block_size=block_size,
        num_hidden_layers=2,
        target_layer_ids=target.target_layer_ids,
        mask_token_id=MASK_TOKEN_ID,
        **settings,
    )
    config = DrafterConfig.for_target(recipe, target.model.config.get_text_config())
    drafter = Drafter(config)
    for name, parameter in drafter.named_parameters():
        if name.endswith(STARTS_AS_NO_CHANGE):
            parameter.data += 0.3 * torch.randn_like(parameter)
    if config.draft_vocab_size is not None:
        step = (config.vocab_size - STOP_TOKEN_ID) // config.draft_vocab_size
        drafter.set_draft_vocabulary(STOP_TOKEN_ID + step * torch.arange(config.draft_vocab_size))
    return drafter.to(dtype).eval()


def ask(name: str, *contents: str | None, split: str = "train") -> Conversation:
    """Build a conversation whose messages alternate user, assistant, user, ..."""
    roles = ("user", "assistant")
    messages = [
        Turn(role=roles[place % 2], content=content) for place, content in enumerate(contents)
    ]
    return Conversation(
        id=name,
        source="test",
        messages=messages,
        session=f"s-{name[0]}",
        turn=len(messages) // 2,
        split=split,
    )


def write_conversations(config: RecipeConfig, records: list[Conversation]) -> None:
    """Write records as `ingest` does, one shard per split."""
    for split in {record.split or "" for record in records}:
        chosen = [record for record in records if record.split == split]
        write_shard(config.run_dir / "conversations" / f"{split}-00000.jsonl.gz", chosen)
