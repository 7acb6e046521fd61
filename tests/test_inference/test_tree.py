import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn.functional import one_hot
from transformers.cache_utils import DynamicLayer

from dflash_inference.block_length import FirstDrafts
from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.drafting import Draft
from dflash_inference.request import RequestState
from dflash_inference.sampling import SamplingParams
from dflash_inference.target_pass import SpanOutput
from dflash_inference.trace import StepTrace
from dflash_inference.tree import Candidate, TreeDecoder, TreeDraft, grow_tree, walk_tree
from dflash_train.drafter.attention import Blocks, ContextKV
from dflash_train.drafter.model import Drafter
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.target import Target
from dflash_train.testing import DECODED_VARIANTS, assert_close, tiny_drafter, tiny_target

PROMPT = [1, 40, 41, 42, 90, 91, 40, 41]
BUDGET = 21
KINDS = [
    "plain", "dflash2", "dspark", "dspark, gated, sliding", "reduced vocabulary",
    "dspark, reduced vocabulary",
]  # fmt: skip


class GuessingDrafter(Drafter):
    """Its two best guesses at a position are the text's own token and one beside it.

    `rank(position)` says where the right one stands: 0 first, 1 second, 2 not among them.
    """

    def know(self, text: list[int], rank: Callable[[int], int]) -> "GuessingDrafter":
        self.text, self.rank = text, rank
        return self

    def denoise(
        self, block_embeddings: Tensor, contexts: list[ContextKV], blocks: Blocks
    ) -> Tensor:
        hidden = super().denoise(block_embeddings, contexts, blocks).clone()
        for block, anchor in enumerate(blocks.anchor_positions.tolist()):
            hidden[block, :, 0] = anchor + torch.arange(hidden.shape[1])
        return hidden

    def logits(self, hidden: Tensor, head: FrozenHead) -> Tensor:
        vocabulary = head.lm_head_weight.shape[0]
        rows = []
        for position in hidden[..., 0].round().long().flatten().tolist():
            right = self.text[position] if position < len(self.text) else 0
            wrong, other = (right + 1) % vocabulary, (right + 2) % vocabulary
            best, second = [(right, wrong), (wrong, right), (wrong, other)][self.rank(position)]
            ids = torch.tensor([best, second])
            rows.append((one_hot(ids, vocabulary) * torch.tensor([[9.0], [8.0]])).sum(0))
        return torch.stack(rows).reshape(*hidden.shape[:-1], vocabulary)


@pytest.fixture(scope="module")
def target() -> Target:
    return free_target()


def free_target(family: str = "llama") -> Target:
    target = tiny_target(dtype=torch.float64, family=family)
    target.stop_token_ids = frozenset()
    return target


def tiny(target: Target, kind: str, **settings: Any) -> Drafter:
    return tiny_drafter(target, dtype=torch.float64, **DECODED_VARIANTS[kind], **settings)


def plain_decoder(target: Target) -> SpeculativeDecoder:
    return SpeculativeDecoder(target, None, policy=FirstDrafts(0))


def plain_tokens(target: Target, params: SamplingParams | None = None) -> list[int]:
    params = params or SamplingParams(max_new_tokens=BUDGET)
    return plain_decoder(target).generate(PROMPT, params=params).output_ids


def guessing_drafter(
    target: Target, rank: Callable[[int], int], *, block_size: int = 4
) -> GuessingDrafter:
    config = tiny_drafter(target, block_size=block_size).config
    text = [*PROMPT, *plain_tokens(target)]
    return GuessingDrafter(config).to(torch.float64).eval().know(text, rank)


def slots_of(probabilities: list[list[float]]) -> Callable[[int, int], list[Candidate]]:
    """Give candidates 0, 1, ... of each slot, likeliest first, whatever came before."""

    def candidates(slot: int, previous: int) -> list[Candidate]:
        row = sorted(
            (Candidate(math.log(p), token) for token, p in enumerate(probabilities[slot])),
            reverse=True,
        )
        return row

    return candidates


def paths_of(tree: TreeDraft) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.ids.tolist(), tree.parents, strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


@pytest.mark.parametrize("num_nodes", [1, 2, 5, 9, 17, 200])
def test_a_tree_holds_the_likeliest_paths_of_all(num_nodes: int) -> None:
    rows = torch.tensor([[5.0, 2, 1], [3, 3.5, 1], [1, 6, 2.2]]).softmax(-1).double().tolist()
    tree = grow_tree(slots_of(rows), anchor=9, num_levels=3, num_nodes=num_nodes)
    every = {
        path: math.prod(row[token] for row, token in zip(rows, path, strict=False))
        for length in (1, 2, 3)
        for path in torch.cartesian_prod(*[torch.arange(3)] * length).reshape(-1, length).tolist()
        for path in [tuple(path)]
    }
    best = sorted(every, key=lambda path: -every[path])[:num_nodes]
    assert sorted(paths_of(tree)) == sorted(best)
    assert len(set(paths_of(tree))) == min(num_nodes, 3 + 9 + 27)


def test_nodes_come_best_first_and_after_their_parents() -> None:
    rows = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]
    tree = grow_tree(slots_of(rows), anchor=9, num_levels=2, num_nodes=12)
    scores = [math.prod(r[t] for r, t in zip(rows, path, strict=False)) for path in paths_of(tree)]
    assert all(first >= second - 1e-12 for first, second in pairwise(scores))
    assert all(parent < row for row, parent in enumerate(tree.parents, start=1))


def test_a_node_is_scored_after_the_token_of_its_parent() -> None:
    def candidates(slot: int, previous: int) -> list[Candidate]:
        """After token 7 only 1 is likely, after token 5 only 2."""
        if slot == 0:
            return [Candidate(math.log(0.6), 7), Candidate(math.log(0.4), 5)]
        best = {7: 1, 5: 2}[previous]
        return [Candidate(math.log(0.9), best), Candidate(math.log(0.1), 3 - best)]

    tree = grow_tree(candidates, anchor=0, num_levels=2, num_nodes=4)
    assert paths_of(tree) == [(7,), (7, 1), (5,), (5, 2)]
    assert tree.depths() == [0, 1, 2, 1, 2]
    assert tree.visible().tolist() == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [True, False, False, True, False],
        [True, False, False, True, True],
    ]


def test_a_walk_follows_the_targets_token_and_ends_where_no_child_carries_it() -> None:
    tree = TreeDraft(ids=torch.tensor([4, 6, 4, 8]), parents=[0, 0, 2, 3])
    own = {0: 6, 2: 4, 3: 5}
    path = walk_tree(tree, lambda row, level: own[row])
    assert (path.rows, path.token_ids) == ([0, 2, 3], [6, 4, 5])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_nodes", [1, 6])
def test_greedy_tokens_equal_plain_decoding_at_every_budget(
    target: Target, kind: str, num_nodes: int
) -> None:
    decoder = TreeDecoder(target, tiny(target, kind), num_nodes=num_nodes)
    plain = plain_tokens(target)
    for budget in (1, 2, 3, 5, BUDGET):
        live = decoder.generate(PROMPT, max_new_tokens=budget)
        assert live.output_ids == plain[:budget]
        assert 1 + sum(step.committed for step in live.steps) == budget


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("num_nodes", [3, 7, 14])
def test_greedy_tokens_equal_plain_decoding_where_paths_leave_the_chain(
    family: str, num_nodes: int
) -> None:
    """Windows of eight tokens in gemma3: a sibling's row is no earlier position."""
    target = free_target(family)
    drafter = guessing_drafter(target, lambda position: [1, 0, 2][position % 3])
    live = TreeDecoder(target, drafter, num_nodes=num_nodes).generate(PROMPT, max_new_tokens=BUDGET)
    assert live.output_ids == plain_tokens(target)
    assert sum(step.num_accepted for step in live.steps) > (3 if num_nodes == 3 else 8)


def test_every_stop_token_ends_the_output_where_plain_decoding_ends(target: Target) -> None:
    drafter = guessing_drafter(target, lambda position: position % 2)
    decoder = TreeDecoder(target, drafter, num_nodes=12)
    for stop in dict.fromkeys(plain_tokens(target)):
        params = SamplingParams(max_new_tokens=BUDGET, stop_token_ids=frozenset({stop}))
        live = decoder.generate(PROMPT, params=params)
        assert live.output_ids == plain_tokens(target, params)
        assert (live.output_ids[-1], live.finish_reason) == (stop, "stop")


def test_caches_and_features_hold_the_path_and_nothing_else(target: Target) -> None:
    drafter = guessing_drafter(target, lambda position: [1, 1, 0, 2][position % 4])
    left_the_chain = False

    def compare_with_a_fresh_pass(state: RequestState) -> None:
        nonlocal left_the_chain
        state.check_invariants()
        cache = target.new_cache()
        fresh = target.forward(torch.tensor([state.token_ids[: state.start]]), cache=cache)
        for (keys, values), want in zip(state.target_cache.layers, cache.layers, strict=True):
            assert isinstance(want, DynamicLayer)
            assert want.keys is not None
            assert want.values is not None
            assert_close("keys", keys, want.keys, 1e-10)
            assert_close("values", values, want.values, 1e-10)
        pending = state.pending_features
        assert_close("features", pending, fresh.features[0, -len(pending) :], 1e-10)
        left_the_chain |= bool(state.steps) and state.steps[-1].num_accepted > 1

    decoder = TreeDecoder(target, drafter, num_nodes=9, observe=compare_with_a_fresh_pass)
    decoder.generate(PROMPT, max_new_tokens=BUDGET)
    assert left_the_chain


def test_a_tree_as_large_as_a_chain_is_the_chain_where_the_drafter_is_sure(target: Target) -> None:
    class SureDrafter(GuessingDrafter):
        def logits(self, hidden: Tensor, head: FrozenHead) -> Tensor:
            return 10 * super().logits(hidden, head)

    guessing = guessing_drafter(target, lambda position: [0, 0, 2][position % 3])
    drafter = SureDrafter(guessing.config).to(torch.float64).eval()
    drafter.know(guessing.text, guessing.rank)
    chain = SpeculativeDecoder(target, drafter).generate(PROMPT, max_new_tokens=BUDGET)
    tree = TreeDecoder(target, drafter, num_nodes=3).generate(PROMPT, max_new_tokens=BUDGET)

    def story(steps: list[StepTrace]) -> list[tuple[int, int, int]]:
        return [(step.start, step.num_accepted, step.committed) for step in steps]

    assert story(tree.steps) == story(chain.steps)
    # Where the end of the budget narrows the chain, the tree spends its nodes on siblings.
    assert [step.width for step in tree.steps] == [4] * len(tree.steps)
    assert {step.num_levels for step in tree.steps} <= {1, 2, 3}


@pytest.mark.parametrize("kind", ["knowing", "plain", "dflash2", "dspark"])
def test_a_tree_that_contains_the_chain_accepts_no_less(target: Target, kind: str) -> None:
    if kind == "knowing":
        drafter: Drafter = guessing_drafter(target, lambda position: [0, 0, 1, 0, 2][position % 5])
    else:
        drafter = tiny(target, kind)
    tree_decoder = TreeDecoder(target, drafter, num_nodes=40)
    chain_decoder = SpeculativeDecoder(target, drafter)
    text = [*PROMPT, *plain_tokens(target)]
    kept_by_chain, kept_by_tree = [], []
    for length in range(4, len(text) - 4):
        chain, tree = (
            stepped_once(decoder, text[:length]) for decoder in (chain_decoder, tree_decoder)
        )
        assert isinstance(tree.drafts, TreeDraft)
        if tuple(chain.drafts.ids.tolist()) in paths_of(tree.drafts):
            kept_by_chain.append(chain.step.num_accepted)
            kept_by_tree.append(tree.step.num_accepted)
    assert len(kept_by_chain) >= 5
    assert all(t >= c for t, c in zip(kept_by_tree, kept_by_chain, strict=True))
    if kind == "knowing":
        assert sum(kept_by_tree) > sum(kept_by_chain) > 5


class OneStep:
    def __init__(self, drafts: Draft, step: StepTrace) -> None:
        self.drafts, self.step = drafts, step


def stepped_once(decoder: SpeculativeDecoder, prompt: list[int]) -> OneStep:
    """Prefill, take one step and give what it drafted."""
    drafts: list[Draft] = []
    draft_with = decoder._draft

    def keeping(requests: list[RequestState]) -> dict[int, Draft]:
        made = draft_with(requests)
        drafts.extend(made.values())
        return made

    decoder._draft = keeping
    request = decoder.new_request(prompt, SamplingParams(max_new_tokens=12))
    for _ in range(2):
        decoder.step([request])
    decoder._draft = draft_with
    return OneStep(drafts[-1], request.steps[-1])


def test_a_second_guess_that_is_right_is_kept(target: Target) -> None:
    drafter = guessing_drafter(target, lambda position: 1)  # never right at first
    chain = SpeculativeDecoder(target, drafter).generate(PROMPT, max_new_tokens=BUDGET)
    tree = TreeDecoder(target, drafter, num_nodes=14).generate(PROMPT, max_new_tokens=BUDGET)
    assert {step.num_accepted for step in chain.steps} == {0}
    # 2 + 4 + 8 nodes are all paths of two guesses at three levels.
    assert [step.num_accepted for step in tree.steps] == [3] * 5
    assert [(step.width, step.tree_depth, step.num_levels) for step in tree.steps] == [
        (15, 3, 3)
    ] * 5


@pytest.mark.parametrize("kind", ["plain", "dflash2", "dspark"])
def test_sampled_tokens_are_those_of_plain_decoding_at_the_same_seed(
    target: Target, kind: str
) -> None:
    """The target draws token t with number t of its stream, whatever was drafted."""
    decoder = TreeDecoder(target, tiny(target, kind), num_nodes=20)
    num_accepted = 0
    for seed in range(6):
        params = SamplingParams(max_new_tokens=16, temperature=0.7, top_k=5, seed=seed)
        live = decoder.generate(PROMPT, params=params)
        assert live.output_ids == plain_tokens(target, params)
        num_accepted += sum(step.num_accepted for step in live.steps)
    assert num_accepted > 0


class GreedyWalk(TreeDecoder):
    """A deliberately biased rule: the likeliest child of a node is taken unseen."""

    def _commit(self, request: RequestState, draft: Draft, output: SpanOutput) -> StepTrace:
        sampler, request.sampler = request.sampler, None
        if len(request.output_ids) > 1:
            request.sampler = sampler
        step = super()._commit(request, draft, output)
        request.sampler = sampler
        return step


@pytest.mark.parametrize(("rule", "is_lossless"), [(TreeDecoder, True), (GreedyWalk, False)])
def test_sampled_requests_show_the_targets_law_and_a_biased_walk_is_caught(
    target: Target, rule: type[TreeDecoder], is_lossless: bool
) -> None:
    """First and second token together, against the target's own probabilities of each pair."""
    shape = {"temperature": 1.5, "top_k": 3}
    first, second = law_after(target, PROMPT[:2], shape), {}
    for token in first:
        second[token] = law_after(target, [*PROMPT[:2], token], shape)
    text = [*PROMPT[:2], max(first, key=lambda token: first[token])]
    likely = second[text[-1]]
    drafter = guessing_drafter(target, lambda position: 0)
    drafter.know([*text, max(likely, key=lambda token: likely[token]), 0, 0], lambda position: 0)
    decoder = rule(target, drafter, num_nodes=6)
    number = 800
    requests = [
        decoder.new_request(PROMPT[:2], SamplingParams(max_new_tokens=3, seed=seed, **shape))
        for seed in range(number)
    ]
    for begin in range(0, number, 200):
        for _ in range(2):
            decoder.step(requests[begin : begin + 200])
    law = {(a, b): first[a] * second[a][b] for a in first for b in second[a]}
    pairs = [tuple(request.output_ids[:2]) for request in requests]
    expected = [number * p for p in law.values()]
    assert min(expected) >= 5
    assert sum(request.steps[0].num_accepted > 0 for request in requests) > 50
    p_value = stats.chisquare([pairs.count(pair) for pair in law], expected).pvalue
    assert (p_value > 1e-3) == is_lossless


def law_after(target: Target, ids: list[int], shape: dict[str, Any]) -> dict[int, float]:
    logits = target.forward(torch.tensor([ids])).logits[0, -1:]
    processors = SamplingParams(max_new_tokens=1, **shape).processors()
    p = processors(torch.empty(0, dtype=torch.int64), logits).softmax(-1)[0]  # pyright: ignore[reportArgumentType]
    return {int(token): float(p[token]) for token in p.nonzero()[:, 0]}


def test_trees_of_several_requests_do_not_meet(target: Target) -> None:
    decoder = TreeDecoder(target, tiny(target, "dspark"), num_nodes=7)
    prompts = [PROMPT, [1, 77], [5, 5, 5]]
    params = SamplingParams(max_new_tokens=9)
    alone = [decoder.generate(prompt, params=params).output_ids for prompt in prompts]
    together = [decoder.new_request(prompt, params) for prompt in prompts]
    while any(request.finish_reason is None for request in together):
        decoder.step(together)
    assert [request.output_ids for request in together] == alone


def test_a_tree_without_a_node_is_refused(target: Target) -> None:
    with pytest.raises(ValueError, match="num_nodes"):
        TreeDecoder(target, tiny(target, "plain"), num_nodes=0)
