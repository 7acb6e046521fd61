from typing import Any

import pytest
import torch
from scipy import stats

from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.request import RequestState
from dflash_inference.sampling import SamplingParams
from dflash_inference.target_pass import TargetPass
from dflash_train.features.target import Target
from dflash_train.testing import DECODED_VARIANTS, tiny_drafter, tiny_target

PROMPTS = [[1, 40, 41, 42, 90, 91], [1, 77], [1, 60, 61, 62, 63, 64, 65, 66, 67], [5, 5, 5]]
KINDS = ["plain", "dflash2", "dspark", "reduced vocabulary"]


@pytest.fixture(scope="module")
def target() -> Target:
    target = tiny_target(dtype=torch.float64)
    target.stop_token_ids = frozenset()
    return target


def decoder_for(target: Target, kind: str, **options: Any) -> SpeculativeDecoder:
    drafter = tiny_drafter(target, dtype=torch.float64, **DECODED_VARIANTS[kind])
    return SpeculativeDecoder(target, drafter, **options)


def all_params() -> list[SamplingParams]:
    return [
        SamplingParams(max_new_tokens=13),
        SamplingParams(max_new_tokens=9, temperature=0.8, seed=1),
        SamplingParams(max_new_tokens=16, temperature=1.3, top_k=20, top_p=0.9, seed=2),
        SamplingParams(max_new_tokens=7, temperature=0.5, min_p=0.05, seed=3),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_join_and_leave_write_what_they_write_alone(
    target: Target, kind: str
) -> None:
    decoder = decoder_for(target, kind)
    alone = [
        decoder.generate(prompt, params=params)
        for prompt, params in zip(PROMPTS, all_params(), strict=True)
    ]
    requests = [
        RequestState.of(prompt, params)
        for prompt, params in zip(PROMPTS, all_params(), strict=True)
    ]
    for turn in range(40):  # one more request joins every other step
        decoder.step(requests[: 1 + turn // 2])
    for request, want in zip(requests, alone, strict=True):
        got = request.trace(block_size=decoder.block_size)
        assert got.output_ids == want.output_ids
        assert [(s.start, s.width, s.num_accepted) for s in got.steps] == [
            (s.start, s.width, s.num_accepted) for s in want.steps
        ]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(target: Target) -> None:
    decoder = decoder_for(target, "dflash2")

    def tokens(seed: int) -> list[int]:
        params = SamplingParams(max_new_tokens=20, temperature=1.0, seed=seed)
        return decoder.generate(PROMPTS[0], params=params).output_ids

    assert tokens(4) == tokens(4)
    assert tokens(4) != tokens(5)


def test_a_stream_gives_the_tokens_of_every_step_once(target: Target) -> None:
    decoder = decoder_for(target, "plain")
    params = SamplingParams(max_new_tokens=12)
    pieces = list(decoder.stream(PROMPTS[0], params))
    trace = decoder.generate(PROMPTS[0], params=params)
    assert [token for piece in pieces for token in piece] == trace.output_ids
    assert [len(piece) for piece in pieces] == [1, *(step.committed for step in trace.steps)]


def test_a_stop_text_ends_the_output_at_the_token_that_completes_it(target: Target) -> None:
    decoder = decoder_for(target, "plain")
    free = decoder.generate(PROMPTS[0], max_new_tokens=20)
    text = str(target.tokenizer.decode(free.output_ids[4:6]))
    params = SamplingParams(max_new_tokens=20, stop=(text,))
    stopped = decoder.generate(PROMPTS[0], params=params)
    assert stopped.finish_reason == "stop"
    assert text in str(target.tokenizer.decode(stopped.output_ids))
    assert text not in str(target.tokenizer.decode(stopped.output_ids[:-1]))
    assert stopped.output_ids == free.output_ids[: len(stopped.output_ids)]


def test_stop_tokens_of_the_request_replace_the_targets_own(target: Target) -> None:
    decoder = decoder_for(target, "plain")
    free = decoder.generate(PROMPTS[0], max_new_tokens=20)
    params = SamplingParams(max_new_tokens=20, stop_token_ids=frozenset({free.output_ids[7]}))
    stopped = decoder.generate(PROMPTS[0], params=params)
    end = free.output_ids.index(free.output_ids[7]) + 1
    assert (stopped.output_ids, stopped.finish_reason) == (free.output_ids[:end], "stop")


@pytest.mark.parametrize(
    "field", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"min_p": 2}, {"max_new_tokens": 0}]
)
def test_sampling_out_of_range_is_refused_by_name(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        SamplingParams(**{"max_new_tokens": 4, **field})


@pytest.mark.parametrize(
    ("kind", "samples_drafts"),
    [("plain", False), ("plain", True), ("dflash2", True), ("dspark", True)],
)
def test_two_thousand_sampled_requests_show_the_targets_law(
    target: Target, kind: str, samples_drafts: bool
) -> None:
    """First and second token together, against the target's own probabilities of each pair."""
    decoder = decoder_for(target, kind, samples_drafts=samples_drafts)
    shape = {"temperature": 1.5, "top_k": 4}
    requests = [
        RequestState.of(PROMPTS[1], SamplingParams(max_new_tokens=4, seed=seed, **shape))
        for seed in range(2000)
    ]
    for first in range(0, 2000, 250):
        for _ in range(2):
            decoder.step(requests[first : first + 250])
    law = pair_law(target, PROMPTS[1], SamplingParams(max_new_tokens=4, **shape))
    pairs = [tuple(request.output_ids[:2]) for request in requests]
    assert set(pairs) <= set(law)
    counts = [pairs.count(pair) for pair in law]
    expected = [2000 * p for p in law.values()]
    assert min(expected) >= 5
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def pair_law(
    target: Target, prompt: list[int], params: SamplingParams
) -> dict[tuple[int, int], float]:
    """Give the probability of every pair of first tokens, by passes of the target alone."""

    def law(ids: list[int]) -> dict[int, float]:
        logits = target.forward(torch.tensor([ids])).logits[0, -1:]
        scores = params.processors()(torch.empty(0, dtype=torch.int64), logits)  # pyright: ignore[reportArgumentType]
        p = scores.softmax(-1)[0]
        return {int(token): float(p[token]) for token in p.nonzero()[:, 0]}

    return {
        (first, second): p * q
        for first, p in law(prompt).items()
        for second, q in law([*prompt, first]).items()
    }


def test_a_finished_request_is_left_alone(target: Target) -> None:
    decoder = decoder_for(target, "plain")
    request = RequestState.of(PROMPTS[0], SamplingParams(max_new_tokens=1))
    decoder.step([request])
    assert request.finish_reason == "length"
    decoder.step([request])
    assert len(request.output_ids) == 1
    assert isinstance(decoder.target_pass, TargetPass)
