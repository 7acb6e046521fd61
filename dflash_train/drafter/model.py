"""The DFlash drafter: a block of masks becomes a block of hidden states in one pass.

Definition: arXiv 2602.06036 as realised by the PyPI package `dflash` 0.1.0. Parameter names are
the ones its checkpoints use. The variants (DFlash 2, DSpark, windows, a reduced vocabulary) are
named modules that a plain drafter does not have. Legend: A blocks, K slots, m slots of one block,
n drafts of it, S single slots, T context rows, L taps, E hidden size, V vocabulary, Vd ids that
can be drafted.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dflash_train.config import KernelChoice, require
from dflash_train.drafter.block_attention import Blocks, ContextKV
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.context import ContextCache, RawContext
from dflash_train.drafter.fused import RMSNorm
from dflash_train.drafter.heads import CandidateSelector, ConfidenceHead, MarkovHead
from dflash_train.drafter.layers import DrafterLayer, ExactRotary
from dflash_train.drafter.mixers import BlockConvolution
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.ops import Ops, choose_ops

INITIALIZER_RANGE = 0.02


class Drafter(nn.Module):
    """Target features and a block of masks in, the block's hidden states out.

    Embedding and head are the target's and stay outside (`FrozenHead`).
    """

    d2t: Tensor
    """`[Vd]` int64, target id minus draft id; only where the vocabulary is reduced."""

    def __init__(self, config: DrafterConfig) -> None:
        """Build a random drafter: normal weights (0.02), norms of ones, variants as no change."""
        super().__init__()
        self.config = config
        self.recomputes_layers = False
        """Set it to compute layers again in the backward pass instead of keeping their insides."""
        self.kernels = KernelChoice.auto
        """Set it to force Triton's or torch's operations."""
        width = config.hidden_size
        self.fc = nn.Linear(config.num_taps * width, width, bias=False)
        self.hidden_norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(
            DrafterLayer(config, visibility) for visibility in config.layer_visibility()
        )
        self.norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.rotary_emb = ExactRotary(config.to_qwen3())
        self.candidate_selector = CandidateSelector(config) if config.is_dflash2 else None
        self.markov_head = MarkovHead(config) if config.markov_rank is not None else None
        self.confidence_head = ConfidenceHead(config) if config.has_confidence_head else None
        if config.draft_vocab_size is not None:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INITIALIZER_RANGE)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, (BlockConvolution, MarkovHead)):
                module.start_as_identity()

    def forward(self, block_embeddings: Tensor, target_features: Tensor, blocks: Blocks) -> Tensor:
        """Run many blocks of packed documents, as in training and replay.

        Args:
            block_embeddings: `[A, K, E]` from `block_embeddings()`.
            target_features: `[T, L*E]`, documents laid end to end.
            blocks: Where documents and anchors stand.

        Returns:
            `[A, K, E]` hidden states after the final norm.
        """
        contexts = self.project_context(target_features, blocks.context_positions())
        return self.denoise(block_embeddings, contexts, blocks)

    def project_context(self, target_features: Tensor, positions: Tensor) -> list[ContextKV]:
        """Give each layer's keys and values of `[T, L*E]` features at `[T]` int64 positions."""
        raw = self._raw_context(target_features, positions)
        return self.ops(raw.cos).context_kv(raw)

    def extend_context(self, new_features: Tensor, cache: ContextCache) -> None:
        """Add `[n, L*E]` features, committed since the last call, to the context of a request."""
        start = cache.length
        positions = torch.arange(start, start + len(new_features), device=new_features.device)
        raw = self._raw_context(new_features, positions)
        ops = self.ops(raw.cos)
        if cache.layers and not torch.is_grad_enabled():
            ops.write_context_kv(raw, *cache.extend(raw.num_rows))
        else:
            cache.append(ops.context_kv(raw))

    def _raw_context(self, target_features: Tensor, positions: Tensor) -> RawContext:
        fused = self.hidden_norm(self.fc(target_features))  # [T, E]
        cos, sin = self._rotation(fused, positions)
        layers = [layer.self_attn for layer in self._typed_layers()]
        keys, values = zip(*(layer.keys_values(fused) for layer in layers), strict=True)
        return RawContext(
            keys=list(keys),
            values=list(values),
            weights=[layer.k_norm(None) for layer in layers],
            eps=self.config.rms_norm_eps,
            cos=cos,
            sin=sin,
        )

    def ops(self, like: Tensor) -> Ops:
        """Give the operations that run on the device and in the number format of a tensor."""
        return choose_ops(self.kernels, like.device, like.dtype)

    def denoise(
        self, block_embeddings: Tensor, contexts: list[ContextKV], blocks: Blocks
    ) -> Tensor:
        """Run blocks against a context that is projected already, as `forward` does; `[A, K, E]`.

        Args:
            block_embeddings: `[A, K, E]` from `block_embeddings()`.
            contexts: One entry per layer, from `project_context`.
            blocks: Where documents and anchors stand; their context offsets cut `contexts`.
        """
        x_AKE = block_embeddings
        cos, sin = self._rotation(x_AKE, blocks.slot_positions(x_AKE.shape[1]))
        ops = self.ops(x_AKE)
        for layer, context in zip(self._typed_layers(), contexts, strict=True):
            run = partial(layer, x_AKE, context, blocks, cos=cos, sin=sin, ops=ops)
            x_AKE = self._recomputed(run) if self.recomputes_layers else run()
        return self.norm(x_AKE)

    def new_cache(self) -> ContextCache:
        """Give the empty context cache of one request."""
        return ContextCache()

    def draft_step(
        self, block_embeddings: Tensor, new_features: Tensor, cache: ContextCache
    ) -> Tensor:
        """Run the block of one request whose context is cached, as in serving.

        Args:
            block_embeddings: `[m, E]`: the anchor's row, then m - 1 mask rows.
            new_features: `[n, L*E]`, features committed since the last call; they join the cache.
            cache: The request's context; after the call its length is the anchor's position.

        Returns:
            `[m, E]` hidden states after the final norm.
        """
        self.extend_context(new_features, cache)
        blocks = Blocks(
            context_offsets=[0, cache.length],
            block_offsets=[0, 1],
            anchor_positions=torch.tensor([cache.length], device=new_features.device),
        )
        return self.denoise(block_embeddings[None], cache.layers, blocks)[0]

    def logits(self, hidden: Tensor, head: FrozenHead) -> Tensor:
        """Give `[..., V]` logits of hidden states `[..., E]`, multiplier and soft cap applied.

        They are those of the parallel pass, before anything that depends on drafted tokens.
        """
        return self.shape_logits(head.logits(hidden))

    def shape_logits(self, logits: Tensor) -> Tensor:
        """Apply the output multiplier and the soft cap to raw head logits."""
        if self.config.output_multiplier != 1:
            logits = logits * self.config.output_multiplier
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def draft_token_ids(self) -> Tensor | None:
        """Give `[Vd]` int64, the target's ids that can be drafted; None is all V."""
        if self.config.draft_vocab_size is None:
            return None
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def set_draft_vocabulary(self, ids: Tensor) -> None:
        """Choose the ids that can be drafted, once, before training.

        Args:
            ids: `[Vd]` int64, ascending and distinct ids of the target's vocabulary.

        Raises:
            ValueError: The drafter wants another number of ids, or these are not ascending.
        """
        size, vocab_size = self.config.draft_vocab_size, self.config.vocab_size
        require(
            size == len(ids),
            f"drafter.draft_vocab_size (={size}) must equal the {len(ids)} ids that were chosen.",
        )
        fits = bool((ids.diff() > 0).all()) and int(ids[0]) >= 0 and int(ids[-1]) < vocab_size
        require(fits, f"drafter.draft_vocab_size: its ids must ascend within 0..{vocab_size - 1}.")
        self.d2t.copy_(ids - torch.arange(len(ids), device=ids.device))

    def output_head(self, head: FrozenHead) -> FrozenHead:
        """Restrict the target's head to the ids that this drafter drafts; do it once.

        Returns:
            The same object where that is the whole vocabulary.
        """
        ids = self.draft_token_ids
        return head if ids is None else head.restricted(ids)

    @torch.no_grad()
    def choose(self, hidden_SE: Tensor, previous_ids_S: Tensor, head: FrozenHead) -> Tensor:
        """Draft one token greedily for each of some slots, given the tokens before them.

        Args:
            hidden_SE: `[S, E]` from `forward` or `draft_step`.
            previous_ids_S: `[S]` int64, token before each draft; plain DFlash does not look.
            head: From `output_head`.

        Returns:
            `[S]` int64 ids of the target's vocabulary.
        """
        return self._choose(hidden_SE, previous_ids_S, self.slot_logits(hidden_SE, head), head)

    @torch.no_grad()
    def draft(self, hidden_mE: Tensor, anchor_id: Tensor, head: FrozenHead) -> Tensor:
        """Draft one block greedily, from left to right.

        Args:
            hidden_mE: `[m, E]` from `draft_step`, the anchor's slot included.
            anchor_id: int64 scalar or `[1]`, the block's anchor.
            head: From `output_head`.

        Returns:
            `[n]` int64 ids of the target's vocabulary, n = m - 1, or m in the shifted layout.
        """
        hidden_nE = hidden_mE[self.config.first_slot :]
        logits_nV = self.slot_logits(hidden_nE, head)
        previous = anchor_id.reshape(1)
        if self.candidate_selector is None and self.markov_head is None:
            return self._choose(hidden_nE, previous.expand(len(hidden_nE)), logits_nV, head)
        drafts = [previous[:0]]
        for hidden_1E, logits_1V in zip(hidden_nE.split(1), logits_nV.split(1), strict=True):
            previous = self._choose(hidden_1E, previous, logits_1V, head)
            drafts.append(previous)
        return torch.cat(drafts)

    @torch.no_grad()
    def confidence(self, hidden_SE: Tensor, previous_ids_S: Tensor) -> Tensor:
        """Estimate for each slot the probability that its draft is accepted, `[S]` (DSpark)."""
        return self.confidence_logits(hidden_SE, previous_ids_S).sigmoid()

    def confidence_logits(self, hidden_SE: Tensor, previous_ids_S: Tensor) -> Tensor:
        """Give the same as logits, `[S]`, with their graph: the confidence loss wants these.

        Args:
            hidden_SE: `[S, E]` after the final norm.
            previous_ids_S: `[S]` int64, token before each slot's draft.
        """
        assert self.confidence_head is not None
        assert self.markov_head is not None
        return self.confidence_head(hidden_SE, self.markov_head.markov_w1(previous_ids_S))

    def slot_logits(self, hidden_SE: Tensor, head: FrozenHead) -> Tensor:
        """Give `[S, Vd]` logits of hidden states of any dtype, in the head's."""
        return self.logits(hidden_SE.to(head.lm_head_weight.dtype), head)

    def slot_scores(
        self, hidden_SE: Tensor, previous_ids_S: Tensor, logits_SV: Tensor, head: FrozenHead
    ) -> tuple[Tensor, Tensor]:
        """Score the ids that each slot may draft, given the token before it.

        Args:
            hidden_SE: `[S, E]` from `forward` or `draft_step`.
            previous_ids_S: `[S]` int64, token before each draft.
            logits_SV: `[S, Vd]`, `logits` of the hidden states.
            head: From `output_head`.

        Returns:
            `[S, C]` scores and `[S, C]` int64 ids of the target's vocabulary: DFlash 2's
            candidates, else all that can be drafted.
        """
        if self.candidate_selector is not None:
            return self.candidate_selector.candidates(hidden_SE, previous_ids_S, logits_SV)
        if self.markov_head is not None:
            logits_SV = logits_SV + self.markov_head(hidden_SE, previous_ids_S)
        return logits_SV, head.output_ids.expand(logits_SV.shape)

    def _choose(
        self, hidden_SE: Tensor, previous_ids_S: Tensor, logits_SV: Tensor, head: FrozenHead
    ) -> Tensor:
        scores_SC, ids_SC = self.slot_scores(hidden_SE, previous_ids_S, logits_SV, head)
        return ids_SC.gather(-1, scores_SC.argmax(-1, keepdim=True)).squeeze(-1)

    def _recomputed(self, run: Callable[[], Tensor]) -> Tensor:
        # Nothing in a layer is random. Under ZeRO-3 a weight is empty until its module runs, so
        # shapes noted in the forward pass prove nothing.
        return checkpoint(
            run, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
        )

    def _rotation(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary_emb(like, positions.reshape(1, -1))
        shape = (*positions.shape, cos.shape[-1])
        return cos.view(shape), sin.view(shape)

    def _typed_layers(self) -> list[DrafterLayer]:
        return [layer for layer in self.layers if isinstance(layer, DrafterLayer)]


def block_embeddings(
    head: FrozenHead, anchor_ids: Tensor, *, num_slots: int, config: DrafterConfig
) -> Tensor:
    """Give the input rows of blocks: the anchor's raw embedding row, then mask rows, scaled.

    Args:
        head: The target's embedding table.
        anchor_ids: `[A]` int64, token at each anchor.
        num_slots: Slots per block, K or fewer.
        config: Mask id and embedding scale.

    Returns:
        `[A, num_slots, E]`.
    """
    ids = anchor_ids.new_full((anchor_ids.shape[0], num_slots), config.mask_token_id)
    ids[:, 0] = anchor_ids
    return head.embed(ids) * config.input_embedding_scale
