"""Trees of drafts: several guesses per position, verified in one pass (DDTree, arXiv 2604.12989).

One pass of the drafter scores every slot. The likeliest paths through these scores make a tree:
best first, a node's score is the log-probability of its whole path. Plain DFlash scores a slot
whatever came before it, so the nodes popped are the best prefix-closed tree of that size; DFlash 2
and DSpark score a slot after the token of the parent, and the same search expands with those.

Verify reads all nodes at once, each seeing the context, its ancestors and itself. Then the target's
own token decides at each node: where a child carries it the walk goes on, else it is the bonus
token. Nothing but the target's own draws is ever committed, so the output is plain decoding's.

    TreeDecoder(target, drafter, num_nodes=32).generate(prompt_ids, max_new_tokens=256)

Legend: n drafted slots of a block, R rows of verify (row 0 the anchor, row i node i), C ids that a
slot may draft, V vocabulary, E hidden size.
"""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.drafting import BlockDrafter, Draft
from dflash_inference.request import RequestState
from dflash_inference.sampling import SamplingParams, draw
from dflash_inference.span_attention import Span
from dflash_inference.target_pass import SpanOutput
from dflash_inference.trace import StepTrace
from dflash_train.config import require
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target


class Candidate(NamedTuple):
    """A token that a slot may draft, and the log of its probability after the token before."""

    log_probability: float
    token: int


Candidates = Callable[[int, int], list[Candidate]]
"""Gives the candidates of a slot (from 0) after a token, best first."""


@dataclass(kw_only=True)
class TreeDraft(Draft):
    """Drafts that may share a position: `ids[i - 1]` is the token of row i."""

    parents: list[int]
    """Row that each node hangs on, smaller than its own; 0 is the anchor."""

    def depths(self) -> list[int]:
        """Give the distance of every row from the anchor, `[R]`."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths

    def visible(self) -> Tensor:
        """Say which rows each row sees: its ancestors and itself, `[R, R]` bool."""
        seen = torch.eye(len(self.parents) + 1, dtype=torch.bool)
        for row, parent in enumerate(self.parents, start=1):
            seen[row] |= seen[parent]
        return seen

    def children(self) -> dict[tuple[int, int], int]:
        """Give the row of each child by its parent's row and its own token."""
        nodes = zip(self.parents, self.ids.tolist(), strict=True)
        return {node: row for row, node in enumerate(nodes, start=1)}


def grow_tree(candidates: Candidates, *, anchor: int, num_levels: int, num_nodes: int) -> TreeDraft:
    """Take the likeliest nodes, best first.

    A node enters before its next-best sibling and before its children, so every path is whole.

    Args:
        candidates: What the drafter offers.
        anchor: Token of the root.
        num_levels: Slots drafted, the depth that no path exceeds.
        num_nodes: Size at which growth ends.
    """
    tokens: list[int] = [anchor]
    parents: list[int] = []
    order = itertools.count()  # ties go to the node that was offered first
    heap: list[tuple[float, int, int, int, int, list[Candidate]]] = []

    def offer(before: float, parent: int, slot: int, rank: int, choices: list[Candidate]) -> None:
        if rank < len(choices):
            score = before + choices[rank].log_probability
            heapq.heappush(heap, (-score, next(order), parent, slot, rank, choices))

    offer(0.0, 0, 0, 0, candidates(0, anchor))
    while heap and len(parents) < num_nodes:
        negated, _, parent, slot, rank, choices = heapq.heappop(heap)
        chosen, score = choices[rank], -negated
        tokens.append(chosen.token)
        parents.append(parent)
        offer(score - chosen.log_probability, parent, slot, rank + 1, choices)
        if slot + 1 < num_levels:
            offer(score, len(parents), slot + 1, 0, candidates(slot + 1, chosen.token))
    return TreeDraft(ids=torch.tensor(tokens[1:]), parents=parents)


class BlockCandidates:
    """What one denoised block offers, slot by slot, after any token."""

    def __init__(
        self, block_drafter: BlockDrafter, hidden_nE: Tensor, *, temperature: float, most: int
    ) -> None:
        """Score the slots of a block.

        Args:
            block_drafter: Whose scores count.
            hidden_nE: `[n, E]`, states of the slots that are drafted.
            temperature: Of the probabilities, above 0.
            most: Candidates wanted of one slot.
        """
        self._drafter, self._head = block_drafter.drafter, block_drafter.output_head
        self._hidden_nE = hidden_nE
        self._logits_nV = self._drafter.slot_logits(hidden_nE, self._head)
        self._temperature, self._most = temperature, most
        self._is_walked = block_drafter.is_walked
        self._known: dict[tuple[int, int], list[Candidate]] = {}

    def __call__(self, slot: int, previous: int) -> list[Candidate]:
        """Give the best candidates of a slot after a token; plain DFlash does not look at it."""
        place = (slot, previous if self._is_walked else -1)
        if place not in self._known:
            self._known[place] = self._best(slot, previous)
        return self._known[place]

    def _best(self, slot: int, previous: int) -> list[Candidate]:
        one = slice(slot, slot + 1)
        scores_1C, ids_1C = self._drafter.slot_scores(
            self._hidden_nE[one],
            torch.tensor([previous], device=self._hidden_nE.device),
            self._logits_nV[one],
            self._head,
        )
        log_q = (scores_1C[0].double() / self._temperature).log_softmax(-1)
        values, places = log_q.topk(min(self._most, len(log_q)))
        return list(map(Candidate, values.tolist(), ids_1C[0, places].tolist()))


class TreeDecoder(SpeculativeDecoder):
    """The same loop with a tree of drafts in the place of a chain; meant for one request at a time.

    Requests come from `new_request`, whose caches have room for a tree.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        *,
        num_nodes: int,
        fast: bool = False,
        observe: Callable[[RequestState], None] = RequestState.check_invariants,
    ) -> None:
        """Join a target and its drafter.

        Args:
            target: Who decides every token.
            drafter: Who proposes them, plain DFlash or a variant.
            num_nodes: Drafts in a tree; verify reads one token more.
            fast: As for `SpeculativeDecoder`.
            observe: Sees the state after prefill and every step.

        Raises:
            ValueError: A tree without a node.
        """
        require(num_nodes >= 1, f"num_nodes (={num_nodes}) must be at least 1: a first draft.")
        super().__init__(target, drafter, fast=fast, observe=observe)
        self.num_nodes = num_nodes

    def new_request(self, prompt_ids: list[int], params: SamplingParams) -> RequestState:
        """Start a request whose cache has room for a tree at every step."""
        return RequestState.of(prompt_ids, params, tree_room=self.num_nodes)

    def _draft(self, requests: list[RequestState]) -> dict[int, Draft]:
        """Grow one tree for each request in flight, by the identity of the request."""
        drafter = self.block_drafter
        assert drafter is not None
        if not requests:
            return {}
        hidden = drafter.block_hidden(requests)
        return {
            id(request): self._tree(request, drafter, states[drafter.drafter.config.first_slot :])
            for request, states in zip(requests, hidden, strict=True)
        }

    def _tree(self, request: RequestState, drafter: BlockDrafter, hidden_nE: Tensor) -> TreeDraft:
        """Grow the tree by the drafter's law at the request's temperature, 1 for a greedy one."""
        temperature = request.params.temperature or 1.0
        return grow_tree(
            BlockCandidates(drafter, hidden_nE, temperature=temperature, most=self.num_nodes),
            anchor=request.token_ids[-1],
            num_levels=len(hidden_nE),
            num_nodes=self.num_nodes,
        )

    def _span(self, request: RequestState, draft: Draft | None) -> Span:
        """Give anchor and nodes, each at its depth, seeing its ancestors only."""
        span = super()._span(request, draft)
        if isinstance(draft, TreeDraft):
            span.depths, span.visible = draft.depths(), draft.visible()
        return span

    def _commit(self, request: RequestState, draft: Draft, output: SpanOutput) -> StepTrace:
        """Append the tokens of the path and the bonus token; forget the other branches."""
        assert isinstance(draft, TreeDraft)
        depth = max(draft.depths())
        if request.sampler is None:
            likeliest = output.logits.argmax(-1).tolist()
            path = walk_tree(draft, lambda row, level: likeliest[row])
        else:
            sampler, uniforms = request.sampler, request.sampler.uniforms(depth + 1)

            def own_token(row: int, level: int) -> int:
                p = sampler.probabilities(output.logits[row : row + 1])
                return int(draw(p, uniforms[level : level + 1].to(p.device)))

            path = walk_tree(draft, own_token)
            sampler.put_back(uniforms[len(path.rows) :])
        step = self._keep(request, draft, output, new_ids=path.token_ids, rows=path.rows)
        step.tree_depth = depth
        return step


@dataclass(kw_only=True)
class TreePath:
    """The way through a tree that the target took."""

    rows: list[int]
    """The anchor's, 0, then those of the nodes, ascending."""
    token_ids: list[int]
    """What the target wrote after each of them; the last is the bonus token."""


def walk_tree(draft: TreeDraft, own_token: Callable[[int, int], int]) -> TreePath:
    """Follow the target from the anchor as long as a child carries its token.

    Args:
        draft: The tree.
        own_token: Gives the target's token after a row, at a level; asked once a level.
    """
    children = draft.children()
    row: int | None = 0
    rows: list[int] = []
    token_ids: list[int] = []
    while row is not None:
        rows.append(row)
        token_ids.append(own_token(row, len(token_ids)))
        row = children.get((row, token_ids[-1]))
    return TreePath(rows=rows, token_ids=token_ids)
