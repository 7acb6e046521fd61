"""serve-check's comparison, verdict and sides: real decoders, planted differences, no vLLM."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.serve_check.check import OwnAnswers, needs_second_runner
from dflash_inference.serve_check.comparison import (
    Aspect,
    Difference,
    DraftCounts,
    ServedAnswer,
    compare_request,
)
from dflash_inference.serve_check.near_tie import NearTieJudge
from dflash_inference.serve_check.own_steps import decode_as_served
from dflash_inference.serve_check.prompts import Prompt, read_prompts
from dflash_inference.serve_check.running_server import Api, RunningServer
from dflash_inference.serve_check.verdict import SideVerdict, likely_cause
from dflash_inference.trace import DecodeTrace
from dflash_train.config import DrafterSettings, EvaluateConfig, UnavailableError
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target
from dflash_train.testing import DECODED_VARIANTS, MASK_TOKEN_ID, tiny_target

BUDGET, K, NUM_PROMPTS = 22, 4, 5


def invent_prompt(number: int) -> list[int]:
    generator = torch.Generator().manual_seed(number)
    return [1, *torch.randint(4, 260, (6 + number % 5,), generator=generator).tolist()]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(dtype=torch.float32)


@pytest.fixture(scope="module", params=["plain", "dflash2"])
def own(request: pytest.FixtureRequest, target: Target, answer_prompts, fit_drafter) -> OwnAnswers:
    """A fitted drafter and what it does with some prompts."""
    variants = {name: each for name, each in DECODED_VARIANTS.items() if "markov_rank" not in each}
    wanted = request.param == "dflash2"
    variant = next(each for each in variants.values() if ("selector_rank" in each) is wanted)
    settings = DrafterSettings(
        block_size=K, num_hidden_layers=2, target_layer_ids=target.target_layer_ids,
        mask_token_id=MASK_TOKEN_ID, **variant,
    )  # fmt: skip
    torch.manual_seed(0)
    drafter = Drafter(DrafterConfig.for_target(settings, target.model.config))
    prompts = [invent_prompt(number) for number in range(NUM_PROMPTS)]
    rows = answer_prompts(target, prompts, budget=BUDGET + K + 1)
    fit_drafter(target, drafter, rows, num_steps=60)
    named = [Prompt(id=f"p{i}", token_ids=ids) for i, ids in enumerate(prompts)]
    decoder = SpeculativeDecoder(target, drafter)
    return OwnAnswers.decode(decoder, named, max_new_tokens=BUDGET)


def as_served(prompt: Prompt, trace: DecodeTrace) -> ServedAnswer:
    """Give the answer of a server that does what we do."""
    accepted = [step.num_accepted for step in trace.steps]
    return ServedAnswer(
        id=prompt.id,
        output_ids=list(trace.output_ids),
        finish_reason=trace.finish_reason,
        accepted=accepted,
        counts=DraftCounts.of_steps(accepted, num_positions=K - 1),
    )


def served(own: OwnAnswers) -> list[ServedAnswer]:
    return [as_served(*each) for each in zip(own.prompts, own.traces, strict=True)]


def recounted(answer: ServedAnswer, accepted: list[int]) -> ServedAnswer:
    counts = DraftCounts.of_steps(accepted, num_positions=K - 1)
    return replace(answer, accepted=accepted, counts=counts)


def test_the_fitted_drafters_accept_enough_to_compare(own: OwnAnswers) -> None:
    verdict = own.compare("s", served(own), None)
    assert verdict.acceptance_length > 1.5
    assert verdict.num_accepted > 20


def test_a_server_that_does_what_we_do_agrees(own: OwnAnswers) -> None:
    answers = served(own)
    verdict = own.compare("s", answers, answers)
    assert verdict.agrees
    assert verdict.num_steps == sum(len(trace.steps) - 1 for trace in own.traces)
    assert "agrees" in verdict.sentence()
    assert not verdict.proves_enough


def test_our_steps_are_those_of_blocks_that_no_budget_narrows(own: OwnAnswers) -> None:
    for prompt, trace in zip(own.prompts, own.traces, strict=True):
        assert len(trace.output_ids) == BUDGET
        assert all(step.width == K for step in trace.steps)
        assert sum(step.committed for step in trace.steps) == BUDGET - 1
        longer = decode_as_served(own.decoder, prompt.token_ids, max_new_tokens=2 * BUDGET)
        assert longer.output_ids[:BUDGET] == trace.output_ids
        shared = zip(longer.steps, trace.steps, strict=False)
        assert all(one.num_accepted == other.num_accepted for one, other in shared)


def test_one_draft_less_in_a_step_is_found_there(own: OwnAnswers) -> None:
    answers = served(own)
    place, step = next(
        (place, step)
        for place, answer in enumerate(answers)
        for step, kept in enumerate((answer.accepted or [])[:-2])
        if kept and step
    )
    accepted = list(answers[place].accepted or [])
    accepted[step : step + 1] = [accepted[step] - 1, 0]  # the same tokens in one step more
    answers[place] = recounted(answers[place], accepted)
    verdict = own.compare("s", answers, None)
    assert verdict.differing == [place]
    (found,) = verdict.requests[place].real_differences
    assert (found.aspect, found.step) == (Aspect.steps, step)
    assert found.ours is not None
    assert found.theirs == found.ours - 1
    assert found.undecided is not None  # the drafter was asked, and was sure
    assert f"request {place}, step {step}, " in verdict.sentence()
    assert verdict.requests[place].accepted == accepted[:step]


def test_the_judge_computes_the_draft_that_the_decoder_made(own: OwnAnswers) -> None:
    checked = 0
    for prompt, trace in zip(own.prompts, own.traces, strict=True):
        judge = NearTieJudge(
            decoder=own.decoder, prompt_ids=prompt.token_ids, output_ids=trace.output_ids
        )
        position = 1
        for index, step in enumerate(trace.steps[:-1]):
            if step.num_accepted:
                asked = Difference(
                    aspect=Aspect.steps, position=position, step=index,
                    ours=step.num_accepted, theirs=0,
                )  # fmt: skip
                pair = judge(asked).undecided
                assert pair is not None
                assert pair.ids[0] == trace.output_ids[position]  # the first draft was kept
                checked += 1
            position += step.committed
    assert checked > 10


def test_another_count_in_the_last_step_is_told_and_not_judged(own: OwnAnswers) -> None:
    answers = served(own)
    accepted = list(answers[0].accepted or [])
    accepted[-1] = (accepted[-1] + 1) % K
    answers[0] = recounted(answers[0], accepted)
    verdict = own.compare("s", answers, None)
    assert verdict.agrees
    assert verdict.as_json()["last_steps_counted_otherwise"] == 1


def test_another_token_is_a_difference_unless_the_target_was_undecided(own: OwnAnswers) -> None:
    answers, place = served(own), 5
    output = answers[1].output_ids
    changed = [*output[:place], (output[place] + 1) % 200, *output[place + 1 :]]
    answers[1] = replace(answers[1], output_ids=changed)
    verdict = own.compare("s", answers, None)
    (found,) = verdict.requests[1].real_differences
    assert (found.aspect, found.position) == (Aspect.tokens, place)
    assert "another target" in verdict.sentence()


def test_a_near_tie_of_the_target_is_shown_with_both_logits(
    own: OwnAnswers, target: Target
) -> None:
    prompt, trace, place = own.prompts[2], own.traces[2], 7
    ids = torch.tensor([[*prompt.token_ids, *trace.output_ids[:place]]])
    with torch.inference_mode():
        logits = target.forward(ids, last_logits_only=True).logits[0, -1]
    first, second = logits.topk(2).indices.tolist()
    weight = target.head.lm_head_weight
    kept = weight[second].clone()
    other = replace(as_served(prompt, trace), output_ids=[*trace.output_ids[:place], second])
    judge = NearTieJudge(
        decoder=own.decoder, prompt_ids=prompt.token_ids, output_ids=other.output_ids
    )
    asked = Difference(aspect=Aspect.tokens, position=place, ours=first, theirs=second)
    assert not judge(asked).is_near_tie
    try:
        weight.data[second] = weight.data[first]  # now the two logits are equal
        judged = judge(asked)
    finally:
        weight.data[second] = kept
    assert judged.is_near_tie
    assert judged.undecided is not None
    assert judged.undecided.gap < 1e-4
    finding = compare_request(trace, other, plain=None, judge=lambda each: judged)
    verdict = SideVerdict(side="s", requests=[finding], by_step=True)
    assert verdict.agrees
    (line,) = verdict.near_tie_lines()
    assert f"token {first}" in line
    assert f"token {second}" in line


def test_text_that_differs_from_the_server_without_drafter_blames_the_server(
    own: OwnAnswers,
) -> None:
    answers = served(own)
    plain = [replace(each, accepted=None, counts=None) for each in answers]
    plain[3] = replace(plain[3], output_ids=[*plain[3].output_ids[:-1], 199])
    verdict = own.compare("s", answers, plain)
    assert verdict.differing == [3]
    assert "without" in likely_cause(verdict)


def test_sums_alone_are_compared_with_the_last_step_left_open(own: OwnAnswers) -> None:
    answers = [replace(each, accepted=None) for each in served(own)]
    verdict = own.compare("s", answers, None)
    assert verdict.agrees
    assert not verdict.by_step
    counts = answers[0].counts
    assert counts is not None
    assert counts.accepted_at is not None
    answers[0] = replace(
        answers[0], counts=replace(counts, accepted_at=[counts.accepted_at[0] + 2, 0, 0])
    )
    assert own.compare("s", answers, None).differing == [0]


def test_counters_that_do_not_fit_the_steps_are_a_difference(own: OwnAnswers) -> None:
    answers = served(own)
    counts = answers[4].counts
    assert counts is not None
    answers[4] = replace(answers[4], counts=replace(counts, num_accepted=counts.num_accepted + 1))
    verdict = own.compare("s", answers, None)
    assert [each.aspect for each in verdict.requests[4].real_differences] == [Aspect.counts]


def test_a_drafter_that_is_served_wrongly_is_named_by_its_pattern(own: OwnAnswers) -> None:
    answers = [recounted(each, [0] * (BUDGET - 1)) for each in served(own)]
    assert "Tap ids" in likely_cause(own.compare("s", answers, None))


def shifted_taps(drafter: Drafter) -> None:
    width = drafter.config.hidden_size
    drafter.fc.weight.data = drafter.fc.weight.data.roll(width, dims=1)


def other_key_norm(drafter: Drafter) -> None:
    for name, parameter in drafter.named_parameters():
        if name.endswith("k_norm.weight"):
            parameter.data *= 0.2


@pytest.mark.parametrize("spoil", [shifted_taps, other_key_norm])
def test_a_spoiled_drafter_does_not_agree(own: OwnAnswers, spoil) -> None:
    assert own.decoder.block_drafter is not None
    sound = own.decoder.block_drafter.drafter
    spoiled = Drafter(sound.config)
    spoiled.load_state_dict(sound.state_dict())
    spoil(spoiled.eval())
    other = SpeculativeDecoder(own.decoder.target, spoiled)
    theirs = OwnAnswers.decode(other, own.prompts, max_new_tokens=BUDGET)
    verdict = own.compare("s", served(theirs), None)
    assert not verdict.agrees
    assert all(
        each.aspect is Aspect.steps
        for finding in verdict.requests
        for each in finding.real_differences
    )  # whatever drafts, the text is the target's


def test_prompts_come_from_token_ids_and_from_questions(tmp_path: Path, target: Target) -> None:
    ids, texts = tmp_path / "ids.jsonl", tmp_path / "texts.jsonl"
    ids.write_bytes(b"".join(orjson.dumps({"prompt_token_ids": [1, n]}) + b"\n" for n in (7, 8)))
    texts.write_text('{"prompt": "hello"}\n{"turns": ["one", "two"]}\n')
    found = read_prompts(str(ids), num_prompts=1, target=target, config=EvaluateConfig())
    assert [each.token_ids for each in found] == [[1, 7]]
    found = read_prompts(str(texts), num_prompts=9, target=target, config=EvaluateConfig())
    assert [each.id for each in found] == ["eval:texts/1", "eval:texts/2/0"]
    assert all(len(each.token_ids) > 3 for each in found)
    ids.write_text('{"prompt_token_ids": [1]}\nbroken\n')
    with pytest.raises(ValueError, match="line 2 is no JSON object"):
        read_prompts(str(ids), num_prompts=2, target=target, config=EvaluateConfig())


def test_only_drafters_beyond_the_plain_one_need_the_second_runner(own: OwnAnswers) -> None:
    assert own.decoder.block_drafter is not None
    shape = own.decoder.block_drafter.drafter.config
    assert needs_second_runner(shape) is shape.is_dflash2
    mixed = replace(shape, layer_types=["sliding_attention", "full_attention"], sliding_window=8)
    assert needs_second_runner(mixed)


@contextmanager
def running(app: Starlette) -> Iterator[str]:
    """Serve on a free port of this machine."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def answering(own: OwnAnswers, *, detailed: bool) -> Starlette:
    """Answer as vLLM and SGLang do, with what our decoder does."""
    totals = {"num_drafts": 0, "num_accepted_tokens": 0}
    at = [0] * (K - 1)

    def decode(prompt_ids: list[int], budget: int) -> DecodeTrace:
        trace = decode_as_served(own.decoder, prompt_ids, max_new_tokens=budget)
        for step in trace.steps:
            totals["num_drafts"] += 1
            totals["num_accepted_tokens"] += step.num_accepted
            for place in range(step.num_accepted):
                at[place] += 1
        return trace

    def models(request: Request) -> Response:
        return JSONResponse({"data": [{"id": "tiny"}]})

    async def complete(request: Request) -> Response:
        asked = orjson.loads(await request.body())
        assert asked["model"] == "tiny"
        assert asked["return_token_ids"]
        trace = decode(asked["prompt"], asked["max_tokens"])
        steps = {"per_step_accepted": [step.num_accepted for step in trace.steps]}
        choice = {"token_ids": trace.output_ids, "finish_reason": trace.finish_reason}
        metrics = {"metrics": {"speculative_decoding": steps}} if detailed else {}
        return JSONResponse({"choices": [choice], **metrics})

    async def generate(request: Request) -> Response:
        asked = orjson.loads(await request.body())
        trace = decode(asked["input_ids"], asked["sampling_params"]["max_new_tokens"])
        told = {
            "spec_verify_ct": len(trace.steps), "completion_tokens": len(trace.output_ids),
            "finish_reason": {"type": trace.finish_reason},
        }  # fmt: skip
        return JSONResponse({"output_ids": trace.output_ids, "meta_info": told})

    def metrics(request: Request) -> Response:
        lines = [f'vllm:spec_decode_{n}_total{{engine="0"}} {v}.0' for n, v in totals.items()]
        lines += [f'vllm:spec_decode_{n}_created{{engine="0"}} 1.79e+09' for n in totals]
        name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        lines += [f'{name}{{engine="0",position="{i}"}} {v}.0' for i, v in enumerate(at)]
        return PlainTextResponse("\n".join(lines) + "\n")

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/generate", generate, methods=["POST"]),
            Route("/metrics", metrics),
        ]
    )


@pytest.mark.parametrize(
    ("api", "detailed"), [(Api.vllm, True), (Api.vllm, False), (Api.sglang, False)]
)
def test_a_server_at_an_address_is_compared(own: OwnAnswers, api: Api, detailed: bool) -> None:
    with running(answering(own, detailed=detailed)) as url:
        server = RunningServer(url=url, api=api, max_new_tokens=BUDGET, stop_token_ids=[2])
        answers = server.answer(own.prompts)
    verdict = own.compare("s", answers, None)
    assert verdict.agrees, verdict.difference_lines()
    assert verdict.by_step is detailed
    for answer, trace in zip(answers, own.traces, strict=True):
        assert answer.counts is not None
        assert answer.counts.num_drafts == len(trace.steps)
        if api is Api.vllm:
            accepted = [step.num_accepted for step in trace.steps]
            assert answer.counts == DraftCounts.of_steps(accepted, num_positions=K - 1)


def test_an_address_without_a_server_is_named(own: OwnAnswers) -> None:
    with running(Starlette()) as url:
        server = RunningServer(url=url, max_new_tokens=4, stop_token_ids=[])
        with pytest.raises(UnavailableError, match=r"/v1/models with HTTP status 404"):
            server.answer(own.prompts)
    with pytest.raises(UnavailableError, match="cannot be reached"):
        server.answer(own.prompts)
