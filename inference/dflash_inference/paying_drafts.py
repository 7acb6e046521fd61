"""Speculation where it pays: who drafts, and how many drafts are verified, by expected speed.

Before drafting, each way of taking a step is priced in tokens per second: the target alone, the
drafter's block, a copy of earlier text. Tokens come from running acceptance, seconds from the cost
table of this machine. A request's number of drafts is chosen as if its neighbours did the same; who
asks the drafter is chosen for all requests of the step together, since a draft for one of eight
costs far more than an eighth of a draft for eight.

Once a draft is there, more of it is verified as long as what is gained exceeds what the time would
have earned elsewhere. Where the drafter has a confidence head (DSpark), its estimate stands for the
running one, times how often such estimates came true so far. The walk goes from left to right, and
whether draft i is verified rests on the confidence of drafts up to i, which the head gives without
seeing draft i, and on running rates for what lies ahead. So draft i is still a fair sample of q
when it is verified or left out, and the output keeps the target's law. (Taking the best length over
all the confidences would not: that of draft i + 1 knows draft i.) All else that the policy reads
are committed tokens, earlier outcomes and constants. Outcomes of other requests are among them, so
with drafts drawn from q a seed's tokens, not their law, may depend on the company; with argmax
proposals not even that.

Where drafting does not pay it is tried now and then, else a change of text would go unnoticed. Such
probes are paid from a fund: a small share of the seconds spent without drafting, and what
earlier probes won. The loss by probing is bounded by that share.
"""

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from dflash_inference.drafting import Draft, no_draft
from dflash_inference.lookup_drafts import copy_for, draft_of
from dflash_inference.prompt_lookup import Copy
from dflash_inference.request import RequestState
from dflash_inference.running_acceptance import Rates, RunningAcceptance, expected_kept
from dflash_inference.serving_costs import CostTable
from dflash_inference.step_costs import StepCosts
from dflash_inference.trace import StepTrace

FIRST_GUESS = 0.7
"""Rate at which a first draft is expected to be kept before anything was seen."""
REQUEST_MEMORY, SHARED_MEMORY = 0.93, 0.995
"""What a step leaves of the counts before it: memories of about 14 and 200 steps."""
TRUST = 3.0
"""Steps that the expected rates are worth beside a request's counts."""
FUNDED_PROBES = 3
"""Most probes that the fund holds, so that they do not come in crowds."""


def match_class(match_length: int) -> int:
    """Give the class of a match of 1, 2, 3-4, 5-8 or more tokens: 0 .. 4."""
    return min(4, (match_length - 1).bit_length())


NUM_MATCH_CLASSES = 5


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One way of taking a step."""

    number: int
    """Drafts verified."""
    tokens: float
    """Expected to be committed."""
    tokens_per_s: float
    """Of one request, when all of the step do the same."""


NOTHING = Offer(number=0, tokens=0.0, tokens_per_s=0.0)


@dataclass(kw_only=True)
class _Ways:
    """How one request may take the next step."""

    plain: Offer
    copied: Offer
    drafter: Offer

    @property
    def undrafted(self) -> Offer:
        """The better one of those that need no drafter."""
        return max(self.plain, self.copied, key=lambda offer: offer.tokens_per_s)


@dataclass(kw_only=True)
class _History:
    """What the policy knows of one request."""

    drafter: RunningAcceptance
    copies: list[RunningAcceptance]
    """By class of the match."""
    num_steps: int = 0
    """Steps that were learnt from."""
    num_tokens: int = 0
    """Tokens at the last decision."""
    copy: Copy | None = None
    """What lookup offered there, used or not."""
    best: Offer = NOTHING
    """The best way at the last decision."""
    confidence: list[float] | None = None
    """The drafter's own estimates at the last draft."""
    is_probe: bool = False
    fund_s: float = 0.0
    """Seconds that probes may cost."""


class PayingDrafts:
    """Takes the way with the most expected tokens per second; a policy for the decoder."""

    def __init__(
        self,
        table: CostTable,
        *,
        num_drafts: int,
        num_copied: int = 0,
        probe_share: float = 0.02,
    ) -> None:
        """Start without experience.

        Args:
            table: Costs of this machine.
            num_drafts: Most drafts of the drafter; 0 if there is none.
            num_copied: Most tokens copied by prompt lookup; 0 leaves it out.
            probe_share: Share of the time without drafting that may be lost by probing.
        """
        self._costs = StepCosts(table)
        self._num_drafts, self._num_copied = num_drafts, num_copied
        self._probe_share = probe_share
        self._batch = 1
        self._shared = self._acceptance(num_drafts, SHARED_MEMORY)
        self._shared_copies = [
            self._acceptance(num_copied, SHARED_MEMORY) for _ in range(NUM_MATCH_CLASSES)
        ]
        self._promised = self._came_true = 0.0
        self._histories: WeakKeyDictionary[RequestState, _History] = WeakKeyDictionary()

    def plan(self, requests: list[RequestState]) -> list[Draft | None]:
        """Choose for each request the target alone, a copy, or (None) the drafter."""
        self._batch = max(1, len(requests))
        for request in requests:
            self._learn(request, self._history(request))
        ways = [self._ways(request, self._history(request)) for request in requests]
        asking, tokens_per_s = self._who_drafts(ways)
        return [
            self._take(
                request,
                self._history(request),
                way,
                drafts=index in asking,
                tokens_per_s=tokens_per_s,
            )
            for index, (request, way) in enumerate(zip(requests, ways, strict=True))
        ]

    def num_verified(self, request: RequestState, draft: Draft) -> int:
        """Give how many drafts pay, decided from left to right, and at least one."""
        history, number = self._history(request), min(len(draft.ids), self._num_drafts)
        history.confidence = None if draft.confidence is None else draft.confidence.tolist()
        if history.is_probe:
            return min(number, history.best.number)
        paying = num_that_pay(
            self._drafter_rates(history)[:number],
            None if history.confidence is None else self._calibrated(history.confidence[:number]),
            verify_s=self._verify_s(number),
            tokens_per_s=history.best.tokens_per_s,
        )
        return max(1, paying)  # one draft tells whether drafting is worth it, for hardly a second

    def _calibrated(self, confidence: list[float]) -> list[float]:
        factor = self._came_true / self._promised if self._promised else 1.0
        return [min(1.0, factor * each) for each in confidence]

    def _ways(self, request: RequestState, history: _History) -> _Ways:
        """Price what a request can do, its neighbours taken to do the same."""
        room = request.num_drafts(self._num_drafts)
        history.num_tokens, history.is_probe = len(request.token_ids), False
        plain_s = self._costs.verify_s(1, batch=self._batch)
        return _Ways(
            plain=Offer(number=0, tokens=1.0, tokens_per_s=1 / plain_s),
            copied=self._copy_offer(request, history),
            drafter=self._best_offer(self._drafter_rates(history)[:room], self._draft_s),
        )

    def _who_drafts(self, ways: list[_Ways]) -> tuple[set[int], float]:
        """Choose which requests ask the drafter: those who gain most, as many as pay.

        Returns:
            Their indices, and the expected tokens per second of one request in such a step.
        """
        gains = [way.drafter.tokens - way.undrafted.tokens for way in ways]
        able = [index for index, way in enumerate(ways) if way.drafter.number]
        order = sorted(able, key=lambda index: gains[index], reverse=True)
        rates = []
        for number in range(len(order) + 1):
            asking = set(order[:number])
            taken = [w.drafter if i in asking else w.undrafted for i, w in enumerate(ways)]
            width = 1 + sum(offer.number for offer in taken) / self._batch
            seconds = self._costs.verify_s(width, batch=self._batch)
            if number:
                seconds += self._costs.draft_s(batch=number)
            rates.append(sum(offer.tokens for offer in taken) / (self._batch * seconds))
        best = max(range(len(rates)), key=rates.__getitem__, default=0)
        return set(order[:best]), rates[best]

    def _take(
        self,
        request: RequestState,
        history: _History,
        way: _Ways,
        *,
        drafts: bool,
        tokens_per_s: float,
    ) -> Draft | None:
        """Take the way that was chosen, or ask the drafter for a probe."""
        chosen = way.drafter if drafts else way.undrafted
        history.best = replace(chosen, tokens_per_s=tokens_per_s)
        if drafts or self._is_time_to_probe(history, request.num_drafts(self._num_drafts)):
            return None
        if not chosen.number:
            return no_draft()
        assert history.copy is not None
        return draft_of(history.copy, chosen.number)

    def _copy_offer(self, request: RequestState, history: _History) -> Offer:
        history.copy = copy_for(request, self._num_copied) if self._num_copied else None
        if history.copy is None or not len(history.copy.tokens):
            return NOTHING
        kind = match_class(history.copy.match_length)
        expected = self._shared_copies[kind].rates_from(FIRST_GUESS)
        rates = history.copies[kind].rates(expected)
        return self._best_offer(rates[: len(history.copy.tokens)], 0.0)

    def _best_offer(self, rates: Rates, draft_s: float) -> Offer:
        """Find the number of drafts, at least one, with the most tokens per second."""
        if not len(rates):
            return NOTHING
        tokens = 1 + expected_kept(rates)
        tokens_per_s = tokens / (draft_s + self._verify_s(len(rates)))
        number = 1 + int(tokens_per_s[1:].argmax())
        return Offer(
            number=number, tokens=float(tokens[number]), tokens_per_s=float(tokens_per_s[number])
        )

    def _is_time_to_probe(self, history: _History, room: int) -> bool:
        """Draft although it does not seem to pay, if the fund covers a probe that wins nothing."""
        if not room:
            return False
        probe = self._best_offer(np.full(room, FIRST_GUESS), self._draft_s)
        step_s = self._draft_s + float(self._verify_s(probe.number)[-1])
        price_s = step_s - 1 / history.best.tokens_per_s  # it commits one token at least
        history.fund_s = min(history.fund_s, FUNDED_PROBES * max(price_s, 0.0))
        if price_s > history.fund_s:
            return False
        history.fund_s -= price_s
        history.is_probe = True
        history.best = replace(probe, tokens_per_s=history.best.tokens_per_s)
        return True

    def _learn(self, request: RequestState, history: _History) -> None:
        """Take in the steps since the last decision."""
        for step in request.steps[history.num_steps :]:
            if step.source == "drafter":
                self._learn_from_confidence(step, history)
                for acceptance in (self._shared, history.drafter):
                    acceptance.observe(step.num_accepted, num_verified=step.width - 1)
            history.fund_s += self._earned_s(step, history)
        history.num_steps = len(request.steps)
        if history.copy is not None and len(history.copy.tokens):
            self._learn_from_copy(history, history.copy, request.token_ids[history.num_tokens :])
            history.copy = None

    def _learn_from_confidence(self, step: StepTrace, history: _History) -> None:
        """Compare what the drafter promised at the drafts that were reached with what was kept."""
        if history.confidence is None:
            return
        if not self._promised:  # at first it is believed
            self._promised = self._came_true = TRUST * history.confidence[0]
        num_reached = min(step.num_accepted + 1, step.width - 1)
        promised = sum(history.confidence[:num_reached])
        self._promised = SHARED_MEMORY * self._promised + promised
        self._came_true = SHARED_MEMORY * self._came_true + step.num_accepted

    def _earned_s(self, step: StepTrace, history: _History) -> float:
        """Give what a step adds to the fund: a share of its time, or what a probe won."""
        if history.is_probe:
            return (step.committed - 1) / history.best.tokens_per_s
        if step.source == "drafter":
            return 0.0
        return self._probe_share * self._costs.verify_s(step.width, batch=self._batch)

    def _learn_from_copy(self, history: _History, copy: Copy, committed: list[int]) -> None:
        """Judge a copy by what was committed, whoever drafted that."""
        offered = min(len(copy.tokens), len(committed))
        same = copy.tokens[:offered] == np.array(committed[:offered], dtype=np.int64)
        num_kept = int(same.cumprod().sum())
        kind = match_class(copy.match_length)
        for acceptance in (self._shared_copies[kind], history.copies[kind]):
            acceptance.observe(num_kept, num_verified=offered)

    def _drafter_rates(self, history: _History) -> Rates:
        return history.drafter.rates(self._shared.rates_from(FIRST_GUESS))

    @property
    def _draft_s(self) -> float:
        return self._costs.draft_s(batch=self._batch)

    def _verify_s(self, number: int) -> NDArray[np.float64]:
        """Give seconds of verify with 0, 1, ... `number` drafts, `[number + 1]`."""
        widths = range(1, number + 2)
        return np.array([self._costs.verify_s(width, batch=self._batch) for width in widths])

    def _history(self, request: RequestState) -> _History:
        if request not in self._histories:
            self._histories[request] = _History(
                drafter=self._acceptance(self._num_drafts, REQUEST_MEMORY),
                copies=[
                    self._acceptance(self._num_copied, REQUEST_MEMORY)
                    for _ in range(NUM_MATCH_CLASSES)
                ],
            )
        return self._histories[request]

    @staticmethod
    def _acceptance(num_slots: int, memory: float) -> RunningAcceptance:
        return RunningAcceptance(num_slots, kept_share=memory, trust=TRUST)


def num_that_pay(
    rates: Rates,
    confidence: list[float] | None,
    *,
    verify_s: NDArray[np.float64],
    tokens_per_s: float,
) -> int:
    """Decide from left to right how many drafts are verified.

    Draft i is verified if some length from there on gains more tokens than its seconds are worth.
    What lies ahead is judged by running rates, never by the confidence of later drafts: they know
    draft i.

    Args:
        rates: `[n]`, running conditional acceptance.
        confidence: `[n]`, the drafter's own estimate of the same for these drafts, or None.
        verify_s: `[n + 1]`, seconds of verify with 0, 1, ... n drafts.
        tokens_per_s: What a second is worth.
    """
    reached = 1.0  # probability that all drafts so far are kept
    for slot in range(len(rates)):
        rate = rates[slot] if confidence is None else confidence[slot]
        kept = reached * rate * np.concatenate([[1.0], rates[slot + 1 :].cumprod()])
        price = tokens_per_s * (verify_s[slot + 1 :] - verify_s[slot])
        if (kept.cumsum() - price).max() <= 0:
            return slot
        reached *= rate
    return len(rates)
