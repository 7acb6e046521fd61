"""How many numbers a drafter trains: counted on torch's `meta` device, which holds none of them."""

from dataclasses import dataclass

import torch

from dflash_train.config import OptimConfig, OptimizerName
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.model import Drafter
from dflash_train.training.optim import is_inner_matrix


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Trained numbers of one drafter."""

    total: int
    layers: int
    per_layer: int
    fusion: int
    """Of `fc` and the norms outside the layers."""
    heads: int
    """Of what a variant has beside its trunk: codebooks, Markov tables, confidence."""
    moments: int
    """Numbers of optimiser state: two for each under AdamW, one for a matrix under Muon."""


def count_parameters(drafter: DrafterConfig, optim: OptimConfig) -> Parameters:
    """Build the drafter without memory and count."""
    with torch.device("meta"):
        named = list(Drafter(drafter).named_parameters())
    total = sum(p.numel() for _, p in named)
    layers = sum(p.numel() for name, p in named if name.startswith("layers."))
    is_fusion = ("fc.", "hidden_norm.", "norm.")
    fusion = sum(p.numel() for name, p in named if name.startswith(is_fusion))
    by_muon = sum(p.numel() for name, p in named if is_inner_matrix(name, p))
    return Parameters(
        total=total,
        layers=layers,
        per_layer=layers // drafter.num_hidden_layers,
        fusion=fusion,
        heads=total - layers - fusion,
        moments=2 * total - (by_muon if optim.name is OptimizerName.muon else 0),
    )
