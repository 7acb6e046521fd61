"""The doctor's checks of `model.safetensors`: names, shapes, numbers, and what they compute."""

import torch
from torch import Tensor

from dflash_train.drafter.checkpoint import CONFIG_NAME, WEIGHTS_NAME, read_tensors
from dflash_train.drafter.golden import check_golden
from dflash_train.drafter.metadata import METADATA_NAME
from dflash_train.release.finding import Finding, Patient, demand, ok, skipped

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
NORM_SCALE = (1e-3, 1e3)
"""Bounds of a norm's mean absolute weight; trained ones lie between 0.05 and 50."""
BORROWED = ("lm_head.weight", "embed_tokens.weight", "model.embed_tokens.weight")


def check_tensors(patient: Patient) -> Finding:
    """Check that names and shapes are the config's, and that the numbers can be trained ones."""
    borrowed = [name for name in BORROWED if name in patient.shapes]
    demand(
        not borrowed,
        f"{', '.join(borrowed)}: embedding and head are the target's, and servers refuse or "
        "ignore a copy.",
        remedy=f"Remove it from {WEIGHTS_NAME}.",
    )
    _ = patient.drafter  # raises with the names that are missing, unknown or misshapen
    tensors = read_tensors(patient.folder)
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    dtypes = {tensor.dtype for tensor in floating.values()}
    demand(
        len(dtypes) == 1 and dtypes <= set(FLOATS),
        f"{WEIGHTS_NAME} holds {', '.join(sorted(map(str, dtypes)))}; servers want one of "
        "bfloat16, float16, float32 throughout.",
        remedy="Export the checkpoint again.",
    )
    for name, tensor in floating.items():
        _check_numbers(name, tensor)
    (dtype,) = dtypes
    num_parameters = sum(tensor.numel() for tensor in floating.values())
    return ok(
        f"{len(tensors)} tensors, {num_parameters / 1e6:.1f} M parameters, "
        f"{str(dtype).removeprefix('torch.')}, finite, as {CONFIG_NAME} says."
    )


def _check_numbers(name: str, tensor: Tensor) -> None:
    remedy = "Take another checkpoint of the run, or copy the file again."
    demand(bool(torch.isfinite(tensor).all()), f"{name} holds NaN or infinity.", remedy=remedy)
    if tensor.dim() > 1:  # a vector may be constant: norms start as ones, biases as zeros
        is_constant = bool((tensor == tensor.flatten()[0]).all())
        demand(not is_constant, f"{name} is one number repeated: never trained.", remedy=remedy)
    elif name.endswith("norm.weight"):
        size = tensor.float().abs().mean().item()
        low, high = NORM_SCALE
        demand(
            low <= size <= high,
            f"{name} has a mean size of {size:.1e}, which no training gives.",
            remedy=remedy,
        )


def check_golden_forward(patient: Patient) -> Finding:
    """Check that the drafter computes what it computed when it was saved."""
    golden = None if patient.metadata is None else patient.metadata.golden
    if golden is None:
        return skipped(
            f"no golden forward in {METADATA_NAME}: another toolkit or version wrote the folder"
        )
    error = check_golden(patient.drafter, golden)
    demand(
        error <= golden.tolerance,
        f"the stored forward comes out otherwise, by {error:.0e} of its size: weights or settings "
        "(RoPE, causality, window, order of taps, mask id, scales) are not those that were saved.",
        remedy=f"Undo the edit of {CONFIG_NAME} or {WEIGHTS_NAME}, or export the checkpoint again.",
    )
    return ok(f"the stored forward comes out again, {error:.0e} off.")
