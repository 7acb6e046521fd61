"""The drafter's half of a step: blocks of several requests in one pass, then tokens out of them.

Blocks of all requests are denoised together, each against its own context. Tokens are chosen slot
by slot, since those of DFlash 2 and DSpark depend on the token before. A sampled request either
takes the likeliest token of every slot (the default of plain DFlash, whose slots know nothing of
each other) or draws from the drafter's distribution q at the request's temperature (DFlash 2,
DSpark). Legend: A requests, m slots of a block, n drafts, C ids that a slot may draft, V
vocabulary, E hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dflash_inference.request import RequestState
from dflash_inference.sampling import draw
from dflash_train.drafter.attention import Blocks, ContextKV
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.frozen_head import FrozenHead


@dataclass(kw_only=True)
class Draft:
    """What is proposed to the target behind one request's anchor."""

    ids: Tensor
    """`[n]` int64; n may be 0."""
    proposal: Tensor | None = None
    """`[n, V]`, the distribution that each was drawn from; None if each was the likeliest."""
    source: str = "drafter"
    """Who proposes: `drafter`, `lookup` (copied from the text before), or `none`."""
    confidence: Tensor | None = None
    """`[n]`, the drafter's estimate that each draft is kept once those before it are; it knows the
    drafts before and not the draft itself. None without a confidence head."""

    def shortened(self, number: int) -> "Draft":
        """Keep the first drafts only."""
        q, confidence = self.proposal, self.confidence
        return Draft(
            ids=self.ids[:number],
            proposal=None if q is None else q[:number],
            source=self.source if number else "none",
            confidence=None if confidence is None else confidence[:number],
        )


def no_draft() -> Draft:
    """Propose nothing: the target's pass is one of plain decoding."""
    return Draft(ids=torch.empty(0, dtype=torch.int64), source="none")


class BlockDrafter:
    """Drafts the next block of every request that is handed to it."""

    def __init__(
        self, drafter: Drafter, output_head: FrozenHead, *, samples: bool | None = None
    ) -> None:
        """Join a drafter and its head.

        Args:
            drafter: Plain DFlash or a variant.
            output_head: From `drafter.output_head`.
            samples: Whether sampled requests draw their drafts; None: where slots are walked.
        """
        self.drafter = drafter
        self.output_head = output_head
        self.samples = self.is_walked if samples is None else samples

    def draft(self, requests: list[RequestState]) -> list[Draft]:
        """Draft for each request what its budget has room for, which is at least one token."""
        if not requests:
            return []
        first_slot = self.drafter.config.first_slot
        hidden = self.block_hidden(requests)
        return self._choose([states[first_slot:] for states in hidden], requests)

    def block_hidden(self, requests: list[RequestState]) -> list[Tensor]:
        """Denoise each request's block: `[m, E]` each. Eats their pending features."""
        config = self.drafter.config
        widths = [config.first_slot + each.num_drafts(config.num_drafts) for each in requests]
        device = self.output_head.embedding_weight.device
        anchors = torch.tensor([each.token_ids[-1] for each in requests], device=device)
        block = block_embeddings(
            self.output_head, anchors, num_slots=max(widths), config=config
        ).to(self.dtype)
        blocks = Blocks(
            context_offsets=_offsets([each.start for each in requests]),
            block_offsets=list(range(len(requests) + 1)),
            anchor_positions=torch.tensor([each.start for each in requests], device=device),
            widths=torch.tensor(widths, device=device) if len(set(widths)) > 1 else None,
        )
        hidden = self.drafter.denoise(block, self._extend_contexts(requests), blocks)
        return [states[:width] for states, width in zip(hidden, widths, strict=True)]

    @property
    def is_walked(self) -> bool:
        """Whether a slot's tokens are scored after the token before them: DFlash 2 and DSpark."""
        drafter = self.drafter
        return drafter.candidate_selector is not None or drafter.markov_head is not None

    @property
    def dtype(self) -> torch.dtype:
        """What the drafter computes in."""
        return self.drafter.norm.weight.dtype

    def _extend_contexts(self, requests: list[RequestState]) -> list[ContextKV]:
        """Project the pending features into the caches; give all contexts, end to end, by layer."""
        pending = [each.take_features() for each in requests]
        if len(requests) == 1:
            cache = requests[0].drafter_cache
            self.drafter.extend_context(pending[0].to(self.dtype), cache)
            assert cache.length == requests[0].start
            return cache.layers
        lengths = [len(rows) for rows in pending]
        positions = torch.cat(
            [
                torch.arange(each.start - length, each.start, device=rows.device)
                for each, rows, length in zip(requests, pending, lengths, strict=True)
            ]
        )
        new = self.drafter.project_context(torch.cat(pending).to(self.dtype), positions)
        parts = [
            [
                ContextKV(k, v)
                for k, v in zip(rows.k.split(lengths), rows.v.split(lengths), strict=True)
            ]
            for rows in new
        ]  # by layer, then by request
        for index, request in enumerate(requests):
            request.drafter_cache.append([layer[index] for layer in parts])
            assert request.drafter_cache.length == request.start
        caches = [each.drafter_cache.layers for each in requests]
        return [
            ContextKV(torch.cat([kv.k for kv in layer]), torch.cat([kv.v for kv in layer]))
            for layer in zip(*caches, strict=True)
        ]

    def _choose(self, hidden: list[Tensor], requests: list[RequestState]) -> list[Draft]:
        """Choose tokens from left to right, for all requests at once."""
        lengths = [len(states) for states in hidden]
        hidden_AnE = pad_sequence(hidden, batch_first=True)
        logits_AnV = self.drafter.slot_logits(hidden_AnE, self.output_head)
        previous = torch.tensor([each.token_ids[-1] for each in requests], device=hidden_AnE.device)
        draws = [self._draws(each, n) for each, n in zip(requests, lengths, strict=True)]
        chosen: list[Tensor] = []
        confidences: list[Tensor] = []
        proposals: list[list[Tensor]] = [[] for _ in requests]
        for slot in range(max(lengths)):
            scores_AC, ids_AC = self.drafter.slot_scores(
                hidden_AnE[:, slot], previous, logits_AnV[:, slot], self.output_head
            )
            if self.drafter.confidence_head is not None:
                confidences.append(self.drafter.confidence(hidden_AnE[:, slot], previous))
            places = scores_AC.argmax(-1)
            for index, uniforms in enumerate(draws):
                if uniforms is None or slot >= lengths[index]:
                    continue
                temperature = requests[index].params.temperature
                q = (scores_AC[index].double() / temperature).softmax(-1)
                places[index] = draw(q, uniforms[slot].to(q.device))
                proposals[index].append(self._over_vocabulary(q, ids_AC[index]))
            previous = ids_AC.gather(-1, places[:, None]).squeeze(-1)
            chosen.append(previous)
        ids_An = torch.stack(chosen, dim=1)
        confidence_An = torch.stack(confidences, dim=1) if confidences else None
        return [
            Draft(
                ids=ids_An[index, :length],
                proposal=torch.stack(q) if q else None,
                confidence=None if confidence_An is None else confidence_An[index, :length],
            )
            for index, (length, q) in enumerate(zip(lengths, proposals, strict=True))
        ]

    def _draws(self, request: RequestState, number: int) -> Tensor | None:
        """Take the stream's numbers for the drafts of a request that draws them."""
        if request.sampler is None or not self.samples:
            return None
        return request.sampler.uniforms(number)

    def _over_vocabulary(self, q: Tensor, ids: Tensor) -> Tensor:
        """Spread probabilities `[C]` of some ids over the vocabulary, `[V]`."""
        return q.new_zeros(self.drafter.config.vocab_size).scatter(0, ids, q)


def _offsets(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]
