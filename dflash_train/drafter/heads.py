"""Small heads that let a draft depend on the token drafted just before it.

The block's hidden states and logits come from one parallel pass; what follows is a walk from slot
to slot with table look-ups. DFlash 2 (z-lab `dflash` 0.1.0) scores the best few tokens of each
slot against their predecessor; DSpark (arXiv 2607.05147) adds a low-rank bias to all logits, and
estimates how likely a draft is kept. Each starts as no change at all: of two tables that are
multiplied, one is zero and the other random, so that gradients flow. Legend: S slots, C
candidates, r rank, E hidden size, V vocabulary, Vd ids with a logit.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dflash_train.drafter.config import DrafterConfig

TABLE_RANGE = 0.02
"""Standard deviation of a table that does not start at zero."""


class CandidateSelector(nn.Module):
    """DFlash 2: `score(v) = logit(v) + <Pred[previous] * (W h), Succ[v]>` over the best C ids."""

    def __init__(self, config: DrafterConfig) -> None:
        """Build two codebooks, the successors' zero, and the projection of hidden states."""
        super().__init__()
        assert config.selector_rank is not None
        assert config.selector_top_k is not None
        self.top_k = config.selector_top_k
        shape = (config.vocab_size, config.selector_rank)
        self.predecessor_codebook = nn.Parameter(torch.randn(shape) * TABLE_RANGE)
        self.successor_codebook = nn.Parameter(torch.zeros(shape))
        self.hidden_projection = nn.Linear(config.hidden_size, config.selector_rank, bias=False)

    def forward(
        self, hidden_SE: Tensor, previous_ids_S: Tensor, *, logits_SC: Tensor, ids_SC: Tensor
    ) -> Tensor:
        """Score candidates after a known previous token, `[S, C]`.

        Both codebooks are this module's own, so a sharded launch gathers them only while it runs.

        Args:
            hidden_SE: `[S, E]` after the drafter's final norm.
            previous_ids_S: `[S]` int64, the token before each slot's draft.
            logits_SC: `[S, C]`, the candidates' logits.
            ids_SC: `[S, C]` int64, the candidates.
        """
        previous = functional.embedding(previous_ids_S, self.predecessor_codebook)
        wanted = previous * self.hidden_projection(hidden_SE)  # [S, r]
        offered = functional.embedding(ids_SC, self.successor_codebook)  # [S, C, r]
        return logits_SC + (offered @ wanted[..., None]).squeeze(-1).to(logits_SC.dtype)

    def candidates(
        self, hidden_SE: Tensor, previous_ids_S: Tensor, logits_SV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Give scores and ids of each slot's C best logits, `[S, C]` each."""
        logits_SC, ids_SC = logits_SV.topk(self.top_k, dim=-1)
        scores_SC = self(hidden_SE, previous_ids_S, logits_SC=logits_SC, ids_SC=ids_SC)
        return scores_SC, ids_SC


class MarkovHead(nn.Module):
    """DSpark: the bias `W2 W1[previous]` on the logits, or `W2 (gate * W1[previous])`."""

    def __init__(self, config: DrafterConfig) -> None:
        """Build both tables, the second one zero, and the gate if there is one."""
        super().__init__()
        rank = config.markov_rank
        assert rank is not None
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.num_output_ids, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size + rank, rank) if config.markov_gated else None
        nn.init.normal_(self.markov_w1.weight, std=TABLE_RANGE)
        self.start_as_identity()

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Make the bias zero, whatever the first table holds."""
        self.markov_w2.weight.zero_()

    def latents(self, hidden_SE: Tensor, previous_ids_S: Tensor) -> Tensor:
        """Give `[S, r]`, what the second table turns into the bias.

        Args:
            hidden_SE: `[S, E]` after the drafter's final norm.
            previous_ids_S: `[S]` int64, the token before each slot's draft.
        """
        rows = self.markov_w1(previous_ids_S)
        if self.gate_proj is None:
            return rows
        return rows * torch.sigmoid(self.gate_proj(torch.cat([hidden_SE, rows], dim=-1)))

    def forward(self, hidden_SE: Tensor, previous_ids_S: Tensor) -> Tensor:
        """Give the bias of each slot's logits, `[S, Vd]`."""
        return self.markov_w2(self.latents(hidden_SE, previous_ids_S))


class ConfidenceHead(nn.Module):
    """DSpark: the logit of a slot's acceptance probability, from `[h ; W1[previous]]`."""

    def __init__(self, config: DrafterConfig) -> None:
        """Build one row; it reads hidden states first, then the Markov rows if it sees them."""
        super().__init__()
        assert config.markov_rank is not None
        self.sees_markov = config.confidence_sees_markov
        width = config.hidden_size + (config.markov_rank if self.sees_markov else 0)
        self.proj = nn.Linear(width, 1)

    def forward(self, hidden_SE: Tensor, markov_rows_Sr: Tensor) -> Tensor:
        """Give `[S]` logits.

        Args:
            hidden_SE: `[S, E]` after the drafter's final norm.
            markov_rows_Sr: `[S, r]`, first-table rows of the tokens before.
        """
        seen = torch.cat([hidden_SE, markov_rows_Sr], dim=-1) if self.sees_markov else hidden_SE
        return self.proj(seen).squeeze(-1)
