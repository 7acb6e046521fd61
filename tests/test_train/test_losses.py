import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dflash_train.config import LossConfig, Weighting
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.store import FeatureRow
from dflash_train.features.target import Target
from dflash_train.features.teacher import TeacherRow
from dflash_train.testing import VARIANTS, assert_close, tiny_drafter
from dflash_train.training.batching import BlockSettings, TrainingBatch, collate
from dflash_train.training.losses import (
    LossSettings,
    block_loss,
    default_gamma,
    dpace_weights,
    fixed_weights,
    head_rows,
    position_weights,
)
from dflash_train.training.vocabulary import SampledHead, sample_head

K, TOP_K = 4, 5
VARIANT_NAMES = ["plain", "scaled", "dflash2", "dspark", "dspark_gated", "reduced"]
DSPARK = LossConfig(ce=0.1, tv=1.8, confidence=1.0, decay_gamma=4.0)
LOSSES = {
    "decay": LossConfig(),
    "dpace": LossConfig(weighting=Weighting.dpace),
    "none": LossConfig(weighting=Weighting.none, ce=0.5, kl=0.5, selector=0.3),
    "dspark": DSPARK,
    "dpace_soft": LossConfig(weighting=Weighting.dpace, ce=0.2, kl=0.3, lk_lambda=1.0),
}


def test_position_weights_start_at_the_first_slot_that_predicts():
    weights = position_weights(4, 2.0)
    assert_close("same place", weights, torch.tensor([0, 1, math.exp(-0.5), math.exp(-1)]), 1e-7)
    shifted = position_weights(4, 2.0, first_slot=0)
    assert_close("shifted", shifted, torch.exp(-torch.arange(4).double() / 2), 1e-10)
    assert position_weights(3, None).tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(("drafts", "gamma"), [(7, 4.0), (9, 5.0), (15, 7.0)])
def test_the_decay_follows_the_published_values(drafts: int, gamma: float):
    assert default_gamma(drafts) == pytest.approx(gamma)
    assert default_gamma(drafts) < default_gamma(drafts + 1)


def test_dpace_halves_from_slot_to_slot_before_anything_is_learnt():
    mask = torch.ones(1, 30, dtype=torch.bool)
    weights = dpace_weights(torch.full((1, 30), 40.0).double(), mask, alpha=0.5)
    assert_close("weights", weights[0, :10], 0.5 ** torch.arange(10).double(), 1e-5)


def test_dpace_counts_the_slots_that_follow_once_all_are_sure():
    mask = torch.tensor([[False] + [True] * 7, [False] + [True] * 3 + [False] * 4])
    weights = dpace_weights(torch.zeros(2, 8).double(), mask, alpha=0.5)
    assert weights.tolist() == [[0, 7, 6, 5, 4, 3, 2, 1], [0, 3, 2, 1, 0, 0, 0, 0]]


def with_teacher(rows: list[FeatureRow]) -> list[FeatureRow]:
    """Give rows with a random distribution before each answer token."""
    generator = torch.Generator().manual_seed(5)
    taught = []
    for row in rows:
        logits = 2 * torch.randn(len(row.input_ids), 260, generator=generator).double()
        p, ids = logits.softmax(-1).topk(TOP_K)
        is_used = row.loss_mask.roll(-1)[:, None] & (torch.arange(len(p)) < len(p) - 1)[:, None]
        taught.append(replace(row, teacher=TeacherRow(ids=ids.int(), probabilities=p * is_used)))
    return taught


@pytest.fixture(scope="module")
def rows(target64: Target, answer_rows) -> list[FeatureRow]:
    return with_teacher(answer_rows(target64, [5, 11, 7], max_new_tokens=9))


def drafter_of(target: Target, variant: str) -> Drafter:
    if variant == "reduced":
        return tiny_drafter(target, dtype=torch.float64, draft_vocab_size=120)
    return tiny_drafter(target, dtype=torch.float64, **VARIANTS[variant])


def settings_of(drafter: Drafter, target: Target, *, use_teacher: bool = True) -> BlockSettings:
    return BlockSettings(
        block_size=K,
        num_anchors=5,
        seed=0,
        first_slot=drafter.config.first_slot,
        draft_token_ids=drafter.output_head(target.head).draft_token_ids,
        use_teacher=use_teacher,
    )


def loss_and_gradients(
    drafter: Drafter,
    target: Target,
    batches: list[TrainingBatch],
    loss: LossConfig,
    *,
    chunk: int = 6,
    sample: SampledHead | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over batches, divided by the denominator of all of them."""
    drafter.zero_grad()
    weights = fixed_weights(loss, drafter.config)
    rows = sample or SampledHead(head=drafter.output_head(target.head), log_weights=None)
    head = rows.head
    settings = LossSettings(
        loss=loss, slot_weights=weights, chunk=chunk, log_weights=rows.log_weights
    )
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        embeddings = block_embeddings(
            target.head, batch.anchor_ids, num_slots=K, config=drafter.config
        )
        hidden = drafter(embeddings, batch.target_features, batch.blocks)
        terms = block_loss(hidden, batch, head, drafter=drafter, settings=settings)
        total = total + terms.loss_sum
    result = total / torch.stack([batch.weight_sum(weights) for batch in batches]).sum()
    return result.detach(), gradients_of(result, drafter)


def gradients_of(loss: Tensor, drafter: Drafter) -> dict[str, Tensor]:
    names, parameters = zip(*drafter.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(
    first: tuple[Tensor, dict[str, Tensor]], second: tuple[Tensor, dict[str, Tensor]]
) -> None:
    assert_close("loss", first[0], second[0], 1e-10)
    for name, gradient in first[1].items():
        assert_close(f"d {name}", gradient, second[1][name], 1e-10)


def plain_slot(
    drafter: Drafter,
    target: Target,
    hidden: Tensor,
    row: FeatureRow,
    position: int,
    loss: LossConfig,
    sample: SampledHead | None,
) -> tuple[Tensor, Tensor]:
    """Give the loss and the cross entropy of one slot, all heads written out."""
    config = drafter.config
    ids = (drafter.output_head(target.head) if sample is None else sample.head).draft_token_ids
    ids = torch.arange(config.vocab_size) if ids is None else ids
    label, previous = row.input_ids[position], row.input_ids[position - 1]
    logits = target.head.lm_head_weight[ids] @ hidden * config.output_multiplier
    cap = config.final_logit_softcapping
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    unary, row_of_previous = logits, hidden[:0]
    if drafter.markov_head is not None:
        row_of_previous = latent = drafter.markov_head.markov_w1.weight[previous]
        if drafter.markov_head.gate_proj is not None:
            gate = drafter.markov_head.gate_proj(torch.cat([hidden, latent]))
            latent = torch.sigmoid(gate) * latent
        bias = drafter.markov_head.markov_w2.weight @ latent
        logits = logits + (bias if sample is None else bias[ids])
    log_weights = None if sample is None else sample.log_weights
    q = (logits if log_weights is None else logits + log_weights).softmax(0)
    ce = -q[ids == label].log().squeeze()
    assert row.teacher is not None
    kept = [
        (int((ids == token).nonzero()), p)
        for token, p in zip(
            row.teacher.ids[position - 1], row.teacher.probabilities[position - 1], strict=True
        )
        if token in ids
    ]
    is_rest = torch.ones(len(ids), dtype=torch.bool)
    is_rest[[place for place, _ in kept]] = False
    p = torch.stack([p for _, p in kept] + [1 - sum((p for _, p in kept), torch.zeros(()))])
    r = torch.stack([q[place] for place, _ in kept] + [q[is_rest].sum()])
    kl, tv = (p * (p / r).log()).sum(), 0.5 * (p - r).abs().sum()
    share = torch.exp(-loss.lk_eta * (1 - tv.detach()))
    total = loss.ce * ce + loss.kl * kl + loss.tv * tv
    total = total + loss.lk_lambda * (share * kl + (1 - share) * tv)
    selector = drafter.candidate_selector
    if selector is not None:
        best = ids[logits.topk(selector.top_k).indices].tolist()
        if label not in best:
            best[-1] = int(label)
        offered = [int((ids == token).nonzero()) for token in best]
        wanted = selector.predecessor_codebook[previous] * (
            selector.hidden_projection.weight @ hidden
        )
        scores = unary[offered] + selector.successor_codebook[best] @ wanted
        place = torch.tensor(best.index(int(label)))
        total = total + loss.selector * functional.cross_entropy(scores, place)
    if drafter.confidence_head is not None:
        seen = torch.cat([hidden, row_of_previous]) if config.confidence_sees_markov else hidden
        logit = drafter.confidence_head.proj(seen).squeeze()
        accepted = 1 - tv.detach()
        confidence = -(
            accepted * logit.sigmoid().log() + (1 - accepted) * (1 - logit.sigmoid()).log()
        )
        total = total + loss.confidence * confidence
    return total, ce.detach()


def plain_loss(
    drafter: Drafter,
    target: Target,
    rows: list[FeatureRow],
    batch: TrainingBatch,
    loss: LossConfig,
    *,
    sample: SampledHead | None = None,
) -> Tensor:
    """Write the loss out block by block from cached decode steps."""
    first, ids = drafter.config.first_slot, drafter.output_head(target.head).draft_token_ids
    gamma = loss.decay_gamma or default_gamma(drafter.config.num_drafts)
    numerator, denominator = torch.zeros(()).double(), 0.0
    for number, row in enumerate(rows):
        start, stop = batch.blocks.block_offsets[number : number + 2]
        for anchor in batch.blocks.anchor_positions[start:stop].tolist():
            embeddings = block_embeddings(
                target.head, row.input_ids[anchor : anchor + 1], num_slots=K, config=drafter.config
            )[0]
            hidden = drafter.draft_step(embeddings, row.features[:anchor], drafter.new_cache())
            block: list[tuple[Tensor, Tensor]] = []
            for slot in range(first, K):
                position = anchor + slot + 1 - first
                is_known = position < len(row.input_ids) and bool(row.loss_mask[position])
                if not is_known or (ids is not None and row.input_ids[position] not in ids):
                    break
                block.append(plain_slot(drafter, target, hidden[slot], row, position, loss, sample))
            survival = [1.0]
            for _, ce in block:
                u = (1 - loss.dpace_alpha) * math.exp(-float(ce)) + loss.dpace_alpha
                survival.append(survival[-1] * u)
            for place, (term, _) in enumerate(block):
                if loss.weighting is Weighting.dpace:
                    numerator = numerator + sum(survival[place + 1 :]) * term
                    denominator += 1.0
                else:
                    decays = loss.weighting is Weighting.decay
                    weight = math.exp(-place / gamma) if decays else 1.0
                    numerator, denominator = numerator + weight * term, denominator + weight
    return numerator / denominator


@pytest.mark.parametrize("variant", VARIANT_NAMES)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_the_definition(
    target64: Target, rows: list[FeatureRow], variant: str, name: str
):
    drafter = drafter_of(target64, variant)
    batch = collate(rows, settings_of(drafter, target64), epoch=0)
    got = loss_and_gradients(drafter, target64, [batch], LOSSES[name])
    want = plain_loss(drafter, target64, rows, batch, LOSSES[name])
    assert_same(got, (want.detach(), gradients_of(want, drafter)))


def sample_of(target: Target, rows: list[FeatureRow], *, num_drawn: int) -> SampledHead:
    is_label = torch.zeros(len(target.head.lm_head_weight), dtype=torch.bool)
    is_label[torch.cat([row.input_ids[row.loss_mask] for row in rows])] = True
    return sample_head(target.head, is_label, num_drawn=num_drawn, seed=0, step=0)


SAMPLED_VARIANTS = ["plain", "scaled", "dflash2", "dspark", "dspark_gated"]


@pytest.mark.parametrize("variant", SAMPLED_VARIANTS)
@pytest.mark.parametrize("name", ["decay", "none", "dspark", "dpace_soft"])
def test_a_sampled_head_gives_the_loss_and_gradients_of_the_definition(
    target64: Target, rows: list[FeatureRow], variant: str, name: str
):
    drafter, sample = drafter_of(target64, variant), sample_of(target64, rows, num_drawn=90)
    batch = collate(rows, settings_of(drafter, target64), epoch=0)
    got = loss_and_gradients(drafter, target64, [batch], LOSSES[name], sample=sample)
    want = plain_loss(drafter, target64, rows, batch, LOSSES[name], sample=sample)
    assert_same(got, (want.detach(), gradients_of(want, drafter)))


@pytest.mark.parametrize("variant", SAMPLED_VARIANTS)
def test_a_sample_of_the_whole_vocabulary_is_the_full_head_to_the_bit(
    target64: Target, rows: list[FeatureRow], variant: str
):
    drafter, sample = drafter_of(target64, variant), sample_of(target64, rows, num_drawn=260)
    batch = collate(rows, settings_of(drafter, target64), epoch=0)
    loss, gradients = loss_and_gradients(drafter, target64, [batch], DSPARK, sample=sample)
    want_loss, want_gradients = loss_and_gradients(drafter, target64, [batch], DSPARK)
    assert sample.head.draft_token_ids is not None
    assert torch.equal(loss, want_loss)
    for parameter, gradient in gradients.items():
        assert torch.equal(gradient, want_gradients[parameter]), parameter


@pytest.mark.parametrize("variant", ["plain", "dflash2", "dspark"])
@pytest.mark.parametrize("name", ["decay", "dpace_soft"])
def test_packing_order_and_chunks_do_not_change_the_loss(
    target64: Target, rows: list[FeatureRow], variant: str, name: str
):
    drafter, loss = drafter_of(target64, variant), LOSSES[name]
    settings = settings_of(drafter, target64)

    def run(packs: list[list[FeatureRow]], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        batches = [collate(pack, settings, epoch=0) for pack in packs]
        return loss_and_gradients(drafter, target64, batches, loss, **options)

    packed = run([rows])
    assert_same(packed, run([[row] for row in rows]))
    assert_same(packed, run([rows[::-1]]))
    assert_same(packed, run([rows], chunk=1))
    assert_same(packed, run([rows], chunk=1000))


@pytest.mark.parametrize("weighting", Weighting)
def test_slot_0_and_dead_blocks_have_no_gradient(
    target64: Target, rows: list[FeatureRow], weighting: Weighting
):
    drafter = drafter_of(target64, "plain")
    loss = LossConfig(weighting=weighting)
    batch = collate(rows, settings_of(drafter, target64), epoch=0)
    batch.label_mask[2:4] = False
    weights = fixed_weights(loss, drafter.config)
    hidden = torch.randn(len(batch.labels), K, 32, dtype=torch.float64, requires_grad=True)
    settings = LossSettings(loss=loss, slot_weights=weights, chunk=8)
    terms = block_loss(hidden, batch, target64.head, drafter=drafter, settings=settings)
    (grad,) = torch.autograd.grad(terms.loss_sum, hidden)
    assert torch.equal(grad.abs().sum(-1) > 0, batch.label_mask)
    assert not grad[:, 0].any()
    batch.label_mask[:] = False
    empty = block_loss(hidden, batch, target64.head, drafter=drafter, settings=settings)
    assert empty.loss_sum.item() == 0.0
    assert empty.counts.weight_sum == 0.0
    assert not torch.autograd.grad(empty.loss_sum, hidden)[0].any()


@pytest.mark.parametrize("variant", ["dflash2", "dspark"])
def test_a_batch_without_labels_still_gives_every_head_a_gradient(
    target64: Target, rows: list[FeatureRow], variant: str
):
    drafter = drafter_of(target64, variant)
    batch = collate(rows, settings_of(drafter, target64, use_teacher=False), epoch=0)
    labelled, other = batch, replace(batch, label_mask=torch.zeros_like(batch.label_mask))
    one = loss_and_gradients(drafter, target64, [labelled], LOSSES["dpace"])
    two = loss_and_gradients(drafter, target64, [labelled, other], LOSSES["dpace"])
    assert_same(one, two)


def test_confidence_learns_the_argmax_where_there_is_no_teacher(
    target64: Target, rows: list[FeatureRow]
):
    drafter = drafter_of(target64, "dspark")
    batch = collate(rows, settings_of(drafter, target64, use_teacher=False), epoch=0)
    losses = {
        confidence: loss_and_gradients(
            drafter, target64, [batch], LossConfig(confidence=confidence, weighting=Weighting.none)
        )[0]
        for confidence in (0.0, 1.0)
    }
    mask, head = batch.label_mask, target64.head
    embeddings = block_embeddings(head, batch.anchor_ids, num_slots=K, config=drafter.config)
    hidden = drafter(embeddings, batch.target_features, batch.blocks)[mask]
    previous = batch.previous_ids[mask]
    is_hit = drafter.choose(hidden, previous, head) == batch.labels[mask]
    sure = drafter.confidence(hidden, previous)
    want = functional.binary_cross_entropy(sure, is_hit.double())
    assert_close("confidence", losses[1.0] - losses[0.0], want, 1e-9)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_correct_slots_are_those_that_choose_would_draft(
    target64: Target, rows: list[FeatureRow], variant: str
):
    drafter = drafter_of(target64, variant)
    head = drafter.output_head(target64.head)
    batch = collate(rows, settings_of(drafter, target64), epoch=0)
    hidden = torch.randn(len(batch.labels), K, 32, dtype=torch.float64)
    drafted = drafter.choose(hidden.flatten(0, 1), batch.previous_ids.flatten(), head).view(-1, K)
    is_taught = batch.label_mask & (torch.arange(batch.labels.numel()).view(-1, K) % 3 > 0)
    batch = replace(batch, labels=torch.where(is_taught, drafted, batch.labels))
    drafted = drafter.choose(hidden.flatten(0, 1), batch.previous_ids.flatten(), head).view(-1, K)
    want = (drafted == batch.labels) & batch.label_mask
    settings = LossSettings(
        loss=LossConfig(), slot_weights=fixed_weights(LossConfig(), drafter.config), chunk=9
    )
    counts = block_loss(hidden, batch, head, drafter=drafter, settings=settings).counts
    first = drafter.config.first_slot
    assert counts.slot_correct == want[:, first:].sum(0).tolist()
    assert sum(counts.slot_correct) > 0


def test_counts_tell_single_slots_from_leading_ones(target64: Target, rows: list[FeatureRow]):
    labels = torch.tensor([[9, 1, 2, 3], [9, 1, 2, 3], [9, 4, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 0, 0]], dtype=torch.bool)
    drafted = torch.tensor([[0, 1, 7, 3], [0, 1, 2, 3], [0, 4, 0, 0]])
    head = FrozenHead(embedding_weight=torch.eye(10), lm_head_weight=torch.eye(10))
    drafter = drafter_of(target64, "plain")
    batch = replace(
        collate(rows, settings_of(drafter, target64, use_teacher=False), epoch=0),
        labels=labels,
        label_mask=mask,
        anchor_ids=labels[:, 0],
        num_tokens=50,
    )
    settings = LossSettings(loss=LossConfig(), slot_weights=position_weights(4, 4.0), chunk=4)
    hidden = 5 * torch.eye(10)[drafted]
    counts = block_loss(hidden, batch, head, drafter=drafter, settings=settings).counts
    assert counts.slot_labels == [3, 2, 2]
    assert counts.slot_correct == [3, 1, 2]
    assert counts.slot_joint == [3, 1, 1]
    assert (counts.num_blocks, counts.num_tokens) == (3, 50)
    right, wrong = math.log(math.exp(5) + 9) - 5, math.log(math.exp(5) + 9)
    assert counts.ce_sum == pytest.approx(6 * right + wrong, rel=1e-5)


def test_rows_of_a_reduced_head_are_found_and_the_others_are_minus_one():
    head = FrozenHead(embedding_weight=torch.eye(9), lm_head_weight=torch.eye(9))
    reduced = head.restricted(torch.tensor([1, 4, 7]))
    assert head_rows(reduced, torch.tensor([4, 0, 7, 8, 1])).tolist() == [1, -1, 2, -1, 0]
    assert head_rows(head, torch.tensor([4, 0])).tolist() == [4, 0]


def test_dpace_weights_are_constants_of_the_gradient():
    ce = torch.tensor([[9.0, 0.5, 0.2, 1.5]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False, True, True, True]])
    weights = dpace_weights(ce, mask, alpha=0.5)
    assert not weights.requires_grad
    (grad,) = torch.autograd.grad((weights * ce).sum(), ce)
    assert torch.equal(grad, weights)
