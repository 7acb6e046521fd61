from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dflash_train.drafter.config import DrafterConfig
from dflash_train.features.store import FeatureRow
from dflash_train.features.target import FrozenHead, Target
from dflash_train.testing import assert_close, tiny_drafter
from dflash_train.training.batching import TrainingBatch, collate
from dflash_train.training.losses import (
    HeadLoss,
    block_loss,
    head_cross_entropy,
    head_cross_entropy_reference,
    position_weights,
)

NUM_SLOTS, VOCABULARY, WIDTH = 23, 61, 15
SHAPES = [(1.0, None), (0.7, None), (1.0, 3.0), (1.7, 2.0)]


@pytest.fixture
def config(target64: Target) -> DrafterConfig:
    return tiny_drafter(target64).config


def slots() -> tuple[Tensor, FrozenHead, Tensor]:
    hidden = torch.randn(NUM_SLOTS, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    head = FrozenHead(embedding_weight=weight, lm_head_weight=weight)
    return hidden, head, torch.randint(0, VOCABULARY, (NUM_SLOTS,))


def gradient(result: HeadLoss, hidden: Tensor, weights: Tensor) -> Tensor:
    return torch.autograd.grad((result.ce * weights).sum(), hidden)[0]


@pytest.mark.parametrize(("multiplier", "cap"), SHAPES)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_sweep_equals_the_reference(
    config: DrafterConfig, multiplier: float, cap: float | None, chunk: int
):
    config = replace(config, output_multiplier=multiplier, final_logit_softcapping=cap)
    hidden, head, labels = slots()
    weights = torch.rand(NUM_SLOTS, dtype=torch.float64)
    swept = head_cross_entropy(hidden, head, labels, config=config, chunk=chunk)
    plain = head_cross_entropy_reference(hidden, head, labels, config=config)
    assert_close("ce", swept.ce.detach(), plain.ce.detach(), 1e-10)
    assert torch.equal(swept.is_correct, plain.is_correct)
    assert_close(
        "d hidden", gradient(swept, hidden, weights), gradient(plain, hidden, weights), 1e-10
    )


def test_logits_of_low_precision_are_summed_in_float32(config: DrafterConfig):
    hidden, head, labels = slots()
    low = FrozenHead(
        embedding_weight=head.embedding_weight.bfloat16(),
        lm_head_weight=head.lm_head_weight.bfloat16(),
    )
    hidden = hidden.detach().float().requires_grad_()
    swept = head_cross_entropy(hidden, low, labels, config=config, chunk=8)
    plain = head_cross_entropy_reference(hidden, low, labels, config=config)
    assert swept.ce.dtype == torch.float32
    assert_close("ce", swept.ce.detach(), plain.ce.detach(), 5e-3)
    ones = torch.ones(NUM_SLOTS)
    assert_close("d hidden", gradient(swept, hidden, ones), gradient(plain, hidden, ones), 2e-2)


def test_is_correct_marks_the_argmax(config: DrafterConfig):
    hidden, head, _ = slots()
    best = head.logits(hidden).argmax(1)
    labels = torch.where(torch.arange(NUM_SLOTS) % 2 == 0, best, (best + 1) % VOCABULARY)
    swept = head_cross_entropy(hidden, head, labels, config=config, chunk=5)
    assert swept.is_correct.tolist() == [slot % 2 == 0 for slot in range(NUM_SLOTS)]


def test_position_weights_start_at_slot_one():
    weights = position_weights(4, 2.0)
    expected = torch.tensor([0, 0, -0.5, -1.0], dtype=torch.float64).exp()
    expected[0] = 0.0
    assert_close("weights", weights, expected, 1e-10)


@pytest.fixture
def rows(target64: Target, answer_rows) -> list[FeatureRow]:
    return answer_rows(target64, [5, 11, 7], max_new_tokens=9)


def batch_of(rows: list[FeatureRow]) -> TrainingBatch:
    return collate(rows, block_size=4, num_anchors=5, seed=0, epoch=0)


def loss_and_gradients(
    target: Target, batches: list[TrainingBatch], *, chunk: int = 6
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over batches, divided by the denominator of all of them."""
    drafter = tiny_drafter(target, dtype=torch.float64)
    weights = position_weights(4, 4.0)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        embeddings = target.head.embed(
            torch.cat([batch.anchor_ids[:, None], torch.full((len(batch.anchor_ids), 3), 3)], dim=1)
        )
        hidden = drafter(embeddings, batch.target_features, batch.blocks)
        terms = block_loss(
            hidden, batch, target.head, config=drafter.config, weights_K=weights, chunk=chunk
        )
        total = total + terms.loss_sum
    denominator = torch.stack([batch.weight_sum(weights) for batch in batches]).sum()
    loss = total / denominator
    loss.backward()
    gradients = {}
    for name, parameter in drafter.named_parameters():
        assert parameter.grad is not None
        gradients[name] = parameter.grad
    return loss.detach(), gradients


def assert_same(target: Target, first: list[TrainingBatch], second: list[TrainingBatch]) -> None:
    (loss, gradients), (other_loss, other) = (
        loss_and_gradients(target, batches) for batches in (first, second)
    )
    assert_close("loss", loss, other_loss, 1e-10)
    for name, gradient_ in gradients.items():
        assert_close(f"d {name}", gradient_, other[name], 1e-10)


def test_packed_rows_give_the_loss_and_gradients_of_single_rows(
    target64: Target, rows: list[FeatureRow]
):
    assert_same(target64, [batch_of(rows)], [batch_of([row]) for row in rows])


def test_loss_is_the_weighted_mean_of_the_definition(target64: Target, rows: list[FeatureRow]):
    batch = batch_of(rows)
    loss, _ = loss_and_gradients(target64, [batch])
    drafter = tiny_drafter(target64, dtype=torch.float64)
    weights = position_weights(4, 4.0)
    numerator, denominator = 0.0, 0.0
    for row_number, row in enumerate(rows):
        first, stop = batch.blocks.block_offsets[row_number : row_number + 2]
        for anchor in batch.blocks.anchor_positions[first:stop].tolist():
            ids = torch.tensor([int(row.input_ids[anchor]), 3, 3, 3])
            with torch.no_grad():
                hidden = drafter.draft_step(
                    target64.head.embed(ids), row.features[:anchor], drafter.new_cache()
                )
                log_q = drafter.logits(hidden, target64.head).log_softmax(-1)
            for slot in range(1, min(4, len(row.input_ids) - anchor)):
                numerator -= float(weights[slot] * log_q[slot, row.input_ids[anchor + slot]])
                denominator += float(weights[slot])
    expected = torch.tensor(numerator / denominator, dtype=torch.float64)
    assert_close("loss", loss, expected, 1e-10)


def test_order_of_blocks_and_chunk_size_do_not_change_the_loss(
    target64: Target, rows: list[FeatureRow]
):
    assert_same(target64, [batch_of(rows)], [batch_of(rows[::-1])])
    small, _ = loss_and_gradients(target64, [batch_of(rows)], chunk=1)
    large, _ = loss_and_gradients(target64, [batch_of(rows)], chunk=1000)
    assert_close("loss", small, large, 1e-10)


def test_counts_tell_single_slots_from_leading_ones(target64: Target, config: DrafterConfig):
    labels = torch.tensor([[9, 1, 2, 3], [9, 1, 2, 3], [9, 4, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 0, 0]], dtype=torch.bool)
    drafted = torch.tensor([[0, 1, 7, 3], [0, 1, 2, 3], [0, 4, 0, 0]])
    head = FrozenHead(embedding_weight=torch.eye(10), lm_head_weight=torch.eye(10))
    rows_batch = replace(
        _any_batch(), labels=labels, label_mask=mask, anchor_ids=labels[:, 0], num_tokens=50
    )
    terms = block_loss(
        5 * torch.eye(10)[drafted],
        rows_batch,
        head,
        config=config,
        weights_K=position_weights(4, 4.0),
        chunk=4,
    )
    assert terms.counts.slot_labels == [0, 3, 2, 2]
    assert terms.counts.slot_correct == [0, 3, 1, 2]
    assert terms.counts.slot_joint == [0, 3, 1, 1]
    assert terms.counts.num_blocks == 3
    assert terms.counts.num_tokens == 50
    both = terms.counts + terms.counts
    assert both.slot_accuracy == [1.0, 0.5, 1.0]
    assert both.joint_accuracy == [1.0, 0.5, 0.5]
    assert both.loss == pytest.approx(terms.counts.loss)


def _any_batch() -> TrainingBatch:
    row = FeatureRow(
        id="row",
        tenant=None,
        session=None,
        input_ids=torch.arange(6),
        loss_mask=torch.arange(6) >= 2,
        features=torch.zeros(6, 8),
        max_length=6,
        finish_reason="stop",
    )
    return collate([row], block_size=4, num_anchors=2, seed=0, epoch=0)
