"""Speculative decoding, batch 1, greedy: prefill, then (draft, verify, commit)*.

The reference loop of this repository; it reads like the paper (arXiv 2602.06036). What
holds between steps (I1 to I5) is written down, and asserted, in request.py.

Every kind of drafter goes through the same loop: a step drafts
`n = min(num_drafts, max_length - start - 1)` tokens from a block of `first_slot + n` slots and
verifies `n + 1` tokens: the anchor and the drafts. Plain DFlash and DFlash 2 have first_slot 1 and
num_drafts K - 1; DSpark's layout is shifted, first_slot 0 and num_drafts K. A block narrowed by the
end of the budget is a forward pass of its own, not a prefix of the wide one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dflash_inference.request import RequestState, check_request, synchronized_seconds
from dflash_inference.trace import DecodeTrace, StepTrace
from dflash_inference.verify import Verdict, accept_greedy
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.target import Target


class SpeculativeDecoder:
    """Commits the target's own greedy text, several tokens per target pass."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        *,
        observe: Callable[[RequestState], None] = RequestState.check_invariants,
    ) -> None:
        """Join a target and its drafter; `observe` sees the state after prefill and every step."""
        self.target = target
        self.drafter = drafter
        self.output_head = drafter.output_head(target.head)
        self.observe = observe

    @torch.inference_mode()
    def generate(self, prompt_ids: list[int], *, max_new_tokens: int) -> DecodeTrace:
        """Decode one prompt until a stop token or the budget, both counted in the output.

        Raises:
            ValueError: An empty prompt or a budget below one token.
        """
        check_request(prompt_ids, max_new_tokens)
        request = self._prefill(prompt_ids, max_new_tokens)
        self.observe(request)
        while request.start + 1 < request.max_length and not self._is_stopped(request):
            began = self._now()
            draft_ids = self._draft(request)
            drafted = self._now()
            verdict, features = self._verify(request, draft_ids)
            verified = self._now()
            step = self._commit(request, draft_ids, verdict, features)
            step.draft_s, step.verify_s = drafted - began, verified - drafted
            step.bookkeeping_s = self._now() - verified
            self.observe(request)
        return DecodeTrace(
            prompt_length=request.prompt_length,
            block_size=self.drafter.config.block_size,
            output_ids=request.token_ids[request.prompt_length :],
            steps=request.steps,
            prefill_s=request.prefill_s,
            finish_reason="stop" if self._is_stopped(request) else "length",
        )

    def _prefill(self, prompt_ids: list[int], max_new_tokens: int) -> RequestState:
        began = self._now()
        cache = self.target.new_cache()
        output = self.target.forward(self._as_batch(prompt_ids), cache=cache, last_logits_only=True)
        first_token = int(output.logits[0, -1].argmax())
        return RequestState(
            prompt_length=len(prompt_ids),
            max_length=len(prompt_ids) + max_new_tokens,
            token_ids=[*prompt_ids, first_token],
            target_cache=cache,
            drafter_cache=self.drafter.new_cache(),
            pending_features=output.features[0],
            prefill_s=self._now() - began,
        )

    def _draft(self, request: RequestState) -> Tensor:
        """Propose `[n]` tokens in one drafter pass; eats the pending features."""
        config = self.drafter.config
        num_drafts = min(config.num_drafts, request.max_length - request.start - 1)
        num_slots = config.first_slot + num_drafts
        anchor_ids = self._as_batch(request.token_ids[-1:])[0]
        block = block_embeddings(self.output_head, anchor_ids, num_slots=num_slots, config=config)
        dtype = self.drafter.fc.weight.dtype
        hidden = self.drafter.draft_step(
            block[0].to(dtype), request.pending_features.to(dtype), request.drafter_cache
        )
        assert request.drafter_cache.length == request.start
        return self.drafter.draft(hidden, anchor_ids, self.output_head)

    def _verify(self, request: RequestState, draft_ids: Tensor) -> tuple[Verdict, Tensor]:
        """Run the target over anchor and drafts; features are `[n + 1, L*E]`."""
        block_ids = torch.cat([self._as_batch(request.token_ids[-1:])[0], draft_ids])
        output = self.target.forward(block_ids[None], cache=request.target_cache)
        return accept_greedy(draft_ids, output.logits[0]), output.features[0]

    def _commit(
        self, request: RequestState, draft_ids: Tensor, verdict: Verdict, features: Tensor
    ) -> StepTrace:
        """Append accepted tokens and the bonus token; drop everything behind them."""
        accepted_ids = draft_ids[: verdict.num_accepted].tolist()
        budget = request.max_length - 1 - request.start
        new_ids = self._until_stop([*accepted_ids, verdict.bonus_token][:budget])
        width, committed = features.shape[0], len(new_ids)
        step = StepTrace(
            start=request.start,
            width=width,
            num_accepted=verdict.num_accepted,
            committed=committed,
        )
        request.steps.append(step)
        request.token_ids.extend(new_ids)
        request.target_cache.crop(-(width - committed))  # negative: tokens to remove
        request.pending_features = features[:committed]
        return step

    def _until_stop(self, token_ids: list[int]) -> list[int]:
        stops = self.target.stop_token_ids
        end = next((i for i, token in enumerate(token_ids, start=1) if token in stops), None)
        return token_ids[:end]

    def _is_stopped(self, request: RequestState) -> bool:
        return request.token_ids[-1] in self.target.stop_token_ids

    def _as_batch(self, token_ids: list[int]) -> Tensor:
        return torch.tensor([token_ids], dtype=torch.int64, device=self.target.device)

    def _now(self) -> float:
        return synchronized_seconds(self.target.device)
