"""Start a drafter from the target's last layers instead of from noise.

A drafter layer has the shapes of a target layer when the recipe copies them, so the last N layers
of the target are a better start than random weights. What differs is arranged so that the context
keys and values are, at the start, the ones that the target itself would compute:

- `fc` passes the last tap through (plus a little noise of the other taps), because the deepest
  state is the nearest to the input of the copied layers;
- a target layer norms its input with weights of its own, while the drafter norms the context once
  for all layers: the weights move into the projections, and the drafter's input norms start at 1;
- where the target does not norm queries and keys per head, the norms' weights start at the size
  that its projections give to a normed input, which keeps the temperature of its attention.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dflash_train.config import require
from dflash_train.drafter.model import Drafter

OTHER_TAPS_SCALE = 0.1
"""Share of the random initialisation that the columns of `fc` keep."""


@torch.no_grad()
def initialize_from_target(drafter: Drafter, target: PreTrainedModel) -> None:
    """Copy the target's last layers and its final norm into a freshly built drafter.

    Raises:
        ValueError: The target's layers have other names or shapes than the drafter's, or parts
            that it has no place for, such as biases.
    """
    activation = target.config.get_text_config().to_dict().get("hidden_act")
    require(
        activation == "silu",
        f"drafter.init (=target): the target's hidden_act (={activation}) must be silu, as the "
        "drafter's MLP. Set drafter.init=random.",
    )
    decoder = target.get_decoder()
    num_copied = drafter.config.num_hidden_layers
    first = drafter.config.num_target_layers - num_copied
    for number in range(num_copied):
        source = decoder.get_submodule(f"layers.{first + number}")
        _copy_layer(drafter.layers[number], dict(source.named_parameters()))
    _copy(drafter.norm.weight, dict(decoder.named_parameters()), "norm.weight")
    width = drafter.config.hidden_size
    drafter.fc.weight.mul_(OTHER_TAPS_SCALE)
    drafter.fc.weight[:, -width:] += torch.eye(width)


def _copy_layer(layer: nn.Module, source: dict[str, Tensor]) -> None:
    _refuse_leftovers(layer, source)
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"):
        _copy(layer.get_parameter(f"{name}.weight"), source, f"{name}.weight")
    name = "post_attention_layernorm.weight"
    _copy(layer.get_parameter(name), source, name)
    input_norm = torch.ones_like(layer.get_parameter("input_layernorm.weight"))
    _copy(input_norm, source, "input_layernorm.weight")
    for head in ("q", "k", "v"):
        name = f"self_attn.{head}_proj.weight"
        projection = layer.get_parameter(name)
        _copy(projection, source, name)
        projection.mul_(input_norm)
    for head in ("q", "k", "v", "o"):
        name = f"self_attn.{head}_proj.bias"
        if name in source and name in dict(layer.named_parameters()):
            _copy(layer.get_parameter(name), source, name)
    for head in ("q", "k"):
        name = f"self_attn.{head}_norm.weight"
        if name in source:
            _copy(layer.get_parameter(name), source, name)
        else:
            projection = layer.get_parameter(f"self_attn.{head}_proj.weight")
            layer.get_parameter(name).fill_(projection.square().sum(dim=1).mean().sqrt())


def _refuse_leftovers(layer: nn.Module, source: dict[str, Tensor]) -> None:
    """Raise ValueError if the target's layer computes with parts that would not be copied."""
    leftovers = sorted(set(source) - {name for name, _ in layer.named_parameters()})
    biases_only = all(name.endswith("_proj.bias") for name in leftovers)
    remedy = "drafter.attention_bias=true" if biases_only else "drafter.init=random"
    require(
        not leftovers,
        f"drafter.init (=target): the target's layers have {', '.join(leftovers)}, which the "
        f"drafter has no place for. Set {remedy}.",
    )


def _copy(into: Tensor, source: dict[str, Tensor], name: str) -> None:
    found = source.get(name)
    if found is None or found.shape != into.shape:
        shape = "missing" if found is None else str(tuple(found.shape))
        raise ValueError(
            f"drafter.init (=target) needs a target layer's {name} of shape {tuple(into.shape)}, "
            f"which is {shape}. Leave the drafter's widths to the target's, or set "
            "drafter.init=random."
        )
    into.copy_(found)
