"""The target's files become a model, a tokenizer and a configuration, or one sentence says why not.

Transformers' Auto classes decide how a model is built; `features/target_weights.py` knows where it
lies. What the loaded model does is `features/target.py`.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dflash_train.config import TargetConfig, require
from dflash_train.features.grouped_attention import use_grouped_attention
from dflash_train.features.target_weights import TargetLocation


def load_target_config(location: TargetLocation) -> PreTrainedConfig:
    """Read the target's text configuration without its weights.

    Raises:
        ValueError: The model cannot be found or read.
    """
    try:
        config = AutoConfig.from_pretrained(location.path, revision=location.revision)
    except (OSError, ValueError) as error:
        raise _unreadable(location, error) from error
    return config.get_text_config()


def load_model(location: TargetLocation, config: TargetConfig) -> PreTrainedModel:
    """Load the target's weights onto the accelerator if there is one, else the CPU.

    Raises:
        ValueError: The model cannot be found or read.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            location.path,
            revision=location.revision,
            dtype=getattr(torch, config.dtype.value),
            attn_implementation=config.attention.value,
            device_map="cuda" if torch.cuda.is_available() else "cpu",
        )
    except (OSError, ValueError) as error:
        raise _unreadable(location, error) from error
    use_grouped_attention(model)
    return model


def load_tokenizer(location: TargetLocation) -> PreTrainedTokenizerBase:
    """Load the target's tokenizer with its chat template.

    Raises:
        ValueError: It cannot be found or read, or has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(location.path, revision=location.revision)
    except (OSError, ValueError) as error:
        raise _unreadable(location, error) from error
    require(
        tokenizer.chat_template is not None,
        f"target.name_or_path (={location.path}) has no chat template, so conversations cannot be "
        "rendered. Use the instruction-tuned model.",
    )
    return tokenizer


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Collect the ids that end an answer: the generation config's and the tokenizer's."""
    generation_config = model.generation_config
    ids = generation_config.eos_token_id if generation_config is not None else None
    listed = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return frozenset(i for i in [*listed, tokenizer.eos_token_id] if i is not None)


def _unreadable(location: TargetLocation, error: Exception) -> ValueError:
    first_line = str(error).strip().splitlines()[0]
    return ValueError(
        f"target.name_or_path (={location.path}) cannot be read: {first_line} "
        "Give a local folder with config.json and weights, or a hub id that this machine can reach."
    )
