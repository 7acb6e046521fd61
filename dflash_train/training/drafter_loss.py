"""From a micro-batch to its loss, as one module: what accelerate wraps.

FSDP2 and ZeRO-3 hold a shard of each weight and gather it while the module that owns it runs. So
everything that reads weights, the heads of variants included, happens inside this forward pass; the
target's frozen embedding and head are no parameters and stay whole. Wrappers find their way back
through the tensors that a forward pass gives, hence a plain pair of tensors.
"""

import torch
from torch import Tensor, nn

from dflash_train.config import LaunchConfig
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.training.accelerator import Accelerator, unwrapped, whole_weights
from dflash_train.training.batching import TrainingBatch
from dflash_train.training.losses import LossSettings, block_loss


class DrafterLoss(nn.Module):
    """A drafter with its loss."""

    def __init__(self, drafter: Drafter, head: FrozenHead, *, launch: LaunchConfig) -> None:
        """Keep the drafter, and run its layers as the launch asks.

        Args:
            drafter: What is trained; not copied.
            head: The target's embedding and LM head, on the device of the run.
            launch: Whether layers are compiled, and computed again in the backward pass; whose
                operations run.

        Raises:
            ValueError: `launch.kernels` demands Triton, which cannot run.
        """
        super().__init__()
        self.drafter = drafter
        self.head = head
        drafter.recomputes_layers = launch.activation_checkpointing
        drafter.kernels = launch.kernels
        drafter.ops(head.lm_head_weight)  # a demand that cannot be met is refused before any work
        if launch.compile:
            for layer in drafter.layers:
                layer.compile(dynamic=True)  # packs have no fixed length

    @property
    def dtype(self) -> torch.dtype:
        """Number format that the weights have inside the forward pass.

        That is bf16 where a wrapper gathers float32 shards as bf16, and float32 under autocast.
        """
        return self.drafter.fc.weight.dtype

    def forward(
        self, batch: TrainingBatch, output_head: FrozenHead, settings: LossSettings
    ) -> tuple[Tensor, Tensor]:
        """Give the loss of a micro-batch and what it counted.

        Args:
            batch: On any device.
            output_head: Rows that the softmax runs over.
            settings: How hidden states become a loss.

        Returns:
            The scalar sum(m * w * l) with its graph, to be divided by the step's Z, and
            `TrainingCounts.to_tensor`.
        """
        batch = batch.to(self.head.lm_head_weight.device, dtype=self.dtype)
        hidden_AKE = self._hidden(batch)
        # Sums over the vocabulary are kept in float32 by the sweep itself; autocast must not.
        with torch.autocast(hidden_AKE.device.type, enabled=False):
            terms = block_loss(
                hidden_AKE.to(self.dtype),
                batch,
                output_head,
                drafter=self.drafter,
                settings=settings,
            )
        return terms.loss_sum, terms.counts.to_tensor()

    def _hidden(self, batch: TrainingBatch) -> Tensor:
        config = self.drafter.config
        embeddings = block_embeddings(
            self.head, batch.anchor_ids, num_slots=config.block_size, config=config
        )
        return self.drafter(embeddings.to(self.dtype), batch.target_features, batch.blocks)


def bare_drafter(accelerator: Accelerator, model: nn.Module) -> Drafter:
    """Give the drafter inside a prepared `DrafterLoss`; its weights may be parts."""
    inner = unwrapped(accelerator, model)
    assert isinstance(inner, DrafterLoss)
    return inner.drafter


def whole_drafter(accelerator: Accelerator, model: nn.Module) -> Drafter:
    """Give the drafter with all its weights on every process, which all call this.

    Args:
        accelerator: Has prepared the model.
        model: A `DrafterLoss`, as prepared.

    Returns:
        The trained drafter itself where no launch has sharded it, else a copy as it stands.
    """
    bare = bare_drafter(accelerator, model)
    weights = whole_weights(accelerator, model)
    if weights is None:
        return bare
    own = {name.removeprefix("drafter."): each for name, each in weights.items()}
    own |= {name: each for name, each in bare.named_buffers() if name in bare.state_dict()}
    with torch.random.fork_rng():
        copy = Drafter(bare.config).to(own["fc.weight"].dtype)
    copy.load_state_dict(own)
    copy.kernels = bare.kernels
    return copy.to(accelerator.device).train(bare.training)
