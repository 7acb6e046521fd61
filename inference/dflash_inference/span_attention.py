"""Attention of one target pass: every request's new tokens meet that request's cache, no other.

Transformers gives each attention layer's queries, keys and values to a function that is looked up
by name; `ATTENTION_NAME` is ours. It cuts them into the requests' spans, writes keys and values
into their caches and lets the attention that the model was loaded with do the rest, so soft caps,
sinks and scales stay the model's own. Legend: N new tokens of all requests, Q of one, S rows of a
request's cache with the new ones, H query heads, G kv heads, D head dim.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dflash_inference.cache import KeyValueCache

ATTENTION_NAME = "dflash_spans"

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(kw_only=True)
class Span:
    """New tokens of one request."""

    token_ids: list[int]
    """`[Q]`."""
    cache: KeyValueCache
    """Holds the tokens before. Rows of the new ones count once the caller commits them."""
    last_logits_only: bool = False
    """Whether logits of the last token are enough."""
    depths: list[int] | None = None
    """Position of each token behind the cache; None counts 0, 1, 2, ... Siblings in a tree of
    drafts share one."""
    visible: Tensor | None = None
    """`[Q, Q]` bool, which new tokens each new token sees; None is all up to itself."""

    @property
    def width(self) -> int:
        """Q, the number of new tokens."""
        return len(self.token_ids)

    def position_ids(self) -> list[int]:
        """Give the position of each new token."""
        depths = range(self.width) if self.depths is None else self.depths
        return [self.cache.length + depth for depth in depths]

    def mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """Give which rows each new token sees, `[Q, S]` bool; None where causal order says it.

        Args:
            window: Rows that a sliding layer sees, the token's own included; None is all.
            device: Where the mask is needed.
        """
        cached, num_rows = self.cache.length, self.cache.length + self.width
        is_chain = self.visible is None
        if is_chain and (window is None or num_rows <= window) and 1 in (self.width, cached + 1):
            return None  # one row that sees everything, or a causal square
        if self.visible is None:
            seen = torch.ones(self.width, num_rows, dtype=torch.bool, device=device).tril(cached)
        else:
            before = torch.ones(self.width, cached, dtype=torch.bool, device=device)
            seen = torch.cat([before, self.visible.to(device)], dim=1)
        if window is None:
            return seen
        positions = torch.tensor(self.position_ids(), device=device)
        rows = torch.cat([torch.arange(cached, device=device), positions])
        return seen & (positions[:, None] - rows < window)


@dataclass(kw_only=True)
class SpanAttention:
    """The attention layers of one model, in the order in which a pass calls them."""

    model: PreTrainedModel
    spans: list[Span] = field(default_factory=list)
    """Those of the pass that runs."""
    layer: int = 0
    """The attention layer whose turn is next."""
    modules: list[tuple[nn.Module, dict[str, Any]]] = field(default_factory=list)
    """Each layer's module and options, noted in the first pass."""
    masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    """Masks of this pass, by span and window."""

    def begin(self, spans: list[Span]) -> None:
        """Start a pass over these spans; this model's layers are the ones that call from here."""
        global _running
        _running = self
        self.spans, self.layer, self.masks = spans, 0, {}

    def note(self, module: nn.Module, options: dict[str, Any]) -> None:
        """Remember a layer in the first pass, so that compiled code need not hand it over."""
        if self.layer == len(self.modules):
            self.modules.append((module, options))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in the layer whose turn it is.

        Args:
            q: `[1, H, N, D]`, rotated.
            k: `[1, G, N, D]`, rotated.
            v: `[1, G, N, D]`.

        Returns:
            `[1, N, H, D]`.
        """
        module, options = self.modules[self.layer]
        layer, self.layer = self.layer, self.layer + 1
        outputs, first = [], 0
        for index, span in enumerate(self.spans):
            q_span, k_span, v_span = (each[:, :, first : first + span.width] for each in (q, k, v))
            first += span.width
            keys, values = span.cache.write(layer, k_span, v_span)
            key = (index, options.get("sliding_window"))
            if key not in self.masks:
                self.masks[key] = self._mask(span, key[1], q)
            function = self._function(module)
            outputs.append(function(module, q_span, keys, values, self.masks[key], **options)[0])
        return torch.cat(outputs, dim=1)

    def _mask(self, span: Span, window: int | None, q: Tensor) -> Tensor | None:
        """Give what a span's mask adds to the scores, `[1, 1, Q, S]`; None is causal."""
        mask = span.mask(window, q.device)
        if self._is_eager and mask is None and span.width > 1:
            mask = torch.ones(span.width, span.width, dtype=torch.bool, device=q.device).tril()
        if mask is None:
            return None
        # Numbers, because a kernel that is given booleans makes numbers of them in every layer.
        nothing = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        return nothing.masked_fill(~mask, torch.finfo(q.dtype).min)[None, None]

    def __post_init__(self) -> None:
        """Note what the model was loaded with."""
        self._loaded_with = str(self.model.config._attn_implementation or "eager")
        self._is_eager = self._loaded_with == "eager"

    def _function(self, module: nn.Module) -> AttentionFunction:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS.get_interface(self._loaded_with, eager)


_running: SpanAttention | None = None
"""The model whose pass runs. One at a time: a pass is never entered from within another."""


def _attention_of_spans(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What Transformers calls; names and order of the first five are its own."""
    if torch.compiler.is_compiling():
        return torch.ops.dflash_inference.attend_spans(query, key, value), None
    assert _running is not None, "SpanAttention.begin comes before the pass"
    _running.note(module, options)
    return _running.attend(query, key, value), None


@torch.library.custom_op("dflash_inference::attend_spans", mutates_args=())
def _attend_spans(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same for compiled layers: one call that the compiler does not look into."""
    assert _running is not None
    return _running.attend(query, key, value).contiguous()


@_attend_spans.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value.shape[-1])


AttentionInterface.register(ATTENTION_NAME, _attention_of_spans)
