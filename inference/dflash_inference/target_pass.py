"""One pass of the target over new tokens of several requests, each with a cache of its own.

The tokens of all requests lie end to end in one row, so nothing is padded and each linear layer
multiplies one matrix; only attention keeps the requests apart (span_attention.py). At one request
the pass computes what `model(...)` computes. `fast=True` changes how, for a few tokens on a CPU
(packed_linear.py), and rounds sums in another order.

Legend: N new tokens of all requests, Q of one, L taps, E hidden size, V vocabulary.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from dflash_inference.cache import KeyValueCache
from dflash_inference.packed_linear import PackedHead, can_pack, pack_linears
from dflash_inference.span_attention import ATTENTION_NAME, Span, SpanAttention
from dflash_train.config import require
from dflash_train.drafter.model import Drafter
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.taps import tap_layers
from dflash_train.features.target import Target

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_CROPPABLE_LAYERS = frozenset({"full_attention", "sliding_attention"})


@dataclass(kw_only=True)
class SpanOutput:
    """What the pass says about one request's new tokens."""

    logits: Tensor
    """`[Q, V]`, or `[1, V]` of the last token."""
    features: Tensor
    """`[Q, L*E]`."""


class TargetPass:
    """Runs the target for every decoder of this package."""

    def __init__(self, target: Target, *, fast: bool = False) -> None:
        """Take a target; `fast` packs and compiles a second copy of its structure.

        The packed weights of a fast pass take as much memory as the model's linear layers again;
        compiling takes some seconds at the first passes and needs a C++ compiler.

        Raises:
            ValueError: The target has layers whose memory cannot be cropped.
        """
        require_croppable(target)
        self.target = target
        self.is_fast = fast
        self.attention = SpanAttention(model=target.model)
        self.model = fast_copy(target.model) if fast else target.model
        if fast:
            self.run([Span(token_ids=[0], cache=KeyValueCache(capacity=1))])  # notes its layers
            compile_layers(self.model.get_decoder())

    @torch.inference_mode()
    def run(self, spans: list[Span]) -> list[SpanOutput]:
        """Run the new tokens of several requests; their caches hold the rows, not yet committed."""
        device = self.target.device
        ids = [token for span in spans for token in span.token_ids]
        positions = [position for span in spans for position in span.position_ids()]
        asked = _rows_with_logits(spans)
        self.attention.begin(spans)
        with self._span_attention(), tap_layers(self.model, self.target.target_layer_ids) as tapped:
            output = self.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(asked, device=device),
            )
        features = torch.cat(tapped, dim=-1)[0].split([span.width for span in spans])
        logits = output.logits[0].split([_num_logits(span) for span in spans])
        return [
            SpanOutput(logits=each, features=rows)
            for each, rows in zip(logits, features, strict=True)
        ]

    @contextmanager
    def _span_attention(self) -> Iterator[None]:
        """Let the model use our attention function for the length of a pass."""
        config = self.model.config
        before = config._attn_implementation
        config._attn_implementation = ATTENTION_NAME
        try:
            yield
        finally:
            config._attn_implementation = before


def require_croppable(target: Target) -> None:
    """Check that a target forgets rejected tokens when its cache is cropped.

    Raises:
        ValueError: A layer keeps a running state, or sees chunks.
    """
    config = target.model.config.get_text_config().to_dict()
    kinds = set(config.get("layer_types") or []) - _CROPPABLE_LAYERS
    require(
        not kinds and not target.model._is_stateful,
        f"target.name_or_path (={target.name}) has layers of the kinds "
        f"{sorted(kinds) or ['recurrent state']}, whose memory cannot be cropped to the accepted "
        "tokens. Measure it by replay (`dflash-train evaluate evaluate.live_traffic=0 "
        "evaluate.live_per_set=0`), or serve it with vLLM.",
    )


def fast_copy(module: ModuleT) -> ModuleT:
    """Copy a module's structure, sharing its tensors, and pack its linear layers where possible."""
    shared = [*module.parameters(), *module.buffers()]
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
    if can_pack(shared[0].device):
        pack_linears(copied)
    return copied


def fast_drafter(drafter: Drafter, head: FrozenHead) -> tuple[Drafter, FrozenHead]:
    """Copy a drafter and its head for a few rows at a time on a CPU; tensors are shared."""
    if not can_pack(head.lm_head_weight.device):
        return drafter, head
    packed = PackedHead(
        embedding_weight=head.embedding_weight,
        lm_head_weight=head.lm_head_weight,
        draft_token_ids=head.draft_token_ids,
    )
    return fast_copy(drafter), packed


def compile_layers(stack: nn.Module) -> None:
    """Compile the layers of a decoder, in place; like layers share one graph, any width fits."""
    for layer in stack.get_submodule("layers").children():
        layer.forward = torch.compile(layer.forward, dynamic=True)


def _rows_with_logits(spans: list[Span]) -> list[int]:
    """Give the rows, among those of all spans, whose logits are asked for."""
    rows, first = [], 0
    for span in spans:
        last = first + span.width
        rows += range(last - 1 if span.last_logits_only else first, last)
        first = last
    return rows


def _num_logits(span: Span) -> int:
    return 1 if span.last_logits_only else span.width
