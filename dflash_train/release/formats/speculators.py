"""The layout of the package `speculators` 0.9.0, which vLLM reads too; layer ids stand here + 1.

Tap ids count the embedding as 0, so the layer whose output we call i is i + 1; nowhere else in this
project. Attention is one flag, `sliding_window_non_causal`: speculators reads it for sliding layers
only, vLLM 0.32 for every layer, so what both read alike is what can be written. DSpark differs:
vLLM goes by the layer types there.
"""

from pathlib import Path
from typing import Any

from transformers import Qwen3Config

from dflash_train.config import require
from dflash_train.drafter.checkpoint import DFLASH2, DSPARK, PLAIN, describe_config
from dflash_train.drafter.config import FULL, SLIDING, DrafterConfig
from dflash_train.drafter.metadata import CheckpointMetadata
from dflash_train.release.formats.specforge import plain_rope

VERSION = "0.9.0"
_KINDS = {"dflash": PLAIN, "dflash2": DFLASH2, "dspark": DSPARK}
_DFLASH2_DEFAULTS = {
    "conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256, "selector_top_k": 16,
}  # fmt: skip
_SHAPES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps",
    "attention_bias",
)  # fmt: skip
_LAYER_KEYS = (
    *_SHAPES, "model_type", "hidden_act", "attention_dropout", "rope_parameters", "rope_theta",
    "rope_scaling", "layer_types", "use_sliding_window", "sliding_window", "max_window_layers",
    "tie_word_embeddings", "num_target_layers",
)  # fmt: skip


def to_content(
    config: DrafterConfig, dtype: str, *, target: dict[str, Any] | None
) -> dict[str, Any]:
    """Give the content of `config.json`; nothing in it is left to a reader's default.

    Args:
        config: The drafter's shape.
        dtype: Number format of the weights.
        target: `name` and `architectures` for readers that look the target up; None is unknown.
    """
    kind = "dflash2" if config.is_dflash2 else "dspark" if config.is_shifted else "dflash"
    flat = describe_config(config, dtype)
    layers = {name: flat[name] for name in _LAYER_KEYS}
    if config.is_shifted and config.is_causal is not None:
        layers["is_causal"] = config.is_causal  # vLLM reads no flag of DSpark's
    content = {
        "architectures": flat["architectures"] if config.is_shifted else [_KINDS[kind]],
        "speculators_model_type": kind,
        "speculators_version": VERSION,
        "dtype": dtype,
        "transformer_layer_config": layers,
        "aux_hidden_state_layer_ids": [layer + 1 for layer in config.target_layer_ids],
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "draft_vocab_size": config.num_output_ids,
        "target_hidden_size": config.hidden_size,
        "tie_word_embeddings": False,
        "sample_from_anchor": config.is_shifted,
        "sliding_window_non_causal": not any(each.is_causal for each in config.layer_visibility()),
        "speculators_config": _proposal(kind, config, target or {}),
    }
    if config.is_dflash2:
        content |= {name: getattr(config, name) for name in _DFLASH2_DEFAULTS}
    if config.is_shifted:
        names = ("markov_rank", "markov_head_type", "enable_confidence_head")
        content |= {name: flat[name] for name in (*names, "confidence_head_with_markov")}
    return content


def _proposal(kind: str, config: DrafterConfig, target: dict[str, Any]) -> dict[str, Any]:
    method = {
        "proposal_type": "greedy",
        "speculative_tokens": config.num_drafts,
        "accept_tolerance": 0.0,
        "verifier_accept_k": 1,
    }
    return {
        "algorithm": kind,
        "default_proposal_method": "greedy",
        "proposal_methods": [method],
        "verifier": {
            "name_or_path": target.get("name"),
            "architectures": target.get("architectures") or [],
        },
    }


def obstacles(config: DrafterConfig) -> list[str]:
    """Name what this layout has no place for, or what its two readers take for different things."""
    found = []
    factors = {
        "input_embedding_scale": 1.0, "output_multiplier": 1.0, "final_logit_softcapping": None,
    }  # fmt: skip
    for name, neutral in factors.items():
        value = getattr(config, name)
        if value != neutral:
            found.append(f"{name} (={value}) has no key. Use format=zlab.")
    types = config.layer_types or [FULL] * config.num_hidden_layers
    flags = [each.is_causal for each in config.layer_visibility()]
    if any(is_causal for kind, is_causal in zip(types, flags, strict=True) if kind == FULL):
        found.append(
            "is_causal (=true) in full layers: speculators attends both ways there. Use "
            "format=zlab."
        )
    elif len(set(flags)) > 1 and not config.is_shifted:
        found.append(
            f"layer_types (={types}), causal where they slide and both ways elsewhere: vLLM has "
            "one flag for all layers in this layout. Use format=zlab."
        )
    return found


def remarks(config: DrafterConfig) -> list[str]:
    """Name what some readers do differently; a server must be chosen accordingly."""
    found = []
    window = config.sliding_window
    if window is not None:
        found.append(
            f"sliding_window (={window}): the package speculators shows slot k of a block k + 1 "
            "older tokens than servers do, and the whole block whatever the window; up to "
            f"{max(0, window - config.block_size)} tokens of context all agree."
        )
    if config.markov_gated:
        found.append("markov_gated: the package speculators has the gate, vLLM refuses its tensor.")
    return found


def to_config(
    content: dict[str, Any], folder: Path, *, target: dict[str, Any] | None
) -> tuple[DrafterConfig, list[str]]:
    """Read a drafter's shape from `config.json`, and what was noticed.

    Args:
        content: Of the file.
        folder: Where it comes from, for messages.
        target: `num_hidden_layers` of the target, where the file does not say it.

    Raises:
        ValueError: A key is missing that readers fill differently, or cannot be honoured.
    """
    where, notes = f"checkpoint (={folder}):", []
    kind = content["speculators_model_type"]
    require(
        kind in _KINDS,
        f"{where} speculators_model_type (={kind}) must be one of {', '.join(_KINDS)}. Other "
        "algorithms are no DFlash drafters.",
    )
    try:
        layers = dict(content["transformer_layer_config"])
        qwen3 = _layer_config(layers, where)
        types = list(qwen3.layer_types or [])
        slides = SLIDING in types
        config = DrafterConfig(
            **{name: getattr(qwen3, name) for name in _SHAPES},
            rope_parameters=plain_rope(dict(qwen3.rope_parameters or {}), where),
            block_size=content["block_size"],
            mask_token_id=content["mask_token_id"],
            target_layer_ids=[layer - 1 for layer in content["aux_hidden_state_layer_ids"]],
            num_target_layers=_num_target_layers(layers, target, where),
            layer_types=types if slides else None,
            sliding_window=qwen3.sliding_window if slides else None,
            is_causal=_is_causal(content, types, where),
            **_variant(content, kind, qwen3.vocab_size, where),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{where} config.json lacks or garbles {error}. Save it with speculators again."
        ) from error
    if not slides and kind != "dspark" and not content.get("sliding_window_non_causal", True):
        notes.append(
            "sliding_window_non_causal (=false) without sliding layers: trained to attend both "
            "ways, as it is read here; vLLM serves this file causally. Export it again."
        )
    return config, notes


def _layer_config(layers: dict[str, Any], where: str) -> Qwen3Config:
    """Fill absent keys from the class that left them out."""
    found = layers.get("model_type", "qwen3")
    config = Qwen3Config(**{key: value for key, value in layers.items() if key != "model_type"})
    require(
        found == "qwen3" and config.hidden_act == "silu",
        f"{where} transformer_layer_config.model_type (={found}) must be qwen3 and hidden_act "
        f"(={config.hidden_act}) silu: other layers are not read.",
    )
    return config


def _num_target_layers(layers: dict[str, Any], target: dict[str, Any] | None, where: str) -> int:
    number = layers.get("num_target_layers", (target or {}).get("num_hidden_layers"))
    require(
        isinstance(number, int),
        f"{where} the speculators layout does not say how many layers the target has. Set "
        "target.name_or_path to the target, whose config.json does.",
    )
    assert isinstance(number, int)
    return number


def _is_causal(content: dict[str, Any], types: list[str], where: str) -> bool | None:
    """Give the flag of our config: None is the rule of the layer types, causal where they slide."""
    kind, slides = content["speculators_model_type"], SLIDING in types
    flag = content.get("sliding_window_non_causal")
    require(
        flag is not None or not slides or kind == "dflash2",
        f"{where} sliding_window_non_causal is missing beside sliding layers: speculators takes "
        "false, vLLM true. Set it to what training used.",
    )
    non_causal = kind == "dflash2" if flag is None else flag
    found = False if slides and non_causal else None
    written = content["transformer_layer_config"].get("is_causal")
    agrees = {SLIDING: slides and not non_causal, FULL: False}
    require(
        written is None or all(agrees[each] == written for each in types),
        f"{where} transformer_layer_config.is_causal (={written}) contradicts "
        f"sliding_window_non_causal (={flag}). Remove the one that training did not use.",
    )
    return found


def _variant(content: dict[str, Any], kind: str, vocab_size: int, where: str) -> dict[str, Any]:
    """Read the fields that differ from plain DFlash."""
    shifted = content.get("sample_from_anchor", kind == "dspark")
    require(
        shifted == (kind == "dspark"),
        f"{where} sample_from_anchor (={shifted}) must be {str(kind == 'dspark').lower()} for "
        f"{kind}: another layout of labels is not read.",
    )
    draft_size = content.get("draft_vocab_size", 32_000)
    fields = {"draft_vocab_size": None if draft_size == vocab_size else draft_size}
    if kind == "dflash2":
        fields |= {name: content.get(name, value) for name, value in _DFLASH2_DEFAULTS.items()}
    if kind == "dspark":
        head = content.get("markov_head_type", "vanilla")
        require(
            head in ("vanilla", "gated") and content.get("markov_rank", 256) > 0,
            f"{where} markov_head_type (={head}) must be vanilla or gated, and markov_rank "
            f"(={content.get('markov_rank')}) at least 1. Others are not read.",
        )
        fields |= {
            "markov_rank": content.get("markov_rank", 256),
            "markov_gated": head == "gated",
            "has_confidence_head": content.get("enable_confidence_head", True),
            "confidence_sees_markov": content.get("confidence_head_with_markov", True),
        }
    return fields


def target_of(content: dict[str, Any]) -> CheckpointMetadata | None:
    """Give what the file says about the target; None if it says nothing."""
    verifier = (content.get("speculators_config") or {}).get("verifier") or {}
    if not verifier.get("name_or_path"):
        return None
    return CheckpointMetadata(
        target={
            "name": verifier["name_or_path"],
            "architectures": list(verifier.get("architectures") or []),
        }
    )
