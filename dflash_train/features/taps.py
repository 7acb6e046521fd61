"""Reading the outputs of some decoder layers while a model runs.

A tap with id k is the output of decoder layer k (0-based), `hidden_states[k + 1]` in Transformers,
before the final norm. Hooks stand on those layers alone, so no other layer's states are kept.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


@contextmanager
def tap_layers(model: PreTrainedModel, layer_ids: list[int]) -> Iterator[list[Tensor]]:
    """Collect the outputs of decoder layers during a pass.

    Args:
        model: The causal language model that runs meanwhile.
        layer_ids: 0-based ids of decoder layers, in the order wanted.

    Yields:
        A list that holds one `[B, Q, E]` per id once the context has been left.
    """
    collected: dict[int, Tensor] = {}
    tapped: list[Tensor] = []

    def keep(layer_id: int) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, output: Any) -> None:
            collected[layer_id] = output[0] if isinstance(output, tuple) else output

        return hook

    decoder = model.get_decoder()
    handles = [
        decoder.get_submodule(f"layers.{k}").register_forward_hook(keep(k)) for k in layer_ids
    ]
    try:
        yield tapped
        tapped.extend(collected[k] for k in layer_ids)
    finally:
        for handle in handles:
            handle.remove()
