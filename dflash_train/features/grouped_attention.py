"""Attention of the target on a CPU that leaves the groups of its keys and values as they are.

Where there is a mask, as in every padded batch, Transformers repeats keys and values for each query
head before it calls `scaled_dot_product_attention`, since kernels of other devices take groups or a
mask. The CPU's kernel takes both, to the same bits, and copies nothing: in `regenerate` that copy
was the largest part of the time of an answer's token.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "sdpa_grouped"


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Let a model on a CPU that runs `sdpa` keep its groups; any other one stays as it is."""
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, _grouped_sdpa)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # the same masks
    model.set_attn_implementation(NAME)


def _grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attend as Transformers' `sdpa` does; it takes the cases that need no repeated keys itself.

    Args:
        module: The layer.
        query: `[B, H, Q, D]`.
        key: `[B, G, T, D]`.
        value: `[B, G, T, D]`.
        attention_mask: `[B, 1, Q, T]`, True or 0 where a query may attend; None: causal.
        dropout: Share of the weights that are set to 0.
        scaling: Factor of the logits; None is `D ** -0.5`.
        **settings: Anything else of Transformers' own function.

    Returns:
        `[B, Q, H, D]` and no weights.
    """
    has_groups = key.shape[1] != query.shape[1]
    is_usual = settings.get("position_bias") is None and settings.get("cache") is None
    if attention_mask is None or not has_groups or not is_usual:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, **settings,
        )  # fmt: skip
    attended = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=True,
    )
    return attended.transpose(1, 2).contiguous(), None
