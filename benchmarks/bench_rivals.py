"""The DFlash steps of `speculators` 0.9.0 and `specforge` 0.2.0, on our weights and anchors.

Both run their own, unchanged model and loss code. Only their random draw of anchors is replaced by
the anchors of the case, so that all contenders train the same blocks. They live in folders of their
own (`make bench-train` installs them) and are imported in their own process.

FlexAttention, their usual choice, has no backward on a CPU in torch 2.13, and the fused losses of
speculators are Triton kernels; `attention` therefore is `sdpa` or `eager` with a dense mask, and
the loss of speculators its eager cross entropy.
"""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config

from benchmarks.bench_case import DECAY_GAMMA, Case
from benchmarks.bench_twin import packed_labels


class SpeculatorsStep:
    """The packed step of speculators; its labels are the argmax of the target's head."""

    def __init__(self, case: Case, *, attention: str) -> None:
        """Build its model from the weights of the case.

        Args:
            case: What to train on.
            attention: `sdpa` or `eager`.
        """
        self.case = case
        core = import_module("speculators.models.dflash.core")
        losses = import_module("speculators.losses")
        self.model = core.DFlashDraftModel(_speculators_config(case, attention)).train()
        _load_weights(self.model, case)
        for name in ("embed_tokens", "lm_head", "verifier_lm_head"):
            self.model.get_submodule(name).weight.data.copy_(case.embedding)
        self.model.verifier_norm.weight.data.fill_(1.0)
        anchors_A = case.packed_anchors
        is_alive_A = torch.ones_like(anchors_A, dtype=torch.bool)
        vars(core)["select_anchors"] = lambda *_: (anchors_A, is_alive_A)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.batch = _speculators_batch(case)
        self.loss_config = losses.resolve_loss_config("ce", "eager")

    def loss(self) -> Tensor:
        """Give its loss with its graph; metrics are computed with it, as in its trainer."""
        _, loss, _ = self.model(
            **self.batch,
            loss_config=self.loss_config,
            gamma=DECAY_GAMMA,
            max_anchors=self.case.shapes.num_blocks,
        )
        return loss

    @torch.no_grad()
    def slot_losses(self) -> Tensor:
        """Give `[A, K]`, the cross entropy of the token at every slot's place in the row."""
        _, logits, *_ = self.model._backbone_forward(
            **self.batch, max_anchors=self.case.shapes.num_blocks
        )
        return _cross_entropy(logits, self.case)


class SpecForgeStep:
    """The padded step of SpecForge: one row per document, its head in checkpointed chunks."""

    def __init__(self, case: Case, *, attention: str, chunk_blocks: int) -> None:
        """Build its model from the weights of the case.

        Args:
            case: What to train on.
            attention: `sdpa` or `eager`.
            chunk_blocks: Blocks per row whose logits exist at once and are computed again in the
                backward pass; 0 keeps all logits and computes them once.
        """
        self.case = case
        drafts = import_module("specforge.modeling.draft.dflash")
        family = import_module("specforge.algorithms.common.dflash_family_model")
        config = _qwen3_config(case, attention)
        config.num_target_layers = case.shapes.num_target_layers
        config.block_size = case.shapes.block_size
        config.dflash_config = {
            "mask_token_id": case.shapes.mask_token_id,
            "target_layer_ids": list(range(case.shapes.num_taps)),  # only their number matters
        }
        draft = drafts.DFlashDraftModel(config).train()
        _load_weights(draft, case)
        self.parameters = list(draft.parameters())
        self.model = family.OnlineDFlashModel(
            draft_model=draft,
            target_lm_head=_frozen_head(case),
            target_embed_tokens=nn.Embedding.from_pretrained(case.embedding, freeze=True),
            mask_token_id=case.shapes.mask_token_id,
            block_size=case.shapes.block_size,
            attention_backend=attention,
            num_anchors=case.shapes.anchors_per_document,
            loss_decay_gamma=DECAY_GAMMA,
            objective_chunk_blocks=chunk_blocks,
        )
        is_alive = torch.ones_like(case.anchors, dtype=torch.bool)
        self.model._sample_anchor_positions = lambda *_: (case.anchors, is_alive)
        rows = (case.shapes.num_documents, case.shapes.document_tokens)
        self.batch = {
            "input_ids": case.input_ids.view(rows),
            "hidden_states": case.features.view(*rows, -1),
            "loss_mask": case.loss_mask.view(rows).float(),
        }

    def loss(self) -> Tensor:
        """Give its loss with its graph."""
        loss, _, _ = self.model(**self.batch)
        return loss

    @torch.no_grad()
    def slot_losses(self) -> Tensor:
        """Give `[A, K]`, the cross entropy of the token at every slot's place in the row."""
        _, _, hidden = self.model._forward_draft_blocks(**self.batch)
        return _cross_entropy(self.model.lm_head(hidden), self.case)


def _speculators_config(case: Case, attention: str) -> Any:
    package = import_module("speculators")
    proposals = import_module("speculators.proposals.greedy")
    dflash = import_module("speculators.models.dflash")
    num_drafts = case.shapes.block_size - 1
    return dflash.DFlashSpeculatorConfig(
        transformer_layer_config=_qwen3_config(case, attention),
        draft_vocab_size=case.shapes.vocab_size,
        block_size=case.shapes.block_size,
        # Its ids count the embedding as 0; only their number matters here.
        aux_hidden_state_layer_ids=list(range(1, case.shapes.num_taps + 1)),
        mask_token_id=case.shapes.mask_token_id,
        speculators_config=package.SpeculatorsConfig(
            algorithm="dflash",
            proposal_methods=[proposals.GreedyTokenProposalConfig(speculative_tokens=num_drafts)],
            default_proposal_method="greedy",
            verifier=package.VerifierConfig(name_or_path=None, architectures=[]),
        ),
    )


def _speculators_batch(case: Case) -> dict[str, Tensor]:
    """Lay the documents in one row and pad it by K tokens, as its collator pads to its length.

    Without padding, a block at the end of the row would index past it; speculators draws no anchor
    among the last K tokens of a row for that reason.
    """
    shapes = case.shapes
    size, pad = shapes.document_tokens, shapes.block_size
    documents = torch.arange(shapes.num_documents).repeat_interleave(size)
    positions = torch.arange(size).repeat(shapes.num_documents)
    return {
        "hidden_states": F.pad(case.features, (0, 0, 0, pad))[None],
        "input_ids": F.pad(case.input_ids, (0, pad))[None],
        "loss_mask": F.pad(case.loss_mask.long(), (0, pad))[None],
        "verifier_last_hidden_states": F.pad(case.last_hidden, (0, 0, 0, pad))[None],
        "document_ids": F.pad(documents, (0, pad), value=-1)[None],
        "position_ids": F.pad(positions, (0, pad))[None],
    }


def _qwen3_config(case: Case, attention: str) -> Qwen3Config:
    shapes = case.shapes
    config = Qwen3Config(
        hidden_size=shapes.hidden_size,
        intermediate_size=shapes.intermediate_size,
        num_hidden_layers=shapes.num_hidden_layers,
        num_attention_heads=shapes.num_attention_heads,
        num_key_value_heads=shapes.num_key_value_heads,
        head_dim=shapes.head_dim,
        vocab_size=shapes.vocab_size,
        rms_norm_eps=shapes.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shapes.rope_theta},
        layer_types=["full_attention"] * shapes.num_hidden_layers,
    )
    config._attn_implementation = attention
    return config


def _load_weights(model: nn.Module, case: Case) -> None:
    """Copy the drafter's tensors; every one must find its place.

    Raises:
        RuntimeError: A tensor of the case has no place, or a drafter tensor is left as it was.
    """
    found = model.load_state_dict(case.weights, strict=False)
    borrowed = ("embed_tokens.", "lm_head.", "verifier_")
    left = [name for name in found.missing_keys if not name.startswith(borrowed)]
    if left or found.unexpected_keys:
        raise RuntimeError(f"{type(model).__name__}: {left} unset, {found.unexpected_keys} unknown")


def _frozen_head(case: Case) -> nn.Linear:
    head = nn.Linear(1, 1, bias=False)
    head.weight = nn.Parameter(case.embedding, requires_grad=False)
    return head


def _cross_entropy(logits: Tensor, case: Case) -> Tensor:
    labels_AK = packed_labels(case)
    flat = logits.reshape(labels_AK.numel(), -1)
    return F.cross_entropy(flat, labels_AK.flatten(), reduction="none").view_as(labels_AK)
