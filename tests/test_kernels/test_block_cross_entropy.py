from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dflash_kernels._launch import Config
from dflash_kernels.block_cross_entropy import (
    CrossEntropySettings,
    CrossEntropyTerms,
    RowConfigs,
    block_cross_entropy,
)
from dflash_train.config import LossConfig
from dflash_train.testing import LIMITS, assert_close
from dflash_train.training.head_sweep import SlotTerms, sweep_head
from dflash_train.training.head_tiles import HeadSettings, SlotTargets

pytestmark = pytest.mark.usefixtures("_poisoned_memory")

MIXES = {
    "ce": LossConfig(),
    "kl": LossConfig(ce=0.0, kl=1.0),
    "tv": LossConfig(ce=0.0, tv=1.0),
    "lk_alpha": LossConfig(ce=0.0, lk_alpha=1.0),
    "lk_lambda": LossConfig(ce=0.0, lk_lambda=1.0, lk_eta=2.0),
    "all": LossConfig(ce=0.3, kl=0.5, tv=1.8, lk_alpha=0.2, lk_lambda=0.7),
}
COEFFICIENTS = ("ce", "kl", "tv", "lk_alpha", "lk_lambda", "lk_eta")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and settings of one comparison."""

    num_slots: int = 7
    vocabulary: int = 63
    width: int = 15
    top_k: int = 5
    mix: str = "all"
    multiplier: float = 1.0
    cap: float | None = None
    has_log_weights: bool = False
    num_candidates: int = 0
    chunk: int = 4
    tile: int = 16
    slots: int = 4
    dtype: torch.dtype = torch.float32
    hidden_dtype: torch.dtype | None = None

    def configs(self) -> RowConfigs:
        tiles = {"SLOTS": self.slots, "BLOCK_V": self.tile}
        kept = 1 << max(self.top_k - 1, 0).bit_length()
        return RowConfigs(
            sum_rows=Config(num_warps=1, num_stages=1, tiles={**tiles, "GROUP": 8}),
            finish_slots=Config(
                num_warps=1, num_stages=1, tiles={"SLOTS": self.slots, "BLOCK_k": kept}
            ),
            write_gradients=Config(num_warps=1, num_stages=1, tiles=tiles),
        )


@dataclass(kw_only=True)
class Problem:
    """Numbers to compare on; half of the labels are what the drafter thinks best."""

    case: Case
    hidden: Tensor
    weight: Tensor
    targets: SlotTargets
    log_weights: Tensor | None
    upstream: Tensor

    def head(self) -> HeadSettings:
        """Give what the torch definition is asked in float64."""
        case = self.case
        return HeadSettings(
            weight=self.weight.double(),
            loss=MIXES[case.mix],
            multiplier=case.multiplier,
            cap=case.cap,
            log_weights=None if self.log_weights is None else self.log_weights.double(),
            num_candidates=case.num_candidates,
        )


def draw(case: Case) -> Problem:
    """Draw logits of spread 2 and a teacher that lacks some ids."""
    shape = (case.num_slots, case.vocabulary)
    hidden = torch.randn(case.num_slots, case.width) * 2 / case.width**0.5
    hidden = hidden.to(case.dtype).to(case.hidden_dtype or case.dtype)
    weight = torch.randn(case.vocabulary, case.width).to(case.dtype)
    p, ids = (2 * torch.randn(shape, dtype=torch.float64)).softmax(-1).topk(case.top_k)
    labels = torch.randint(0, case.vocabulary, (case.num_slots,))
    labels[::2] = (hidden.double() @ weight.double().T).argmax(1)[::2]
    if case.top_k < case.vocabulary:
        ids = torch.where(torch.rand(ids.shape) < 0.2, -1, ids)
        ids[1:2] = -1  # a slot whose teacher has no id of the head
    log_weights = (3 * torch.rand(case.vocabulary, 2, dtype=case.dtype))[:, 0]
    sums = torch.promote_types(case.dtype, torch.float32)
    return Problem(
        case=case,
        hidden=hidden,
        weight=weight,
        targets=SlotTargets(labels=labels, teacher_ids=ids, teacher_p=(p * (ids >= 0)).to(sums)),
        log_weights=log_weights if case.has_log_weights else None,
        upstream=torch.rand(case.num_slots, dtype=torch.float64),
    )


def mix_of(case: Case) -> CrossEntropySettings:
    return CrossEntropySettings(**{name: getattr(MIXES[case.mix], name) for name in COEFFICIENTS})


def terms_of(problem: Problem, hidden: Tensor, **changes: Any) -> CrossEntropyTerms:
    case = problem.case
    id_bytes = 4 + 2 if case.dtype == torch.bfloat16 else problem.weight.itemsize
    asked = replace(
        mix_of(case),
        multiplier=case.multiplier,
        cap=case.cap,
        log_weights=problem.log_weights,
        num_candidates=case.num_candidates,
        max_logit_bytes=case.chunk * case.vocabulary * id_bytes,
    )
    return block_cross_entropy(
        hidden,
        weight_VE=problem.weight,
        labels_S=problem.targets.labels,
        teacher_ids_Sk=problem.targets.teacher_ids,
        teacher_p_Sk=problem.targets.teacher_p,
        settings=replace(asked, **changes),
        configs=case.configs(),
    )


def logits_of(problem: Problem) -> Tensor:
    """Give all logits in float64, log weights not added."""
    case = problem.case
    logits = problem.hidden.double() @ problem.weight.double().T * case.multiplier
    return case.cap * torch.tanh(logits / case.cap) if case.cap else logits


def assert_same(case: Case) -> None:
    """Compare terms and the gradient with the definition's in float64."""
    problem = draw(case)
    hidden = problem.hidden.clone().requires_grad_()
    wide = problem.hidden.double().requires_grad_()
    got = terms_of(problem, hidden)
    exact = replace(problem.targets, teacher_p=problem.targets.teacher_p.double())
    want = sweep_head(wide, exact, problem.head())
    limit, grad_limit = LIMITS[case.dtype]
    assert got.loss.dtype == torch.promote_types(case.dtype, torch.float32)
    for name in ("loss", "ce", "overlap"):
        assert_close(f"{case}: {name}", getattr(got, name).detach(), getattr(want, name), limit)
    assert_same_ranks(problem, got, want)
    (grad,) = torch.autograd.grad((got.loss * problem.upstream.to(got.loss)).sum(), hidden)
    (want_grad,) = torch.autograd.grad((want.loss * problem.upstream).sum(), wide)
    assert grad.dtype == hidden.dtype
    assert_close(f"{case}: d hidden", grad, want_grad, grad_limit)


def assert_same_ranks(problem: Problem, got: CrossEntropyTerms, want: SlotTerms) -> None:
    """Compare correctness and candidates; which of two logits within rounding wins is open."""
    logits = logits_of(problem)
    labels = problem.targets.labels[:, None]
    others = logits.scatter(1, labels, -torch.inf).amax(1)
    is_clear = (logits.gather(1, labels)[:, 0] - others).abs() > 1e-4
    assert torch.equal(got.is_correct[is_clear], want.is_correct[is_clear])
    assert got.candidates.shape == want.candidates.shape
    chosen, wanted = logits.gather(1, got.candidates), logits.gather(1, want.candidates)
    assert (chosen - wanted).abs().le(1e-4).all()
    ids = got.candidates.sort(1).values
    assert (ids[:, 1:] != ids[:, :-1]).all()


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("multiplier", "cap", "has_log_weights"), [(1.0, None, False), (0.7, 3.0, True)]
)
def test_the_kernels_are_the_definition_to_the_last_digits(
    mix: str, multiplier: float, cap: float | None, has_log_weights: bool
):
    sizes = {"num_slots": 9, "width": 60, "num_candidates": 5, "chunk": 8, "dtype": torch.float64}
    case = Case(
        mix=mix, multiplier=multiplier, cap=cap, has_log_weights=has_log_weights,
        top_k=0 if mix == "ce" else 6, **sizes,
    )  # fmt: skip
    assert_same(case)
    assert_same(replace(case, num_slots=1, slots=1))


def test_a_teacher_of_all_ids_gives_the_whole_divergence():
    problem = draw(Case(mix="kl", top_k=63, dtype=torch.float64))
    hidden = problem.hidden.clone().requires_grad_()
    got = terms_of(problem, hidden)
    p = torch.zeros(7, 63).double()
    p.scatter_(1, problem.targets.teacher_ids, problem.targets.teacher_p)
    log_q = (hidden @ problem.weight.T).log_softmax(1)
    want = functional.kl_div(log_q, p, reduction="none").sum(1)
    assert_close("kl", got.loss.detach(), want.detach(), 1e-10)
    (grad,) = torch.autograd.grad(got.loss.sum(), hidden)
    assert_close("d kl", grad, torch.autograd.grad(want.sum(), hidden)[0], 1e-10)


@pytest.mark.parametrize("top_k", [0, 2, 9])
@pytest.mark.parametrize("cap", [None, 0.01])
def test_among_equal_logits_the_lowest_id_is_the_drafters(top_k: int, cap: float | None):
    problem = draw(Case(num_slots=40, top_k=top_k, cap=cap, mix="ce", slots=16, chunk=64))
    problem.hidden = torch.full_like(problem.hidden, 2.0)
    problem.weight = torch.randint(0, 2, problem.weight.shape).float()
    problem.weight[:, 1:] = 0  # all logits are 0 or 2, or what a cap makes of them
    best = problem.weight[:, 0].nonzero()[:, 0]
    problem.targets.labels = best[torch.arange(40) % 7]
    problem.targets.teacher_ids[:5] = best[:top_k]
    got = terms_of(problem, problem.hidden)
    assert torch.equal(got.is_correct, problem.targets.labels == best[0])


def test_ids_with_equal_probabilities_share_the_slope_of_the_overlap_as_in_torch():
    problem = draw(Case(mix="tv", top_k=3, dtype=torch.float64, vocabulary=16))
    problem.hidden = torch.zeros_like(problem.hidden)
    ids = torch.arange(3).expand(7, 3).contiguous()
    p = torch.tensor([1 / 16, 1 / 8, 1 / 64], dtype=torch.float64).expand(7, 3).contiguous()
    problem.targets = replace(problem.targets, teacher_ids=ids, teacher_p=p)
    got, want = problem.hidden.clone().requires_grad_(), problem.hidden.clone().requires_grad_()
    terms_of(problem, got).loss.sum().backward()
    sweep_head(want, problem.targets, problem.head()).loss.sum().backward()
    assert got.grad is not None
    assert want.grad is not None
    assert_close("d tv", got.grad, want.grad, 1e-10)


def test_candidates_are_the_best_logits_in_order_with_those_taken_out():
    case = Case(num_slots=12, vocabulary=130, top_k=6, num_candidates=16, has_log_weights=True)
    problem = draw(case)
    logits = problem.hidden @ problem.weight.T
    best = logits.topk(16).indices
    problem.targets.teacher_ids[:6] = best[:6, 1:13:2]
    problem.targets.labels[:3] = best[:3, 1]
    problem.targets.labels[3:6] = best[3:6, 0]
    assert torch.equal(terms_of(problem, problem.hidden).candidates, best)


def test_a_head_of_fewer_rows_than_candidates_gives_them_all():
    problem = draw(Case(vocabulary=5, top_k=5, num_candidates=16))
    want = (problem.hidden @ problem.weight.T).topk(5).indices
    assert torch.equal(terms_of(problem, problem.hidden).candidates, want)


def test_a_sure_slot_keeps_the_digits_of_its_rest():
    problem = draw(Case(mix="kl", top_k=4))
    problem.weight = torch.cat([torch.eye(15), problem.weight[15:] * 0.01])
    problem.hidden = 25 * torch.eye(15)[:7]
    problem.targets.teacher_ids[:, 0] = torch.arange(7)
    problem.targets.teacher_ids[:, 1:] = 15 + torch.arange(3)
    p = torch.tensor([0.7, 0.1, 0.05, 0.02]).expand(7, 4)
    problem.targets.teacher_p = p.contiguous()
    got, wide = problem.hidden.clone().requires_grad_(), problem.hidden.double().requires_grad_()
    rough = terms_of(problem, got)
    exact_targets = replace(problem.targets, teacher_p=problem.targets.teacher_p.double())
    exact = sweep_head(wide, exact_targets, problem.head())
    assert_close("kl", rough.loss.detach(), exact.loss.detach(), 1e-5)
    (grad,) = torch.autograd.grad(rough.loss.sum(), got)
    assert_close("d kl", grad, torch.autograd.grad(exact.loss.sum(), wide)[0], 1e-4)


def test_no_overlap_at_all_gives_a_finite_loss():
    problem = draw(Case(mix="lk_alpha", top_k=1, dtype=torch.float64))
    problem.weight = torch.cat([torch.eye(15), torch.zeros(48, 15)]).double()
    problem.hidden = 400 * torch.eye(15).double()[:7]
    problem.targets.teacher_ids[:] = 14
    problem.targets.teacher_p[:] = 1.0
    got, want = problem.hidden.clone().requires_grad_(), problem.hidden.clone().requires_grad_()
    terms = terms_of(problem, got)
    twin = sweep_head(want, problem.targets, problem.head())
    assert_close("lk", terms.loss.detach(), twin.loss.detach(), 1e-10)
    (grad,) = torch.autograd.grad(terms.loss.sum(), got)
    assert torch.equal(grad, torch.autograd.grad(twin.loss.sum(), want)[0])


def test_no_slot_gives_an_empty_loss_and_no_gradient():
    problem = draw(Case(num_slots=0, num_candidates=3))
    hidden = problem.hidden.requires_grad_()
    got = terms_of(problem, hidden)
    assert got.loss.shape == (0,)
    assert got.candidates.shape == (0, 3)
    (grad,) = torch.autograd.grad(got.loss.sum(), hidden)
    assert grad.shape == (0, 15)


def test_terms_are_the_same_bits_where_no_gradient_is_wanted_and_in_a_second_run():
    problem = draw(Case(num_candidates=4, dtype=torch.bfloat16, has_log_weights=True))
    hidden = problem.hidden.clone().requires_grad_()
    runs = [terms_of(problem, hidden), terms_of(problem, hidden)]
    grads = [torch.autograd.grad(run.loss.sum(), hidden)[0] for run in runs]
    assert torch.equal(*grads)
    with torch.no_grad():
        runs.append(terms_of(problem, problem.hidden))
    assert not runs[2].loss.requires_grad
    for name in ("loss", "ce", "is_correct", "overlap", "candidates"):
        first, second, third = (getattr(run, name) for run in runs)
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def test_bfloat16_logits_do_not_tie_or_lose_probability():
    problem = draw(Case(num_slots=8, dtype=torch.bfloat16, width=60, mix="ce", top_k=0))
    problem.hidden *= 8  # logits near 20, of which bfloat16 has every eighth of one only
    got = terms_of(problem, problem.hidden)
    want = functional.cross_entropy(logits_of(problem), problem.targets.labels, reduction="none")
    assert_close("ce", got.ce, want, LIMITS[torch.float32][0])


def test_the_tiles_of_the_device_give_the_same_as_those_of_the_tests():
    problem = draw(Case(vocabulary=130, num_candidates=4))
    want = terms_of(problem, problem.hidden)
    got = block_cross_entropy(
        problem.hidden,
        weight_VE=problem.weight,
        labels_S=problem.targets.labels,
        teacher_ids_Sk=problem.targets.teacher_ids,
        teacher_p_Sk=problem.targets.teacher_p,
        settings=replace(mix_of(problem.case), num_candidates=4),
    )
    for name in ("loss", "ce", "overlap"):
        assert_close(name, getattr(got, name), getattr(want, name), LIMITS[torch.float32][0])
    assert torch.equal(got.candidates, want.candidates)


def test_a_factor_that_turns_the_ranks_around_is_refused():
    problem = draw(Case())
    with pytest.raises(ValueError, match=r"settings.multiplier \(=-1.0\) must be above 0"):
        terms_of(problem, problem.hidden, multiplier=-1.0)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    vocabulary = draw(st.sampled_from([5, 16, 37, 61, 130]))
    low = draw(st.booleans())
    chunk, slots = draw(st.sampled_from([(4, 4), (64, 8), (64, 8), (64, 4)]))
    return Case(
        num_slots=draw(st.integers(3, 8)),
        vocabulary=vocabulary,
        width=draw(st.sampled_from([1, 15, 60])),
        top_k=draw(
            st.sampled_from([k for k in (0, 1, 3, 16, 21) if k < vocabulary] + [vocabulary])
        ),
        mix=draw(st.sampled_from(sorted(MIXES))),
        multiplier=draw(st.sampled_from([1.0, 0.7, 1.5])),
        cap=draw(st.sampled_from([None, 3.0, 30.0])),
        has_log_weights=draw(st.booleans()),
        num_candidates=draw(st.sampled_from([0, 1, 7, 16])),
        chunk=chunk,
        tile=draw(st.sampled_from([32, 64])),
        slots=slots,
        dtype=torch.bfloat16 if low else torch.float32,
        hidden_dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])) if low else None,
    )


@settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # to shrink a failure takes minutes of interpreting
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(case=cases())
def test_any_configuration_gives_the_definition(case: Case):
    torch.manual_seed(0)
    assert_same(case)
