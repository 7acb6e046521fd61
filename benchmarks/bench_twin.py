"""The plain twin: a DFlash step as anybody would write it first, and right.

One dense mask `[Q, T + Q]`, all logits at once, autograd for the rest. It shares no code with
`dflash_train`, so it is also an independent check of the other contenders' losses and gradients.
Legend: T context tokens, A anchors, K block size, Q = A*K, H heads, G kv heads, D head dim, E
hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench_case import Case, Shapes, decay_weights


class PlainTwin:
    """Drafter, head and loss of one case."""

    def __init__(self, case: Case) -> None:
        """Copy the weights of the case."""
        self.case = case
        self.weights = {name: nn.Parameter(value.clone()) for name, value in case.weights.items()}
        self.parameters = list(self.weights.values())

    def loss(self) -> Tensor:
        """Give the paper's loss (arXiv 2602.06036, Eq. 4), a scalar with its graph."""
        labels_AK = packed_labels(self.case)
        ce_AK = F.cross_entropy(
            self.logits(), labels_AK.flatten(), reduction="none"
        ).view_as(labels_AK)  # fmt: skip
        weights_AK = prefix_mask(self.case) * decay_weights(self.case.shapes.block_size)
        return (weights_AK * ce_AK).sum() / weights_AK.sum()

    @torch.no_grad()
    def slot_losses(self) -> Tensor:
        """Give `[A, K]`, the cross entropy of the token at every slot's place in the row."""
        labels_AK = packed_labels(self.case)
        ce_Q = F.cross_entropy(self.logits(), labels_AK.flatten(), reduction="none")
        return ce_Q.view_as(labels_AK)

    def logits(self) -> Tensor:
        """Run the drafter: `[Q, V]`."""
        case, weights = self.case, self.weights
        shapes = case.shapes
        context_TE = self._norm(case.features @ weights["fc.weight"].T, "hidden_norm")
        ids_AK = torch.full((shapes.num_blocks, shapes.block_size), shapes.mask_token_id)
        ids_AK[:, 0] = case.input_ids[case.packed_anchors]
        x_QE = case.embedding[ids_AK.flatten()]
        mask_QS = dense_mask(case)
        angles_SD = _angles(case)
        for index in range(shapes.num_hidden_layers):
            name = f"layers.{index}."
            normed_QE = self._norm(x_QE, name + "input_layernorm")
            x_QE = x_QE + self._attend(
                normed_QE, context_TE, mask_QS, angles_SD, layer=name + "self_attn."
            )
            x_QE = x_QE + self._mlp(self._norm(x_QE, name + "post_attention_layernorm"), name)
        return self._norm(x_QE, "norm") @ case.embedding.T

    def _attend(
        self, x_QE: Tensor, context_TE: Tensor, mask_QS: Tensor, angles_SD: Tensor, *, layer: str
    ) -> Tensor:
        weights, head_dim = self.weights, self.case.shapes.head_dim
        keys_SE = torch.cat([context_TE, x_QE])
        q, k, v = (
            (rows @ weights[f"{layer}{name}_proj.weight"].T).unflatten(-1, (-1, head_dim))
            for name, rows in (("q", x_QE), ("k", keys_SE), ("v", keys_SE))
        )
        q = _rotate(self._norm(q, layer + "q_norm"), angles_SD[-len(x_QE) :])
        k = _rotate(self._norm(k, layer + "k_norm"), angles_SD)
        repeats = q.shape[1] // k.shape[1]
        out_HQD = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1).repeat_interleave(repeats, dim=0)[None],
            v.transpose(0, 1).repeat_interleave(repeats, dim=0)[None],
            attn_mask=mask_QS,
        )[0]
        return out_HQD.transpose(0, 1).flatten(1) @ weights[layer + "o_proj.weight"].T

    def _mlp(self, x: Tensor, layer: str) -> Tensor:
        gate, up, down = (
            self.weights[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.case.shapes.rms_norm_eps
        return F.rms_norm(x, x.shape[-1:], self.weights[name + ".weight"], eps)


def packed_labels(case: Case) -> Tensor:
    """Give `[A, K]` int64, the token at each slot's place in the row of all documents.

    It means nothing past the row's end, where the first token stands in, and behind the end of the
    slot's own document.
    """
    positions_AK = _packed_positions(case)
    return case.input_ids[positions_AK % case.shapes.num_tokens]


def prefix_mask(case: Case) -> Tensor:
    """Mark `[A, K]` the slots before the first unsupervised token or document end, not slot 0."""
    size = case.shapes.document_tokens
    positions_AK = _packed_positions(case)
    is_inside = positions_AK // size == positions_AK[:, :1] // size
    is_supervised = case.loss_mask[positions_AK % case.shapes.num_tokens] & is_inside
    mask_AK = is_supervised.cumprod(dim=1).bool()
    mask_AK[:, 0] = False
    return mask_AK


def dense_mask(case: Case) -> Tensor:
    """Give `[Q, T + Q]` bool: own document before the anchor, and the own block."""
    shapes = case.shapes
    positions_T = torch.arange(shapes.num_tokens)
    anchors_A = case.packed_anchors
    starts_A = anchors_A // shapes.document_tokens * shapes.document_tokens
    sees_AT = (starts_A[:, None] <= positions_T) & (positions_T < anchors_A[:, None])
    own_QQ = torch.block_diag(*[torch.ones(shapes.block_size, shapes.block_size)] * len(anchors_A))
    return torch.cat([sees_AT.repeat_interleave(shapes.block_size, dim=0), own_QQ.bool()], dim=1)


def _packed_positions(case: Case) -> Tensor:
    return case.packed_anchors[:, None] + torch.arange(case.shapes.block_size)


def _angles(case: Case) -> Tensor:
    """Give `[T + Q, D]` RoPE angles of context rows, then of slots, in their documents."""
    shapes: Shapes = case.shapes
    context = torch.arange(shapes.document_tokens).repeat(shapes.num_documents)
    slots = case.anchors.flatten()[:, None] + torch.arange(shapes.block_size)
    positions = torch.cat([context, slots.flatten()]).float()
    powers = torch.arange(0, shapes.head_dim, 2) / shapes.head_dim
    half = positions[:, None] * shapes.rope_theta**-powers
    return torch.cat([half, half], dim=-1)


def _rotate(x: Tensor, angles_SD: Tensor) -> Tensor:
    """Turn `[S, heads, D]` in the neox layout."""
    low, high = x.chunk(2, dim=-1)
    cos, sin = angles_SD.cos()[:, None], angles_SD.sin()[:, None]
    return x * cos + torch.cat([-high, low], dim=-1) * sin
