"""The target without its weights: what writing prompts and reading answers takes.

Where servers answer in the target's place, nothing of it but the tokenizer is loaded here.
"""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import AutoConfig, GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dflash_train.config import TargetConfig
from dflash_train.features.target_loading import load_tokenizer
from dflash_train.features.target_weights import locate_target
from dflash_train.records.manifest import content_hash


class WrittenTarget(Protocol):
    """What a `Target` and a `TargetText` share."""

    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str
    stop_token_ids: frozenset[int]

    @functools.cached_property
    def tokenizer_hash(self) -> str:
        """Hash of the vocabulary."""
        ...

    def describe(self) -> dict[str, Any]:
        """Give the `target` block of manifests."""
        ...


@dataclass(kw_only=True)
class TargetText:
    """Tokenizer, stop tokens and identity of a target."""

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: frozenset[int]
    name: str
    revision: str
    dtype: str
    target_layer_ids: list[int]

    @functools.cached_property
    def tokenizer_hash(self) -> str:
        """Hash of the vocabulary; ids of another tokenizer are not ours."""
        return vocabulary_hash(self.tokenizer)

    def describe(self) -> dict[str, Any]:
        """Give the `target` block of manifests, the same as the loaded target's."""
        return target_block(self, dtype=self.dtype, target_layer_ids=self.target_layer_ids)


def load_target_text(config: TargetConfig, target_layer_ids: list[int]) -> TargetText:
    """Load the tokenizer of a recipe's target and the ids that end its answers.

    Raises:
        ValueError: The target cannot be found or read, or has no chat template.
    """
    location = locate_target(config)
    tokenizer = load_tokenizer(location)
    revision = location.revision or "main"  # Transformers' default
    try:
        settings = GenerationConfig.from_pretrained(location.path, revision=revision)
    except OSError:  # a model without that file takes them from its configuration
        whole = AutoConfig.from_pretrained(location.path, revision=revision)
        settings = GenerationConfig.from_model_config(whole)
    ids = settings.eos_token_id
    listed = ids if isinstance(ids, list) else [ids]
    return TargetText(
        tokenizer=tokenizer,
        stop_token_ids=frozenset(i for i in [*listed, tokenizer.eos_token_id] if i is not None),
        name=config.name_or_path,
        revision=location.label,
        dtype=config.dtype.value,
        target_layer_ids=target_layer_ids,
    )


def target_block(
    target: WrittenTarget, *, dtype: str, target_layer_ids: list[int]
) -> dict[str, Any]:
    """Give the `target` block of manifests; stages refuse inputs whose block differs."""
    template = str(target.tokenizer.chat_template)
    return {
        "name": target.name,
        "revision": target.revision,
        "dtype": dtype,
        "tokenizer": target.tokenizer_hash,
        "chat_template": "sha256:" + hashlib.sha256(template.encode()).hexdigest(),
        "target_layer_ids": target_layer_ids,
    }


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash the vocabulary in the order of its ids."""
    return content_hash(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
