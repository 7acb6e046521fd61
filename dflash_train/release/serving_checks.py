"""The doctor's checks of what changes numbers and no shape: rotation, mask, factors.

Servers differ here in what they read and in what they take for granted, so a check also says which
of them serve the drafter as it was trained.
"""

import math
from typing import Any

import torch

from dflash_train.config import DrafterSettings
from dflash_train.drafter.config import FULL, SLIDING, DrafterConfig
from dflash_train.features.target import Target
from dflash_train.release.finding import Finding, Patient, demand, ok, warning

ENGINES = ("z-lab", "vLLM", "SGLang", "llama.cpp")


def check_rope(patient: Patient) -> Finding:
    """Check that the rotation is spelt alike in both forms, full width, 1-D, and the target's."""
    content = patient.content
    rope = patient.value("rope_parameters", dict)
    flat = patient.value("rope_scaling", dict, type(None)) or {}
    theta = patient.value("rope_parameters.rope_theta", int, float)
    leftovers = [
        key
        for key in ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
        if key in content or key in rope or key in flat
    ]
    demand(
        not leftovers,
        f"{', '.join(leftovers)}: a drafter turns the whole head by 1-D positions, and some "
        "servers would honour the key.",
        remedy="Remove the key.",
    )
    flat_theta = patient.value("rope_theta", int, float)
    demand(
        theta == flat_theta,
        f"rope_theta (={flat_theta}) and rope_parameters.rope_theta (={theta}) must be equal.",
        remedy="Set both to what training used.",
    )
    demand(
        _scaling(rope) == _scaling(flat),
        f"rope_scaling (={flat}) and rope_parameters (={rope}) must ask for the same scaling.",
        remedy="Write the trained scaling in both.",
    )
    kind = rope.get("rope_type", "default")
    if patient.target is None:
        return ok(f"theta {theta:g}, {kind}, the same in both spellings.")
    trained = _fitting_config(patient.target).rope_parameters
    if trained["rope_theta"] != theta or _scaling(trained) != _scaling(rope):
        return warning(
            f"rope_parameters (={rope}) differ from the {trained} that training takes from this "
            "target.",
            remedy="Compare with the recipe that trained it: a wrong rotation changes no shape.",
        )
    return ok(f"theta {theta:g}, {kind}, as the target's.")


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """Give what scales the rotation, `rope_type` included; nothing for the default type."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {}
    named = {key: value for key, value in rope.items() if key not in ("rope_theta", "type")}
    return named | {"rope_type": kind}


def _fitting_config(target: Target) -> DrafterConfig:
    """Give the shape that training would choose for this target where a recipe says nothing."""
    settings = DrafterSettings(mask_token_id=0, target_layer_ids=[0])
    return DrafterConfig.for_target(settings, target.model.config.get_text_config())


def check_attention(patient: Patient) -> Finding:
    """Check that layer types, window and causality agree, and name who serves them."""
    num_layers = patient.value("num_hidden_layers", int)
    types = patient.value("layer_types", list)
    demand(
        len(types) == num_layers and set(types) <= {FULL, SLIDING},
        f"layer_types (={types}) must name {FULL} or {SLIDING} once for each of {num_layers} "
        "layers.",
        remedy="Export the checkpoint again.",
    )
    slides = SLIDING in types
    window = patient.value("sliding_window", int, type(None))
    demand(
        slides == (window is not None) and window != 0,
        f"sliding_window (={window}) must be a number of tokens where a layer slides, and null "
        f"elsewhere; layer_types is {types}.",
        remedy="Write the window that training used.",
    )
    uses = patient.value("use_sliding_window", bool)
    demand(
        uses == slides,
        f"use_sliding_window (={str(uses).lower()}) must be {str(slides).lower()}: readers take "
        "the window from layers only where it is true.",
        remedy=f"Set it to {str(slides).lower()}.",
    )
    is_causal = patient.value("is_causal", bool, type(None))
    nested = patient.value("dflash_config.causal", bool, type(None))
    demand(
        nested is None or nested == is_causal,
        f"dflash_config.causal (={nested}) and is_causal (={is_causal}) must agree: vLLM and "
        "llama.cpp read either, z-lab and SGLang only is_causal.",
        remedy="Remove dflash_config.causal.",
    )
    size = patient.value("block_size", int)
    unfaithful = unfaithful_engines(types, is_causal, window=window, block_size=size)
    form = f"{types.count(FULL)} full, {types.count(SLIDING)} sliding, is_causal {is_causal}"
    if unfaithful:
        return warning(
            f"{form}: {', '.join(unfaithful)} would show a block other slots than training did.",
            remedy=f"Serve it with {', '.join(e for e in ENGINES if e not in unfaithful)}.",
        )
    return ok(f"{form}: {', '.join(ENGINES)} apply the mask of training.")


def unfaithful_engines(
    layer_types: list[str], is_causal: bool | None, *, window: int | None, block_size: int
) -> list[str]:
    """Give the engines that would, or might, apply another mask.

    llama.cpp has one causal flag for all layers and takes its absence for bidirectional, while a
    sliding layer is causal unless told otherwise. A window narrower than a bidirectional block
    bounds slots on both sides in z-lab and vLLM; of the others only the past is known.
    """
    if SLIDING not in layer_types or window is None:
        return []
    if is_causal is None:
        return ["llama.cpp"]
    return [] if is_causal or window >= block_size else ["SGLang", "llama.cpp"]


def check_scales(patient: Patient) -> Finding:
    """Check that factors on embeddings and logits are sound, and name who ignores them."""
    scale = patient.value("dflash_config.input_embedding_scale", int, float)
    multiplier = patient.value("dflash_config.output_multiplier", int, float)
    cap = patient.value("dflash_config.final_logit_softcapping", int, float, type(None))
    demand(
        all(math.isfinite(x) and x > 0 for x in (scale, multiplier)) and (cap is None or cap > 0),
        f"dflash_config: input_embedding_scale (={scale}) and output_multiplier (={multiplier}) "
        f"must be above 0, final_logit_softcapping (={cap}) too or null.",
        remedy="Export the checkpoint again.",
    )
    own = scale if patient.target is None else _embedding_scale(patient.target)
    if not math.isclose(scale, own, rel_tol=1e-2):
        return warning(
            f"dflash_config.input_embedding_scale (={scale:g}) is not the {own:g} by which the "
            "target's embedding module multiplies its rows.",
            remedy="Compare with the recipe that trained it.",
        )
    ignored = []
    if scale != 1.0:
        ignored.append("input_embedding_scale (vLLM but for DFlash 2; SGLang asks the target)")
    if multiplier != 1.0 or cap is not None:
        ignored.append("output_multiplier and soft cap (vLLM; greedy drafts stay the same)")
    if ignored:
        return warning(
            f"scale {scale:g}, multiplier {multiplier:g}, cap {cap}; not read by every server: "
            f"{'; '.join(ignored)}.",
            remedy="Serve with an engine that applies them.",
        )
    return ok("no factor on embeddings or logits.")


@torch.no_grad()
def _embedding_scale(target: Target) -> float:
    """Measure the factor of the target's embedding module on its raw rows."""
    ids = torch.arange(target.head.embedding_weight.shape[0], device=target.device)[:64]
    given = target.model.get_input_embeddings()(ids).float().norm()
    return float(given / target.head.embed(ids).float().norm())
