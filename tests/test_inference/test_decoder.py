from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from dflash_inference.autoregressive import AutoregressiveDecoder
from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.request import RequestState
from dflash_inference.trace import DecodeTrace
from dflash_train.drafter.attention import Blocks, ContextKV
from dflash_train.drafter.model import Drafter
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.target import Target
from dflash_train.testing import assert_close, tiny_drafter, tiny_target

PROMPT = [1, 40, 41, 42, 90, 91, 40, 41]
BUDGET = 21


class KnowingDrafter(Drafter):
    """A drafter that knows the text: it drafts the right token wherever `is_right(position)`."""

    def know(self, text: list[int], is_right: Callable[[int], bool]) -> "KnowingDrafter":
        self.text, self.is_right = text, is_right
        return self

    def denoise(
        self, block_embeddings: Tensor, contexts: list[ContextKV], blocks: Blocks
    ) -> Tensor:
        hidden = super().denoise(block_embeddings, contexts, blocks).clone()
        for block, anchor in enumerate(blocks.anchor_positions.tolist()):
            for slot in range(hidden.shape[1]):
                position = anchor + slot
                known = self.text[position] if position < len(self.text) else 0
                right = known if self.is_right(position) else (known + 1) % 256
                hidden[block, slot, 0] = right
        return hidden

    def logits(self, hidden: Tensor, head: FrozenHead) -> Tensor:
        vocabulary = head.lm_head_weight.shape[0]
        return torch.nn.functional.one_hot(hidden[..., 0].round().long(), vocabulary).float()


@pytest.fixture(scope="module")
def target() -> Target:
    target = tiny_target(dtype=torch.float64)
    target.stop_token_ids = frozenset()  # only the tests about stopping stop
    return target


@pytest.fixture(scope="module")
def plain(target: Target) -> DecodeTrace:
    return AutoregressiveDecoder(target).generate(PROMPT, max_new_tokens=BUDGET)


def knowing_drafter(
    target: Target, plain: DecodeTrace, is_right: Callable[[int], bool], *, block_size: int = 4
) -> Drafter:
    config = tiny_drafter(target, block_size=block_size).config
    drafter = KnowingDrafter(config).to(torch.float64).eval()
    return drafter.know([*PROMPT, *plain.output_ids], is_right)


def every_kind_of_drafter(target: Target, plain: DecodeTrace) -> list[Drafter]:
    return [
        knowing_drafter(target, plain, lambda position: True),
        knowing_drafter(target, plain, lambda position: False),
        knowing_drafter(target, plain, lambda position: position % 3 != 0),
        knowing_drafter(target, plain, lambda position: position % 7 != 0, block_size=8),
        knowing_drafter(target, plain, lambda position: True, block_size=2),
        tiny_drafter(target, dtype=torch.float64),
    ]


def stopping_at(token_id: int) -> Target:
    """Give the same target with another stop token."""
    target = tiny_target(dtype=torch.float64)
    target.stop_token_ids = frozenset({token_id})
    return target


@pytest.mark.parametrize("kind", range(6))
@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 9, BUDGET])
def test_tokens_equal_plain_decoding_at_every_budget(
    target: Target, plain: DecodeTrace, kind: int, budget: int
) -> None:
    drafter = every_kind_of_drafter(target, plain)[kind]
    live = SpeculativeDecoder(target, drafter).generate(PROMPT, max_new_tokens=budget)
    assert live.output_ids == plain.output_ids[:budget]
    assert live.finish_reason == "length"
    assert 1 + sum(step.committed for step in live.steps) == budget


@pytest.mark.parametrize("kind", range(6))
def test_tokens_equal_plain_decoding_at_every_stop_token(
    target: Target, plain: DecodeTrace, kind: int
) -> None:
    drafter = every_kind_of_drafter(target, plain)[kind]
    for token_id in dict.fromkeys(plain.output_ids):
        stopping = stopping_at(token_id)
        wanted = AutoregressiveDecoder(stopping).generate(PROMPT, max_new_tokens=BUDGET)
        live = SpeculativeDecoder(stopping, drafter).generate(PROMPT, max_new_tokens=BUDGET)
        assert live.output_ids == wanted.output_ids
        assert live.output_ids[-1] == token_id
        assert live.finish_reason == wanted.finish_reason == "stop"
        assert 1 + sum(step.committed for step in live.steps) == len(live.output_ids)


def test_a_drafter_that_knows_the_text_is_accepted_whole(
    target: Target, plain: DecodeTrace
) -> None:
    drafter = knowing_drafter(target, plain, lambda position: True)
    live = SpeculativeDecoder(target, drafter).generate(PROMPT, max_new_tokens=BUDGET)
    # 20 tokens after prefill in blocks of 4.
    assert [(step.num_accepted, step.committed) for step in live.steps] == [(3, 4)] * 5


def test_a_drafter_that_is_always_wrong_commits_one_token_per_step(
    target: Target, plain: DecodeTrace
) -> None:
    drafter = knowing_drafter(target, plain, lambda position: False)
    live = SpeculativeDecoder(target, drafter).generate(PROMPT, max_new_tokens=BUDGET)
    assert [(step.num_accepted, step.committed) for step in live.steps] == [(0, 1)] * 20


def test_blocks_narrow_at_the_end_of_the_budget(target: Target, plain: DecodeTrace) -> None:
    drafter = knowing_drafter(target, plain, lambda position: True)
    live = SpeculativeDecoder(target, drafter).generate(PROMPT, max_new_tokens=7)
    assert [(step.start, step.width, step.committed) for step in live.steps] == [
        (8, 4, 4),
        (12, 3, 2),
    ]


def test_accepted_count_is_kept_as_verified_when_the_stop_token_clips(
    target: Target, plain: DecodeTrace
) -> None:
    # The third output token stops, in the middle of a block that is right in all slots.
    assert plain.output_ids[2] not in plain.output_ids[:2]
    drafter = knowing_drafter(target, plain, lambda position: True)
    stopping = stopping_at(plain.output_ids[2])
    live = SpeculativeDecoder(stopping, drafter).generate(PROMPT, max_new_tokens=BUDGET)
    assert [(step.num_accepted, step.committed) for step in live.steps] == [(3, 2)]


@pytest.mark.parametrize("kind", range(6))
def test_caches_hold_committed_tokens_and_nothing_else(
    target: Target, plain: DecodeTrace, kind: int
) -> None:
    drafter = every_kind_of_drafter(target, plain)[kind]
    num_seen = 0

    def compare_with_a_fresh_pass(state: RequestState) -> None:
        nonlocal num_seen
        state.check_invariants()
        fresh_cache = target.new_cache()
        committed = torch.tensor([state.token_ids[: state.start]])
        fresh = target.forward(committed, cache=fresh_cache)
        for held, wanted in zip(state.target_cache.layers, fresh_cache.layers, strict=True):
            assert isinstance(wanted, DynamicLayer)
            assert wanted.keys is not None
            assert wanted.values is not None
            assert_close("target keys", held[0], wanted.keys, 1e-10)
            assert_close("target values", held[1], wanted.values, 1e-10)
        assert state.pending_features is not None
        num_pending = state.pending_features.shape[0]
        assert_close(
            "pending features", state.pending_features, fresh.features[0, -num_pending:], 1e-10
        )
        if state.steps:
            assert num_pending == state.steps[-1].committed
            refilled = drafter.new_cache()
            one_slot = torch.zeros(1, drafter.config.hidden_size, dtype=torch.float64)
            Drafter.draft_step(drafter, one_slot, fresh.features[0, :-num_pending], refilled)
            for held, wanted in zip(state.drafter_cache.layers, refilled.layers, strict=True):
                assert_close("context keys", held.k, wanted.k, 1e-10)
                assert_close("context values", held.v, wanted.v, 1e-10)
        num_seen += 1

    decoder = SpeculativeDecoder(target, drafter, observe=compare_with_a_fresh_pass)
    live = decoder.generate(PROMPT, max_new_tokens=BUDGET)
    assert num_seen == len(live.steps) + 1


def test_every_step_reports_its_time(target: Target, plain: DecodeTrace) -> None:
    live = SpeculativeDecoder(target, tiny_drafter(target, dtype=torch.float64)).generate(
        PROMPT, max_new_tokens=5
    )
    assert live.prefill_s > 0
    assert all(step.draft_s > 0 and step.verify_s > 0 for step in live.steps)
    assert live.decode_s == pytest.approx(
        sum(s.draft_s + s.verify_s + s.bookkeeping_s for s in live.steps)
    )
    assert all(step.verify_s > 0 and step.draft_s == 0 for step in plain.steps)


def test_plain_decoding_keeps_the_two_best_logits(target: Target, plain: DecodeTrace) -> None:
    output = target.forward(torch.tensor([[*PROMPT, *plain.output_ids[:-1]]]))
    logits = output.logits[0, len(PROMPT) - 1 :]
    values, ids = logits.topk(2)
    assert [pair.ids for pair in plain.top_two] == [tuple(row) for row in ids.tolist()]
    got = torch.tensor([pair.logits for pair in plain.top_two], dtype=torch.float64)
    assert_close("top two", got, values, 1e-10)
    assert all(pair.gap >= 0 for pair in plain.top_two)
    assert [pair.ids[0] for pair in plain.top_two] == plain.output_ids


@pytest.mark.parametrize(("prompt", "budget"), [([], 4), ([1], 0)])
def test_an_empty_request_is_refused(target: Target, prompt: list[int], budget: int) -> None:
    drafter = tiny_drafter(target, dtype=torch.float64)
    for decoder in (SpeculativeDecoder(target, drafter), AutoregressiveDecoder(target)):
        with pytest.raises(ValueError, match="must"):
            decoder.generate(prompt, max_new_tokens=budget)
