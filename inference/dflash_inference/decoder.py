"""Speculative decoding: prefill, then (draft, verify, commit)*, for one request or many.

The reference loop of this repository; it reads like the paper (arXiv 2602.06036). What
holds between steps (I1 to I5) is written down, and asserted, in request.py.

Every kind of drafter goes through the same loop: a step drafts
`n = min(num_drafts, max_length - start - 1)` tokens from a block of `first_slot + n` slots and
verifies `n + 1` tokens: the anchor and the drafts. Plain DFlash and DFlash 2 have first_slot 1 and
num_drafts K - 1; DSpark's layout is shifted, first_slot 0 and num_drafts K. A block narrowed by the
end of the budget is a forward pass of its own, not a prefix of the wide one.

Requests of one step share the drafter's and the target's pass and nothing else: caches, sampling,
random stream and lengths are each request's own, so its tokens do not depend on its neighbours
(rounding of shared products apart, which can turn a near-tie).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dflash_inference.block_length import DraftPolicy, FirstDrafts
from dflash_inference.drafting import BlockDrafter, Draft
from dflash_inference.request import RequestState, synchronized_seconds
from dflash_inference.sampling import SamplingParams, draw
from dflash_inference.span_attention import Span
from dflash_inference.stopping import end_of_output
from dflash_inference.target_pass import SpanOutput, TargetPass, fast_drafter
from dflash_inference.trace import DecodeTrace, StepTrace
from dflash_inference.verify import (
    Verdicts,
    accept_argmax_proposal,
    accept_greedy,
    accept_sampled_proposal,
)
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target


class SpeculativeDecoder:
    """Commits the target's own text, several tokens per target pass."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        *,
        fast: bool = False,
        target_pass: TargetPass | None = None,
        samples_drafts: bool | None = None,
        policy: DraftPolicy | None = None,
        observe: Callable[[RequestState], None] = RequestState.check_invariants,
    ) -> None:
        """Join a target and its drafter.

        Args:
            target: Who decides every token.
            drafter: Who proposes them; None leaves it to the policy (prompt lookup).
            fast: Pack weights and compile layers for a few tokens at a time on a CPU; sums round
                differently, so near-ties may turn.
            target_pass: Another decoder's pass over this target, so that weights are packed once;
                it decides about `fast` then.
            samples_drafts: Whether sampled requests draw their drafts from the drafter's
                distribution. None: DFlash 2 and DSpark do, plain DFlash proposes the likeliest.
            policy: Who drafts, and how many drafts are verified; None: the drafter, and all.
            observe: Sees the state after prefill and every step.
        """
        self.target = target
        self.target_pass = target_pass or TargetPass(target, fast=fast)
        self.block_drafter: BlockDrafter | None = None
        self.block_size = 1
        if drafter is not None:
            head = drafter.output_head(target.head)
            if self.target_pass.is_fast:
                drafter, head = fast_drafter(drafter, head)
            self.block_drafter = BlockDrafter(drafter, head, samples=samples_drafts)
            self.block_size = drafter.config.block_size
        self.policy = policy or FirstDrafts()
        self.observe = observe

    def new_request(self, prompt_ids: list[int], params: SamplingParams) -> RequestState:
        """Start a request for `step`; a cancelled one is simply not stepped again."""
        return RequestState.of(prompt_ids, params)

    def generate(
        self,
        prompt_ids: list[int],
        *,
        max_new_tokens: int | None = None,
        params: SamplingParams | None = None,
    ) -> DecodeTrace:
        """Decode one prompt until a stop token or the budget, both counted in the output.

        Args:
            prompt_ids: At least one token.
            max_new_tokens: Budget of a greedy request; or give
            params: what else is wanted.

        Raises:
            ValueError: An empty prompt or a budget below one token.
        """
        params = params or SamplingParams(max_new_tokens=max_new_tokens or 0)
        request = self.new_request(prompt_ids, params)
        while request.finish_reason is None:
            self.step([request])
        return request.trace(block_size=self.block_size)

    def stream(self, prompt_ids: list[int], params: SamplingParams) -> Iterator[list[int]]:
        """Decode one prompt and give the tokens of each step as they are committed."""
        request = self.new_request(prompt_ids, params)
        num_given = request.prompt_length
        while request.finish_reason is None:
            self.step([request])
            yield request.token_ids[num_given:]
            num_given = len(request.token_ids)

    @torch.inference_mode()
    def step(self, requests: list[RequestState]) -> None:
        """Take every unfinished request one step further: prefill, or draft, verify and commit.

        Requests may join and leave between steps. A request that finishes says so in its
        `finish_reason`.
        """
        requests = [each for each in requests if each.finish_reason is None]
        if not requests:
            return
        began = self._now()
        drafts = self._draft([each for each in requests if each.is_prefilled])
        drafted = self._now()
        spans = [self._span(each, drafts.get(id(each))) for each in requests]
        outputs = self.target_pass.run(spans)
        verified = self._now()
        draft_s = (drafted - began) / max(1, len(drafts))
        verify_s = (verified - drafted) / len(requests)
        for request, output in zip(requests, outputs, strict=True):
            began = self._now()
            draft = drafts.get(id(request))
            if draft is None:
                self._begin(request, output)
                request.prefill_s = verify_s + self._now() - began
            else:
                step = self._commit(request, draft, output)
                step.draft_s, step.verify_s = draft_s, verify_s
                step.bookkeeping_s = self._now() - began
            self.observe(request)

    def _draft(self, requests: list[RequestState]) -> dict[int, Draft]:
        """Draft for the requests in flight, by the identity of the request."""
        drafts = dict(zip(map(id, requests), self.policy.plan(requests), strict=True))
        asking = [each for each in requests if drafts[id(each)] is None]
        made = self.block_drafter.draft(asking) if self.block_drafter is not None else []
        for request, draft in zip(asking, made, strict=True):
            drafts[id(request)] = draft.shortened(self.policy.num_verified(request, draft))
        return {place: draft for place, draft in drafts.items() if draft is not None}

    def _span(self, request: RequestState, draft: Draft | None) -> Span:
        """Give the tokens that the target reads: the prompt, or the anchor and its drafts."""
        if draft is None:
            ids = request.token_ids
            return Span(token_ids=ids, cache=request.target_cache, last_logits_only=True)
        ids = [request.token_ids[-1], *draft.ids.tolist()]
        return Span(token_ids=ids, cache=request.target_cache)

    def _begin(self, request: RequestState, prefill: SpanOutput) -> None:
        """Commit the prompt, and the target's first token as the anchor."""
        request.target_cache.commit(request.prompt_length)
        request.add_features(prefill.features)
        if request.sampler is None:
            first = prefill.logits[0].argmax()
        else:
            p = request.sampler.probabilities(prefill.logits)
            first = draw(p, request.sampler.uniforms(1).to(p.device))[0]
        self._extend(request, [int(first)])

    def _verdicts(self, request: RequestState, draft: Draft, logits: Tensor) -> Verdicts:
        """Judge one request's draft by the target's logits `[n + 1, V]`."""
        ids = draft.ids[None].to(logits.device)
        if request.sampler is None:
            return accept_greedy(ids, logits[None])
        p = request.sampler.probabilities(logits)[None]
        uniforms = request.sampler.uniforms(len(logits))[None].to(p.device)
        if draft.proposal is None:
            verdicts = accept_argmax_proposal(ids, p, uniforms)
            # Token t is drawn with the stream's number t, however many drafts came before it.
            request.sampler.put_back(uniforms[0, int(verdicts.num_accepted) + 1 :])
            return verdicts
        proposals = draft.proposal[None]
        return accept_sampled_proposal(ids, p, proposals=proposals, uniforms=uniforms)

    def _commit(self, request: RequestState, draft: Draft, output: SpanOutput) -> StepTrace:
        """Append accepted tokens and the bonus token; drop everything behind them."""
        verdicts = self._verdicts(request, draft, output.logits)
        num_accepted = int(verdicts.num_accepted[0])
        new_ids = [*draft.ids[:num_accepted].tolist(), int(verdicts.bonus_token[0])]
        return self._keep(request, draft, output, new_ids=new_ids, rows=list(range(len(new_ids))))

    def _keep(
        self,
        request: RequestState,
        draft: Draft,
        output: SpanOutput,
        *,
        new_ids: list[int],
        rows: list[int],
    ) -> StepTrace:
        """Append tokens; keep the verified row before each (row 0 the anchor's, then drafts)."""
        start, num_before = request.start, len(request.token_ids)
        self._extend(request, new_ids)
        committed = len(request.token_ids) - num_before
        request.target_cache.commit_path(rows[:committed])
        request.add_features(output.features[rows[:committed]])
        step = StepTrace(
            start=start,
            width=len(draft.ids) + 1,
            num_accepted=len(new_ids) - 1,
            committed=committed,
            source=draft.source,
        )
        request.steps.append(step)
        return step

    def _extend(self, request: RequestState, new_ids: list[int]) -> None:
        """Append committed tokens up to the stop or the budget, and note if either was reached."""
        room = request.max_length - len(request.token_ids)
        end, is_stopped = end_of_output(
            request.output_ids, new_ids[:room], params=request.params, target=self.target
        )
        request.token_ids.extend(new_ids[:end])
        if is_stopped:
            request.finish_reason = "stop"
        elif len(request.token_ids) == request.max_length:
            request.finish_reason = "length"

    def _now(self) -> float:
        return synchronized_seconds(self.target.device)
