"""The block forward of training is the cached decode step of serving, for every drafter."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dflash_train.drafter.attention import Blocks
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.target import Target
from dflash_train.testing import FAMILIES, VARIANTS, assert_close, tiny_drafter, tiny_target

NUM_SLOTS = 5
LENGTHS = (24, 17)
ANCHORS = ([1, 2, 3, 9, 10, 23], [0, 1, 16])


@dataclass
class Packed:
    """Two documents of random tokens and what the target's taps say about them."""

    ids: list[Tensor]
    features: list[Tensor]

    @classmethod
    def of(cls, target: Target) -> "Packed":
        generator = torch.Generator().manual_seed(1)
        ids = [torch.randint(4, 260, (length,), generator=generator) for length in LENGTHS]
        features = target.features_of([row.tolist() for row in ids])
        return cls(ids, [rows.double() for rows in features])

    @property
    def anchor_ids(self) -> Tensor:
        return torch.cat([row[at] for row, at in zip(self.ids, ANCHORS, strict=True)])

    def blocks(self) -> Blocks:
        return Blocks(
            context_offsets=torch.tensor([0, *LENGTHS]).cumsum(0).tolist(),
            block_offsets=torch.tensor([0, *map(len, ANCHORS)]).cumsum(0).tolist(),
            anchor_positions=torch.tensor([anchor for at in ANCHORS for anchor in at]),
        )


@torch.no_grad()
def train_forward(drafter: Drafter, head: FrozenHead, packed: Packed) -> Tensor:
    config = drafter.config
    embeddings = block_embeddings(head, packed.anchor_ids, num_slots=NUM_SLOTS, config=config)
    return drafter(embeddings, torch.cat(packed.features), packed.blocks())


@torch.no_grad()
def serve(drafter: Drafter, head: FrozenHead, packed: Packed) -> Tensor:
    hidden = []
    for ids, features, anchors in zip(packed.ids, packed.features, ANCHORS, strict=True):
        cache = drafter.new_cache()
        for anchor in anchors:
            block = block_embeddings(
                head, ids[[anchor]], num_slots=NUM_SLOTS, config=drafter.config
            )
            hidden.append(drafter.draft_step(block[0], features[cache.length : anchor], cache))
    return torch.stack(hidden)


def in_float64(head: FrozenHead) -> FrozenHead:
    return FrozenHead(
        embedding_weight=head.embedding_weight.double(),
        lm_head_weight=head.lm_head_weight.double(),
    )


def check_equivalence(drafter: Drafter, target: Target) -> None:
    packed, head = Packed.of(target), drafter.output_head(in_float64(target.head))
    trained, served = train_forward(drafter, head, packed), serve(drafter, head, packed)
    assert_close("hidden", trained, served, 1e-10)
    assert_close("logits", drafter.logits(trained, head), drafter.logits(served, head), 1e-10)
    first = drafter.config.first_slot
    for hidden, served_hidden, anchor in zip(trained, served, packed.anchor_ids, strict=True):
        drafts = drafter.draft(served_hidden, anchor, head)
        previous = torch.cat([anchor[None], drafts[:-1]])
        assert drafts.tolist() == drafter.choose(hidden[first:], previous, head).tolist()
        assert len(drafts) == drafter.config.num_drafts


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_forward_equals_the_cached_decode_step(variant: str, target64: Target):
    drafter = tiny_drafter(target64, block_size=NUM_SLOTS, dtype=torch.float64, **VARIANTS[variant])
    check_equivalence(drafter, target64)


@pytest.mark.parametrize("taps", [[2], [0, 2, 4], [4, 1, 0, 3, 2]])
def test_any_number_of_taps_trains_as_it_serves(taps: list[int]):
    target = tiny_target(dtype=torch.float64)
    target.target_layer_ids = taps
    drafter = tiny_drafter(target, block_size=NUM_SLOTS, dtype=torch.float64)
    assert drafter.fc.in_features == 32 * len(taps)
    check_equivalence(drafter, target)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"llama"}))
def test_drafters_of_every_target_family_train_as_they_serve(family: str):
    target = tiny_target(family=family)  # float32: the experts' kernels take no float64
    drafter = tiny_drafter(target, block_size=NUM_SLOTS, dtype=torch.float64)
    check_equivalence(drafter, target)


def shifted_ids(ids: Tensor) -> Tensor:
    return torch.where(ids < 259, ids + 1, 4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_depends_on_earlier_rows_of_its_document_and_on_its_own_anchor_alone(
    variant: str, target64: Target
):
    drafter = tiny_drafter(target64, block_size=NUM_SLOTS, dtype=torch.float64, **VARIANTS[variant])
    packed, block = Packed.of(target64), 3  # document 0, anchor 9
    before = train_forward(drafter, target64.head, packed)[block]

    later = Packed(packed.ids, [packed.features[0].clone(), packed.features[1] * 2.0])
    later.features[0][9:] *= -3.0
    assert torch.equal(train_forward(drafter, target64.head, later)[block], before)

    other_ids = [shifted_ids(ids) for ids in packed.ids]
    other_ids[0][9] = packed.ids[0][9]
    neighbours = Packed(other_ids, packed.features)
    assert torch.equal(train_forward(drafter, target64.head, neighbours)[block], before)

    nearest = Packed(packed.ids, [packed.features[0].clone(), packed.features[1]])
    nearest.features[0][8] += 0.1
    changed = (train_forward(drafter, target64.head, nearest)[block] != before).any(dim=-1)
    assert changed.tolist() == sees_the_row_before_its_anchor(VARIANTS[variant])


def sees_the_row_before_its_anchor(settings: dict[str, Any]) -> list[bool]:
    """Give for each slot whether two layers carry row a - 1 to it.

    In a window of W, slot i sees row a - 1 iff i + 1 < W; a slot that does not may still see a
    slot that did in the layer before.
    """
    window = settings.get("sliding_window")
    if window is None or settings["layer_types"][0] == "full_attention":
        return [True] * NUM_SLOTS
    direct = [slot + 1 < window for slot in range(NUM_SLOTS)]
    return [
        any(direct[near] for near in range(NUM_SLOTS) if abs(slot - near) < window)
        for slot in range(NUM_SLOTS)
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_anchors_does_not_matter(variant: str, target64: Target):
    drafter = tiny_drafter(target64, block_size=NUM_SLOTS, dtype=torch.float64, **VARIANTS[variant])
    packed = Packed.of(target64)
    blocks, order = packed.blocks(), torch.tensor([4, 0, 5, 2, 1, 3, 8, 6, 7])
    embeddings = block_embeddings(
        target64.head, packed.anchor_ids, num_slots=NUM_SLOTS, config=drafter.config
    )
    features = torch.cat(packed.features)
    with torch.no_grad():
        ascending = drafter(embeddings, features, blocks)
        blocks.anchor_positions = blocks.anchor_positions[order]
        shuffled = drafter(embeddings[order], features, blocks)
    assert_close("hidden", shuffled, ascending[order], 1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_narrow_block_is_the_forward_pass_of_that_width(variant: str, target64: Target):
    drafter = tiny_drafter(target64, block_size=NUM_SLOTS, dtype=torch.float64, **VARIANTS[variant])
    packed, config = Packed.of(target64), drafter.config
    blocks = Blocks(
        context_offsets=[0, 8],
        block_offsets=[0, 2],
        anchor_positions=torch.tensor([5, 8]),
        widths=torch.tensor([NUM_SLOTS, 3]),
    )
    ids, features = packed.ids[0][[5, 8]], packed.features[0][:8]
    wide = block_embeddings(target64.head, ids, num_slots=NUM_SLOTS, config=config)
    narrow = block_embeddings(target64.head, ids[1:], num_slots=3, config=config)
    with torch.no_grad():
        trained = drafter(wide, features, blocks)[1, :3]
        served = drafter.draft_step(narrow[0], features, drafter.new_cache())
    assert_close("hidden", trained, served, 1e-10)
