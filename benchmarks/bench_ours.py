"""Our step on a case: what `Trainer.train_step` does between loading a pack and the optimiser."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_case import DECAY_GAMMA, Case, Shapes
from benchmarks.bench_twin import packed_labels
from dflash_train.config import LossConfig, TrainingConfig
from dflash_train.drafter.attention import Blocks
from dflash_train.drafter.config import DrafterConfig, spread_target_layer_ids
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.training.batching import TrainingBatch
from dflash_train.training.blocks import block_labels, label_mask
from dflash_train.training.losses import LossSettings, block_loss, fixed_weights


class OurStep:
    """Packed documents, structured attention, head and loss in chunks."""

    def __init__(self, case: Case) -> None:
        """Build drafter and batch from the case."""
        self.case = case
        self.config = drafter_config(case.shapes)
        self.drafter = Drafter(self.config).train()
        self.drafter.load_state_dict(case.weights)
        self.parameters = list(self.drafter.parameters())
        self.head = FrozenHead(embedding_weight=case.embedding, lm_head_weight=case.embedding)
        self.batch = training_batch(case)
        loss = LossConfig(decay_gamma=DECAY_GAMMA)
        self.settings = LossSettings(
            loss=loss,
            slot_weights=fixed_weights(loss, self.config),
            chunk=TrainingConfig.head_chunk,
        )

    def loss(self) -> Tensor:
        """Give the trainer's loss with its graph."""
        terms = block_loss(
            self.hidden(),
            self.batch,
            self.drafter.output_head(self.head),
            drafter=self.drafter,
            settings=self.settings,
        )
        return terms.loss_sum / self.batch.weight_sum(self.settings.slot_weights).item()

    def hidden(self) -> Tensor:
        """Run the drafter: `[A, K, E]`."""
        embeddings = block_embeddings(
            self.head,
            self.batch.anchor_ids,
            num_slots=self.config.block_size,
            config=self.config,
        )
        return self.drafter(embeddings, self.batch.target_features, self.batch.blocks)

    @torch.no_grad()
    def slot_losses(self) -> Tensor:
        """Give `[A, K]`, the cross entropy of the token at every slot's place in the row."""
        labels_AK = packed_labels(self.case)
        logits = self.drafter.logits(self.hidden().flatten(0, 1), self.head)
        return F.cross_entropy(logits, labels_AK.flatten(), reduction="none").view_as(labels_AK)


def drafter_config(shapes: Shapes) -> DrafterConfig:
    """Give the plain drafter of these shapes."""
    return DrafterConfig(
        hidden_size=shapes.hidden_size,
        intermediate_size=shapes.intermediate_size,
        num_hidden_layers=shapes.num_hidden_layers,
        num_attention_heads=shapes.num_attention_heads,
        num_key_value_heads=shapes.num_key_value_heads,
        head_dim=shapes.head_dim,
        vocab_size=shapes.vocab_size,
        max_position_embeddings=max(8192, shapes.document_tokens + shapes.block_size),
        block_size=shapes.block_size,
        mask_token_id=shapes.mask_token_id,
        target_layer_ids=spread_target_layer_ids(shapes.num_target_layers, shapes.num_taps),
        num_target_layers=shapes.num_target_layers,
        rms_norm_eps=shapes.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shapes.rope_theta},
    )


def training_batch(case: Case) -> TrainingBatch:
    """Lay the case out as `collate` does: each document keeps the rows its blocks can see."""
    shapes = case.shapes
    rows = list(
        zip(
            case.features.split(shapes.document_tokens),
            case.input_ids.split(shapes.document_tokens),
            case.loss_mask.split(shapes.document_tokens),
            case.anchors,
            strict=True,
        )
    )
    lengths = torch.tensor([0, *(int(anchors[-1]) for *_, anchors in rows)])
    blocks = [0, *(len(anchors) for *_, anchors in rows)]
    size = shapes.block_size
    return TrainingBatch(
        target_features=torch.cat([features[: int(at[-1])] for features, _, _, at in rows]),
        blocks=Blocks(
            context_offsets=lengths.cumsum(0).tolist(),
            block_offsets=torch.tensor(blocks).cumsum(0).tolist(),
            anchor_positions=case.anchors.flatten(),
        ),
        anchor_ids=case.input_ids[case.packed_anchors],
        labels=torch.cat([block_labels(ids, at, size) for _, ids, _, at in rows]),
        label_mask=torch.cat([label_mask(mask, at, size) for _, _, mask, at in rows]),
        num_tokens=shapes.num_tokens,
    )
