"""What `bench_kernels` compares: the inputs of each op and everybody who computes it.

A contender is a function without arguments that gives its outputs with their graph; what it needs
beside the inputs, such as a block mask, is built before the clock starts. Legend: A blocks, K
slots, T context rows, H heads, G kv heads, D head dim, S labelled slots, E hidden size, V
vocabulary, N layers.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dflash_train.config import LossConfig
from dflash_train.drafter.block_attention import Blocks, ContextKV
from dflash_train.drafter.config import Visibility
from dflash_train.drafter.context import RawContext
from dflash_train.ops import TORCH_OPS, TRITON_OPS, Ops
from dflash_train.training.head_tiles import HeadSettings, SlotTargets

OURS, TWIN, FLEX, LIGER = "ours", "torch twin", "FlexAttention", "Liger"
Contender = Callable[[], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The defaults are Qwen3-8B's, with a drafter of 5 layers."""

    num_blocks: int = 512
    num_slots: int = 16
    num_tokens: int = 4096
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    hidden_size: int = 4096
    vocab_size: int = 151_936
    num_layers: int = 5


@dataclass(kw_only=True)
class Case:
    """One op with its inputs and contenders."""

    op: str
    inputs: list[Tensor]
    """What gradients are wanted of."""
    contenders: dict[str, Contender]

    def gradients(self, outputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
        """Run the backward pass alone; the graph stays."""
        return list(torch.autograd.grad(outputs, self.inputs, upstream, retain_graph=True))


CaseOf = Callable[[Sizes, torch.device, torch.dtype], Case]


def attention_case(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    """Attend from A blocks, anchors drawn from one document as in training."""
    a, k, t, g, d = (
        sizes.num_blocks, sizes.num_slots, sizes.num_tokens, sizes.num_kv_heads, sizes.head_dim,
    )  # fmt: skip
    shapes = [(a, k, sizes.num_heads, d), (t, g, d), (t, g, d), (a, k, g, d), (a, k, g, d)]
    inputs = [_randn(shape, device, dtype) for shape in shapes]
    drawn = torch.randperm(t, generator=torch.Generator().manual_seed(0))[:a]
    blocks = Blocks(
        context_offsets=[0, t],
        block_offsets=[0, a],
        anchor_positions=drawn.sort().values.to(device),
    )

    def attend(ops: Ops) -> list[Tensor]:
        q, context_k, context_v, own_k, own_v = inputs
        context = ContextKV(context_k, context_v)
        # A fresh layout each time: building the schedule is part of the work.
        own = replace(blocks)
        return [ops.block_attention(q, context, own_k, own_v, blocks=own, visibility=Visibility())]

    contenders = _ours_and_twin(attend)
    contenders[FLEX] = functools.partial(_flex, inputs, _block_mask(blocks, k, t))
    return Case(op="block_attention", inputs=inputs, contenders=contenders)


def _block_mask(blocks: Blocks, num_slots: int, num_tokens: int) -> BlockMask:
    """Give FlexAttention's mask of the visibility rule; keys are the context, then the blocks."""
    anchors = blocks.anchor_positions

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // num_slots
        is_own = (key >= num_tokens) & ((key - num_tokens) // num_slots == block)
        return ((key < num_tokens) & (key < anchors[block])) | is_own

    num_queries = len(anchors) * num_slots
    return create_block_mask(
        is_visible, None, None, num_queries, num_tokens + num_queries, device=anchors.device
    )


def _flex(inputs: list[Tensor], mask: BlockMask) -> list[Tensor]:
    """Attend by FlexAttention; heads first is its layout, so moving them there is its work."""
    is_cpu = inputs[0].device.type == "cpu"  # where torch 2.13 has no backward pass of it
    q, context_k, context_v, own_k, own_v = (each.detach() if is_cpu else each for each in inputs)
    k, v = (
        torch.cat([context, own.flatten(0, 1)]).transpose(0, 1)[None]
        for context, own in ((context_k, own_k), (context_v, own_v))
    )
    attend = flex_attention if is_cpu else _compiled_flex()
    out = attend(q.flatten(0, 1).transpose(0, 1)[None], k, v, block_mask=mask, enable_gqa=True)
    assert isinstance(out, Tensor)
    return [out[0].transpose(0, 1).reshape(q.shape)]


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def cross_entropy_case(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    """Take the cross entropy of all slots but the anchors, summed."""
    num_labels = sizes.num_blocks * (sizes.num_slots - 1)
    hidden = _randn((num_labels, sizes.hidden_size), device, dtype)
    weight = 0.02 * _randn((sizes.vocab_size, sizes.hidden_size), device, dtype)
    weight = weight.detach()  # frozen
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(sizes.vocab_size, (num_labels,), generator=generator).to(device)
    no_teacher = labels.new_zeros((num_labels, 0))
    targets = SlotTargets(
        labels=labels, teacher_ids=no_teacher, teacher_p=no_teacher.to(torch.float32)
    )
    head = HeadSettings(weight=weight, loss=LossConfig())

    def sweep(ops: Ops) -> list[Tensor]:
        return [ops.sweep_head(hidden, targets, head).loss.sum()]

    contenders = _ours_and_twin(sweep)
    if importlib.util.find_spec("liger_kernel") is not None:
        contenders[LIGER] = functools.partial(_liger, hidden, weight, labels)
    return Case(op="block_cross_entropy", inputs=[hidden], contenders=contenders)


def _liger(hidden_SE: Tensor, weight_VE: Tensor, labels_S: Tensor) -> list[Tensor]:
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports] an extra
        LigerFusedLinearCrossEntropyLoss,
    )

    return [LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight_VE, hidden_SE, labels_S)]


def context_case(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    """Norm and rotate the context's keys of all layers."""
    shape = (sizes.num_tokens, sizes.num_kv_heads, sizes.head_dim)
    keys = [_randn(shape, device, dtype) for _ in range(sizes.num_layers)]
    weights = [_randn((sizes.head_dim,), device, torch.float32) for _ in range(sizes.num_layers)]
    turns = torch.arange(sizes.num_tokens)[:, None] / 10 ** torch.linspace(0, 6, shape[2] // 2)
    angles = turns.repeat(1, 2).to(device)
    raw = RawContext(
        keys=keys, values=keys, weights=weights, eps=1e-6,
        cos=angles.cos().to(dtype), sin=angles.sin().to(dtype),
    )  # fmt: skip

    def norm_and_rotate(ops: Ops) -> list[Tensor]:
        return [layer.k for layer in ops.context_kv(raw)]

    return Case(
        op="context_kv", inputs=[*keys, *weights], contenders=_ours_and_twin(norm_and_rotate)
    )


CASES: tuple[CaseOf, ...] = (attention_case, cross_entropy_case, context_case)


def _ours_and_twin(run: Callable[[Ops], list[Tensor]]) -> dict[str, Contender]:
    return {
        OURS: functools.partial(run, TRITON_OPS),
        TWIN: functools.partial(run, TORCH_OPS),
    }


def _randn(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw on the CPU, so that every device has the same numbers."""
    return torch.randn(shape).to(device, dtype).requires_grad_()
