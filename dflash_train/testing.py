"""Tiny real models for tests: a byte-level chat tokenizer, random targets, random drafters.

Everything is built in code from a seed; nothing is downloaded. Used by tests only.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from dflash_train.config import DrafterSettings, RecipeConfig
from dflash_train.drafter.config import DrafterConfig
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


def tiny_llama_config() -> LlamaConfig:
    """Give the shapes of the tiny target: 6 layers of width 32, tied embeddings."""
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(SPECIAL_TOKENS) + 256,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=STOP_TOKEN_ID,
        pad_token_id=0,
    )


def save_tiny_target(folder: Path, *, seed: int = 0) -> Path:
    """Write a random tiny target with tokenizer, as `target.name_or_path` takes it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_llama_config(), dtype=torch.float32)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_target(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> Target:
    """Build a random tiny target in memory, with taps 1 and 3."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_llama_config(), dtype=dtype)
    return Target(model, tiny_tokenizer(), [1, 3], name="tiny", revision=f"seed-{seed}")


def tiny_drafter(
    target: Target, *, seed: int = 0, block_size: int = 4, dtype: torch.dtype = torch.float32
) -> Drafter:
    """Build a random drafter of 2 layers for a target."""
    torch.manual_seed(seed)
    settings = DrafterSettings(
        block_size=block_size,
        num_hidden_layers=2,
        target_layer_ids=target.target_layer_ids,
        mask_token_id=MASK_TOKEN_ID,
    )
    config = DrafterConfig.for_target(settings, target.model.config)
    return Drafter(config).to(dtype).eval()


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
