"""Read `specforge export`, and z-lab's first releases: z-lab's layout with keys left out.

`save_pretrained` writes what Transformers knows, so K stands at the top only, factors that are 1
are absent, and DSpark's fields lie in `dflash_config`. Each is completed by the rule of the code
that wrote the file, and said; what the code's readers would guess differently is refused.
"""

from pathlib import Path
from typing import Any

from transformers import Qwen3Config

from dflash_train.config import require
from dflash_train.drafter.checkpoint import DFLASH2, DSPARK, PLAIN
from dflash_train.drafter.config import SLIDING, spread_target_layer_ids

_FACTORS = {
    "input_embedding_scale": 1.0, "output_multiplier": 1.0, "final_logit_softcapping": None,
}  # fmt: skip
_DFLASH2_KEYS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
_ARCHITECTURES = {"DSparkDraftModel": DSPARK, "DominoDraftModel": None}
_LEGACY_ROPE = ("rope_scaling", "rope_theta")
_SHAPES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps",
    "attention_bias", "hidden_act", "layer_types", "sliding_window", "use_sliding_window",
)  # fmt: skip


def complete(content: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Give `config.json` as we write it, and a sentence for each key that was filled or dropped.

    Raises:
        ValueError: A key is missing that readers fill differently, or the drafter is of a kind
            that this version does not have.
    """
    where, notes = f"checkpoint (={folder}):", []
    content = dict(content)
    nested = dict(content["dflash_config"])
    if content.pop("auto_map", None) is not None:
        notes.append("auto_map was dropped: it asks readers to run code that none needs.")
    kind = _kind(content, nested, where)
    if content.get("architectures") != [kind]:
        notes.append(f"architectures (={content.get('architectures')}) was read as {kind}.")
    _complete_block_size(content, nested, where)
    _complete_ids(content, nested, where, notes)
    missing = sorted(_FACTORS.keys() - nested.keys())
    if missing:
        notes.append(f"dflash_config.{', '.join(missing)}: absent, so none is applied.")
    filled = {name: content.get(name, default) for name, default in _FACTORS.items()}
    nested = filled | nested
    for name in _DFLASH2_KEYS if kind == DFLASH2 else ():
        nested.setdefault(name, content.get(name))
    if kind == DSPARK:
        content = _dspark_keys(nested) | content
    content |= _qwen3_values(content, where)
    return content | {"architectures": [kind], "dflash_config": nested}, notes


def _kind(content: dict[str, Any], nested: dict[str, Any], where: str) -> str:
    architectures = content.get("architectures") or [PLAIN]
    name = architectures[0] if len(architectures) == 1 else None
    projector = nested.pop("projector_type", None)
    kind = _ARCHITECTURES.get(str(name), name)
    if projector == "dspark":
        kind = DSPARK
    require(
        projector in (None, "dspark", "dflash") and kind in (PLAIN, DFLASH2, DSPARK),
        f"{where} architectures (={architectures}), dflash_config.projector_type (={projector}) "
        f"name a drafter that is not read here. {PLAIN}, {DFLASH2} and {DSPARK} are.",
    )
    return str(kind)


def _complete_block_size(content: dict[str, Any], nested: dict[str, Any], where: str) -> None:
    sizes = [each["block_size"] for each in (content, nested) if each.get("block_size") is not None]
    require(
        bool(sizes),
        f"{where} block_size is missing, and readers fill it with numbers of their own. Set it to "
        "the K that training used.",
    )
    content.setdefault("block_size", sizes[0])
    nested.setdefault("block_size", sizes[0])


def _complete_ids(
    content: dict[str, Any], nested: dict[str, Any], where: str, notes: list[str]
) -> None:
    require(
        isinstance(content.get("num_target_layers"), int),
        f"{where} num_target_layers (={content.get('num_target_layers')}) must be the target's "
        "number of layers. Set it.",
    )
    if nested.get("target_layer_ids") is None:
        ids = spread_target_layer_ids(content["num_target_layers"], content["num_hidden_layers"])
        nested["target_layer_ids"] = ids
        notes.append(f"dflash_config.target_layer_ids: absent, so z-lab's rule gives {ids}.")
    mask_id = nested.get("mask_token_id", content.get("mask_token_id"))
    require(
        isinstance(mask_id, int),
        f"{where} dflash_config.mask_token_id (={mask_id}) must be a token id: SGLang would add a "
        "token for it. Set it to the one that training used.",
    )
    nested["mask_token_id"] = mask_id


def _qwen3_values(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Give shapes and RoPE as Transformers' Qwen3 configuration reads them."""
    require(
        _has_theta(content),
        f"{where} rope_theta is missing: Transformers takes 10000, vLLM 1000000. Set it to the one "
        "that training used.",
    )
    known = {name: content[name] for name in _SHAPES if name in content}
    names = ("rope_parameters",) if content.get("rope_parameters") else _LEGACY_ROPE
    rope = {name: content[name] for name in names if content.get(name) is not None}
    config = Qwen3Config(**known, **rope)
    require(
        config.hidden_act == "silu",
        f"{where} hidden_act (={config.hidden_act}) must be silu: this drafter has no other.",
    )
    values = {name: getattr(config, name) for name in _SHAPES}
    slides = SLIDING in values["layer_types"]
    return values | {
        "use_sliding_window": slides and values["use_sliding_window"],
        "rope_parameters": plain_rope(dict(config.rope_parameters or {}), where),
    }


def _has_theta(content: dict[str, Any]) -> bool:
    nested = content.get("rope_parameters") or {}
    return "rope_theta" in nested or content.get("rope_theta") is not None


def plain_rope(rope: dict[str, Any], where: str) -> dict[str, Any]:
    """Give RoPE parameters that act on the full width at 1-D positions.

    Raises:
        ValueError: They turn a part of each head, or use M-RoPE sections: readers differ in
            whether they honour that.
    """
    partial = rope.pop("partial_rotary_factor", 1.0)
    odd = sorted({"mrope_section", "mrope_interleaved"} & rope.keys())
    require(
        partial in (None, 1, 1.0) and not odd,
        f"{where} rope_parameters turn a part of each head (partial_rotary_factor {partial}, "
        f"{', '.join(odd) or 'no sections'}), which some servers honour and Transformers does not. "
        "Remove the keys if training ignored them.",
    )
    return rope


def _dspark_keys(nested: dict[str, Any]) -> dict[str, Any]:
    """Lift DSpark's fields out of `dflash_config`, with SpecForge's own defaults."""
    has_head = nested.pop("enable_confidence_head", nested.pop("confidence_head_alpha", 0.0) > 0.0)
    return {
        "markov_rank": nested.pop("markov_rank", None),
        "markov_head_type": nested.pop("markov_head_type", "vanilla"),
        "enable_confidence_head": has_head,
        "confidence_head_with_markov": nested.pop("confidence_head_with_markov", False),
        "sample_from_anchor": True,
    }
