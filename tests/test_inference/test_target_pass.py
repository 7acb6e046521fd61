import pytest
import torch

from dflash_inference.cache import KeyValueCache
from dflash_inference.span_attention import Span
from dflash_inference.target_pass import TargetPass
from dflash_train.features.target import Target
from dflash_train.testing import assert_close, tiny_target

CUTS = ([0, 9, 14, 15, 23], [0, 3, 4, 5], [0, 7, 8, 12])
"""Where the passes cut three rows; the first row outgrows the window of 8 of sliding layers."""
FAMILIES = ("llama", "qwen3", "qwen3_moe", "gemma3", "gpt_oss")


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 250, (cuts[-1],), generator=generator).tolist() for cuts in CUTS]


def compare_with_separate_passes(target: Target, target_pass: TargetPass, rel: float) -> None:
    """Feed three rows piece by piece, together and apart; outputs must be the same."""
    caches = [KeyValueCache(capacity=len(row)) for row in rows()]
    own_caches = [target.new_cache() for _ in CUTS]
    for turn in range(4):
        spans, wanted = [], []
        for row, cuts, cache, own_cache in zip(rows(), CUTS, caches, own_caches, strict=True):
            if turn + 1 >= len(cuts):
                continue
            ids = row[cuts[turn] : cuts[turn + 1]]
            spans.append(Span(token_ids=ids, cache=cache))
            wanted.append(target.forward(torch.tensor([ids]), cache=own_cache))
        for span, got, want in zip(spans, target_pass.run(spans), wanted, strict=True):
            assert_close("logits", got.logits, want.logits[0], rel)
            assert_close("features", got.features, want.features[0], rel)
            span.cache.commit(span.width)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_requests_side_by_side_get_what_each_gets_alone(family: str, attention: str) -> None:
    target = tiny_target(family=family, dtype=torch.float32)
    if family == "gpt_oss" and attention == "sdpa":
        pytest.skip("gpt_oss has no sdpa attention")
    target.model.set_attn_implementation(attention)
    compare_with_separate_passes(target, TargetPass(target), 2e-6)
    assert target.model.config._attn_implementation == attention


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_the_fast_pass_computes_the_same_within_rounding(family: str) -> None:
    target = tiny_target(family=family, dtype=torch.float32)
    compare_with_separate_passes(target, TargetPass(target, fast=True), 1e-5)


def test_rejected_rows_leave_no_trace() -> None:
    target = tiny_target(dtype=torch.float64)
    target_pass = TargetPass(target)
    cache, clean = KeyValueCache(capacity=12), KeyValueCache(capacity=12)
    target_pass.run([Span(token_ids=[5, 6, 7, 8, 9], cache=cache)])
    cache.commit(2)
    target_pass.run([Span(token_ids=[5, 6], cache=clean)])
    clean.commit(2)
    got, want = target_pass.run(
        [Span(token_ids=[40, 41], cache=cache), Span(token_ids=[40, 41], cache=clean)]
    )
    assert_close("logits", got.logits, want.logits, 1e-12)


def test_siblings_of_a_tree_do_not_see_each_other() -> None:
    target = tiny_target(dtype=torch.float64)
    target_pass = TargetPass(target)
    prompt, first, second = [5, 6, 7], [40, 41], [40, 42]
    cache = KeyValueCache(capacity=10)
    target_pass.run([Span(token_ids=prompt, cache=cache)])
    cache.commit(3)
    visible = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    tree = Span(token_ids=[40, 41, 42], cache=cache, depths=[0, 1, 1], visible=visible)
    got = target_pass.run([tree])[0]
    for branch, row in ((first, 1), (second, 2)):
        want = target.forward(torch.tensor([[*prompt, *branch]])).logits[0, -1]
        assert_close(f"row {row}", got.logits[row], want, 1e-10)
    cache.commit_path([0, 2])
    after = target_pass.run([Span(token_ids=[43], cache=cache)])[0]
    want = target.forward(torch.tensor([[*prompt, *second, 43]])).logits[0, -1]
    assert_close("after the path", after.logits[0], want, 1e-10)


def test_a_target_with_a_running_state_is_refused_by_name() -> None:
    target = tiny_target()
    target.model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"linear_attention.*replay.*vLLM"):
        TargetPass(target)
