from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dflash_train.config import LossConfig
from dflash_train.testing import assert_close
from dflash_train.training import head_tiles
from dflash_train.training.head_sweep import SlotTerms, sweep_head, sweep_with_bias
from dflash_train.training.head_tiles import HeadSettings, SlotTargets

NUM_SLOTS, VOCABULARY, WIDTH, RANK = 23, 61, 15, 4
SHAPES = [(1.0, None), (0.7, None), (1.0, 3.0), (1.7, 2.0)]
MIXES = {
    "ce": LossConfig(),
    "kl": LossConfig(ce=0.0, kl=1.0),
    "tv": LossConfig(ce=0.0, tv=1.0),
    "lk_alpha": LossConfig(ce=0.0, lk_alpha=1.0),
    "lk_lambda": LossConfig(ce=0.0, lk_lambda=1.0, lk_eta=2.0),
    "all": LossConfig(ce=0.3, kl=0.5, tv=1.8, lk_alpha=0.2, lk_lambda=0.7),
}


@pytest.fixture(params=[16, 2048], ids=["tiles", "one_tile"], autouse=True)
def _tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_tiles, "CPU_TILE", request.param)


def slots(top_k: int = 0) -> tuple[Tensor, Tensor, SlotTargets]:
    """Give hidden states, a head and targets whose teacher keeps `top_k` random ids."""
    hidden = torch.randn(NUM_SLOTS, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    p, ids = torch.randn(NUM_SLOTS, VOCABULARY, dtype=torch.float64).softmax(-1).topk(top_k)
    labels = torch.randint(0, VOCABULARY, (NUM_SLOTS,))
    return hidden, weight, SlotTargets(labels=labels, teacher_ids=ids, teacher_p=p)


def plain_logits(hidden: Tensor, head: HeadSettings, bias: Tensor | None = None) -> Tensor:
    logits = hidden @ head.weight.T * head.multiplier
    logits = head.cap * torch.tanh(logits / head.cap) if head.cap else logits
    return logits if bias is None else logits + bias


def plain_loss(logits: Tensor, targets: SlotTargets, loss: LossConfig) -> Tensor:
    """Write each slot's loss out with all logits and every bucket's members."""
    q = logits.softmax(-1)
    terms = loss.ce * functional.cross_entropy(logits, targets.labels, reduction="none")
    for slot in range(len(q)) if targets.teacher_ids.shape[1] else []:
        ids = [i for i in targets.teacher_ids[slot].tolist() if i >= 0]
        rest = [i for i in range(len(q[slot])) if i not in ids]
        kept = targets.teacher_p[slot][targets.teacher_ids[slot] >= 0]
        p_b, q_b = [*kept], [q[slot, i] for i in ids]
        if rest:
            p_b, q_b = [*p_b, 1 - kept.sum()], [*q_b, q[slot, rest].sum()]
        p, r = torch.stack(p_b), torch.stack(q_b)
        kl = (p * (p.log() - r.log())).sum()
        tv = 0.5 * (p - r).abs().sum()
        share = torch.exp(-loss.lk_eta * (1 - tv.detach()))
        soft = loss.kl * kl + loss.tv * tv - loss.lk_alpha * torch.log(1 - tv)
        soft = soft + loss.lk_lambda * (share * kl + (1 - share) * tv)
        terms = terms + functional.one_hot(torch.tensor(slot), len(q)) * soft
    return terms


def assert_same(
    got: SlotTerms, inputs: list[Tensor], logits: Tensor, targets: SlotTargets, head: HeadSettings
) -> None:
    """Compare terms and gradients with those of `plain_logits`."""
    weighted = logits if head.log_weights is None else logits + head.log_weights
    want, weights = plain_loss(weighted, targets, head.loss), torch.rand(NUM_SLOTS).double()
    assert_close("loss", got.loss.detach(), want.detach(), 1e-10)
    ce = functional.cross_entropy(weighted.detach(), targets.labels, reduction="none")
    assert_close("ce", got.ce, ce, 1e-10)
    assert torch.equal(got.is_correct, logits.argmax(1) == targets.labels)
    assert torch.equal(got.candidates, logits.topk(head.num_candidates).indices)
    gradients = torch.autograd.grad((got.loss * weights).sum(), inputs)
    wanted = torch.autograd.grad((want * weights).sum(), inputs)
    for number, (grad, want_grad) in enumerate(zip(gradients, wanted, strict=True)):
        assert_close(f"d input {number}", grad, want_grad, 1e-10)


@pytest.mark.parametrize(("multiplier", "cap"), SHAPES)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("mix", MIXES)
def test_the_sweep_equals_all_logits_at_once(
    multiplier: float, cap: float | None, chunk: int, mix: str
):
    hidden, weight, targets = slots(0 if mix == "ce" else 5)
    head = HeadSettings(weight=weight, loss=MIXES[mix], multiplier=multiplier, cap=cap, chunk=chunk)
    got = sweep_head(hidden, targets, head)
    assert_same(got, [hidden], plain_logits(hidden, head), targets, head)


def test_a_teacher_of_all_ids_gives_the_whole_divergence():
    hidden, weight, targets = slots(VOCABULARY)
    head = HeadSettings(weight=weight, loss=MIXES["kl"], chunk=9)
    got = sweep_head(hidden, targets, head)
    p = torch.zeros(NUM_SLOTS, VOCABULARY).double()
    p.scatter_(1, targets.teacher_ids, targets.teacher_p)
    want = functional.kl_div((hidden @ weight.T).log_softmax(1), p, reduction="none").sum(1)
    assert_close("kl", got.loss.detach(), want.detach(), 1e-10)
    (grad,) = torch.autograd.grad(got.loss.sum(), hidden)
    assert_close("d kl", grad, torch.autograd.grad(want.sum(), hidden)[0], 1e-10)


def test_the_gradient_of_lk_alpha_is_that_of_tv_over_the_overlap():
    hidden, weight, targets = slots(8)
    gradients = {}
    for mix in ("tv", "lk_alpha"):
        got = sweep_head(hidden, targets, HeadSettings(weight=weight, loss=MIXES[mix]))
        (gradients[mix],) = torch.autograd.grad(got.loss.sum(), hidden)
    want = gradients["tv"] / got.overlap[:, None]
    assert_close("d lk_alpha", gradients["lk_alpha"], want, 1e-10)


def test_mass_on_ids_that_the_head_lacks_goes_to_the_rest():
    hidden, weight, targets = slots(6)
    targets.teacher_ids[::2, 1] = -1
    targets.teacher_ids[::3, 4] = -1
    targets.teacher_p *= targets.teacher_ids >= 0
    head = HeadSettings(weight=weight, loss=MIXES["all"], chunk=5)
    got = sweep_head(hidden, targets, head)
    assert_same(got, [hidden], plain_logits(hidden, head), targets, head)


def test_log_weights_count_in_the_softmax_and_rank_nothing():
    hidden, weight, targets = slots(3)
    log_weights = torch.randn(VOCABULARY).double() * 3
    head = HeadSettings(
        weight=weight, loss=MIXES["all"], log_weights=log_weights, cap=4.0, num_candidates=5
    )
    logits = plain_logits(hidden, head)
    targets.labels[:8] = logits[:8].argmax(1)
    assert not torch.equal(logits.argmax(1), (logits + log_weights).argmax(1))
    assert_same(sweep_head(hidden, targets, head), [hidden], logits, targets, head)


def test_candidates_are_the_best_logits_in_order():
    hidden, weight, targets = slots()
    head = HeadSettings(weight=weight, loss=LossConfig(), num_candidates=6, chunk=4)
    got = sweep_head(hidden, targets, head)
    assert torch.equal(got.candidates, (hidden @ weight.T).topk(6).indices)


def test_a_sure_slot_keeps_the_digits_of_its_rest():
    hidden, weight, targets = slots(4)
    weight = torch.cat([torch.eye(WIDTH).double(), weight[WIDTH:] * 0.01])
    hidden = (25 * torch.eye(WIDTH).double())[torch.arange(NUM_SLOTS) % WIDTH].requires_grad_()
    targets.teacher_ids[:, 0] = torch.arange(NUM_SLOTS) % WIDTH
    targets.teacher_ids[:, 1:] = WIDTH + torch.arange(3)
    low, low_p = hidden.detach().float().requires_grad_(), targets.teacher_p.float()
    head = HeadSettings(weight=weight, loss=MIXES["kl"])
    exact = sweep_head(hidden, targets, head)
    rough = sweep_head(low, replace(targets, teacher_p=low_p), replace(head, weight=weight.float()))
    assert_close("kl", rough.loss.detach(), exact.loss.detach(), 1e-5)
    (grad,) = torch.autograd.grad(rough.loss.sum(), low)
    assert_close("d kl", grad, torch.autograd.grad(exact.loss.sum(), hidden)[0], 1e-4)


@pytest.mark.parametrize("mix", ["ce", "all"])
def test_logits_of_low_precision_are_summed_in_float32(mix: str):
    hidden, weight, targets = slots(0 if mix == "ce" else 5)
    low = hidden.detach().bfloat16().float().requires_grad_()
    rounded = weight.bfloat16()
    head = HeadSettings(weight=rounded, loss=MIXES[mix], chunk=8)
    got = sweep_head(low, targets, head)
    assert got.loss.dtype == torch.float32
    exact = low.detach().double().requires_grad_()
    want = plain_loss(exact @ rounded.double().T, targets, head.loss)
    assert_close("loss", got.loss.detach(), want.detach(), 5e-3)
    (grad,) = torch.autograd.grad(got.loss.sum(), low)
    assert_close("d hidden", grad, torch.autograd.grad(want.sum(), exact)[0], 2e-2)


def bias_of() -> tuple[Tensor, Tensor]:
    latents = torch.randn(NUM_SLOTS, RANK, dtype=torch.float64, requires_grad=True)
    return latents, torch.randn(VOCABULARY, RANK, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("multiplier", "cap"), SHAPES)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("mix", MIXES)
def test_a_trained_bias_gives_all_gradients(
    multiplier: float, cap: float | None, chunk: int, mix: str
):
    hidden, weight, targets = slots(0 if mix == "ce" else 5)
    latents, table = bias_of()
    if mix != "ce":
        targets.teacher_ids[::2, 1] = -1
        targets.teacher_ids[:4, 0] = targets.labels[:4]
        targets.teacher_p *= targets.teacher_ids >= 0
    head = HeadSettings(weight=weight, loss=MIXES[mix], multiplier=multiplier, cap=cap, chunk=chunk)
    got = sweep_with_bias(hidden, latents, table, targets=targets, head=head)
    logits = plain_logits(hidden, head, latents @ table.T)
    assert_same(got, [hidden, latents, table], logits, targets, head)


def test_log_weights_and_candidates_go_with_a_bias():
    hidden, weight, targets = slots(3)
    latents, table = bias_of()
    log_weights = torch.randn(VOCABULARY).double() * 3
    head = HeadSettings(
        weight=weight,
        loss=MIXES["all"],
        log_weights=log_weights,
        cap=4.0,
        num_candidates=5,
        chunk=9,
    )
    logits = plain_logits(hidden, head, latents @ table.T)
    targets.labels[:8] = logits[:8].argmax(1)
    got = sweep_with_bias(hidden, latents, table, targets=targets, head=head)
    assert_same(got, [hidden, latents, table], logits, targets, head)


def test_a_bias_of_zero_is_the_plain_sweep():
    hidden, weight, targets = slots(5)
    latents, table = (torch.zeros_like(x) for x in bias_of())
    head = HeadSettings(weight=weight, loss=MIXES["all"], cap=3.0, chunk=6)
    plain = sweep_head(hidden, targets, head)
    biased = sweep_with_bias(hidden, latents, table, targets=targets, head=head)
    assert torch.equal(plain.loss, biased.loss)
    assert torch.equal(plain.overlap, biased.overlap)


@pytest.mark.parametrize("mix", ["ce", "all"])
def test_a_bias_on_logits_of_low_precision_keeps_the_dtypes_of_its_gradients(mix: str):
    hidden, weight, targets = slots(0 if mix == "ce" else 5)
    rounded = weight.bfloat16()
    exact = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, *bias_of())]
    low = [x.detach().float().requires_grad_() for x in exact]
    head = HeadSettings(weight=rounded, loss=MIXES[mix], chunk=8)
    got = sweep_with_bias(*low, targets=targets, head=head)
    want = plain_loss(exact[0] @ rounded.double().T + exact[1] @ exact[2].T, targets, head.loss)
    assert got.loss.dtype == torch.float32
    assert_close("loss", got.loss.detach(), want.detach(), 5e-3)
    gradients = torch.autograd.grad(got.loss.sum(), low)
    for grad, want_grad in zip(gradients, torch.autograd.grad(want.sum(), exact), strict=True):
        assert grad.dtype == torch.float32
        assert_close("gradient", grad, want_grad, 2e-2)


def test_no_slot_gives_an_empty_loss_and_no_gradient():
    hidden, weight, targets = slots(2)
    none = targets.split(NUM_SLOTS)[0]
    none = SlotTargets(
        labels=none.labels[:0], teacher_ids=none.teacher_ids[:0], teacher_p=none.teacher_p[:0]
    )
    got = sweep_head(hidden[:0], none, HeadSettings(weight=weight, loss=MIXES["all"]))
    assert got.loss.shape == (0,)
    (grad,) = torch.autograd.grad(got.loss.sum(), hidden)
    assert not grad.any()
    latents, table = bias_of()
    got = sweep_with_bias(
        hidden[:0],
        latents[:0],
        table,
        targets=none,
        head=HeadSettings(weight=weight, loss=MIXES["all"]),
    )
    (grad,) = torch.autograd.grad(got.loss.sum(), table)
    assert grad.shape == table.shape
    assert not grad.any()
