"""Whose operations run: Triton's kernels where the device has them, else torch's.

Every operation has a definition in torch, and three have a Triton kernel beside it. A model or loss
asks `choose_ops` with its device in each pass and hands the answer on, so that no module remembers
a choice: a drafter that moves to a GPU finds its kernels there. The first answer of each kind is
told on stderr. This is the only module that imports `dflash_kernels`, and only where it is used, so
that everything else works without Triton.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

from dflash_train.config import KernelChoice
from dflash_train.drafter.block_attention import Blocks, ContextKV, block_attention
from dflash_train.drafter.config import Visibility
from dflash_train.drafter.context import RawContext, context_kv, write_context_kv
from dflash_train.training.head_sweep import SlotTerms, sweep_head
from dflash_train.training.head_tiles import KERNEL_LOGIT_BYTES, HeadSettings, SlotTargets

OLDEST_CAPABILITY = (8, 0)
"""Ampere, the first with bf16 products."""


_Function = TypeVar("_Function", bound=Callable[..., object])


def _uncompiled(function: _Function) -> _Function:
    """Keep torch.compile out: it would look into schedules, which are no tensors."""
    return cast(_Function, torch.compiler.disable(function))


class Ops(Protocol):
    """The operations that have a Triton kernel; the functions of `TorchOps` define them."""

    def block_attention(
        self, q_AKHD: Tensor, context: ContextKV, block_k_AKGD: Tensor, block_v_AKGD: Tensor, *,
        blocks: Blocks, visibility: Visibility,
    ) -> Tensor:  # fmt: skip
        """Attend from every block to its document's context before the anchor and to itself."""
        ...

    def sweep_head(self, hidden_SE: Tensor, targets: SlotTargets, head: HeadSettings) -> SlotTerms:
        """Give each slot's loss, with the gradient of its hidden state ready for the backward."""
        ...

    def context_kv(self, raw: RawContext) -> list[ContextKV]:
        """Give each layer's normed and rotated keys, and its values, with their graph."""
        ...

    def write_context_kv(self, raw: RawContext, k_NnGD: Tensor, v_NnGD: Tensor) -> None:
        """Write the same into a cache, without a graph."""
        ...


class TorchOps:
    """Torch on any device."""

    block_attention = staticmethod(block_attention)
    sweep_head = staticmethod(sweep_head)
    context_kv = staticmethod(context_kv)
    write_context_kv = staticmethod(write_context_kv)


class TritonOps:
    """Triton's kernels, behind the signatures of torch's operations."""

    @staticmethod
    @_uncompiled
    def block_attention(
        q_AKHD: Tensor,
        context: ContextKV,
        block_k_AKGD: Tensor,
        block_v_AKGD: Tensor,
        *,
        blocks: Blocks,
        visibility: Visibility,
    ) -> Tensor:
        """Attend as `TorchOps` does; `[A, K, H, D]`."""
        from dflash_kernels.block_attention import block_attention

        return block_attention(
            q_AKHD,
            context.k,
            context.v,
            block_k_AKGD,
            block_v_AKGD,
            layout=_kept_layout(blocks),
            is_causal=visibility.is_causal,
            window=visibility.window,
        )

    @staticmethod
    def sweep_head(hidden_SE: Tensor, targets: SlotTargets, head: HeadSettings) -> SlotTerms:
        """Sweep as `TorchOps` does; a multiplier that is not above 0 is torch's."""
        from dflash_kernels.block_cross_entropy import block_cross_entropy

        if head.multiplier <= 0:
            return sweep_head(hidden_SE, targets, head)
        terms = block_cross_entropy(
            hidden_SE,
            weight_VE=head.weight,
            labels_S=targets.labels,
            teacher_ids_Sk=targets.teacher_ids,
            teacher_p_Sk=targets.teacher_p,
            settings=_cross_entropy_settings(head),
        )
        return SlotTerms(
            loss=terms.loss,
            ce=terms.ce,
            is_correct=terms.is_correct,
            overlap=terms.overlap,
            candidates=terms.candidates,
        )

    @staticmethod
    def context_kv(raw: RawContext) -> list[ContextKV]:
        """Norm and rotate as `TorchOps` does, all layers in one launch."""
        from dflash_kernels.context_kv import context_keys

        keys = context_keys(raw.keys, raw.weights, cos_TD=raw.cos, sin_TD=raw.sin, eps=raw.eps)
        return [ContextKV(k, v) for k, v in zip(keys, raw.values, strict=True)]

    @staticmethod
    def write_context_kv(raw: RawContext, k_NnGD: Tensor, v_NnGD: Tensor) -> None:
        """Write as `TorchOps` does, in one launch."""
        from dflash_kernels.context_kv import append_context

        append_context(
            raw.keys,
            raw.values,
            raw.weights,
            cos_nD=raw.cos,
            sin_nD=raw.sin,
            eps=raw.eps,
            out_k_NnGD=k_NnGD,
            out_v_NnGD=v_NnGD,
        )


TORCH_OPS, TRITON_OPS = TorchOps(), TritonOps()


def _kept_layout(blocks: Blocks) -> Any:
    """Give the kernels' `BlockLayout`, one for all layers: it keeps the schedule."""
    from dflash_kernels.block_tiles import BlockLayout

    if "layout" not in blocks.kept:
        blocks.kept["layout"] = BlockLayout(
            context_offsets=blocks.context_offsets,
            block_offsets=blocks.block_offsets,
            anchor_positions=blocks.anchor_positions,
            widths=blocks.widths,
        )
    return blocks.kept["layout"]


def _cross_entropy_settings(head: HeadSettings) -> Any:
    """Give the head and its loss as the kernels' `CrossEntropySettings`."""
    from dflash_kernels.block_cross_entropy import CrossEntropySettings

    loss = head.loss
    return CrossEntropySettings(
        ce=loss.ce,
        kl=loss.kl,
        tv=loss.tv,
        lk_alpha=loss.lk_alpha,
        lk_lambda=loss.lk_lambda,
        lk_eta=loss.lk_eta,
        multiplier=head.multiplier,
        cap=head.cap,
        log_weights=head.log_weights,
        num_candidates=head.num_candidates,
        max_logit_bytes=KERNEL_LOGIT_BYTES,
    )


def choose_ops(choice: KernelChoice, device: torch.device, dtype: torch.dtype) -> Ops:
    """Give the operations that run on a device.

    Args:
        choice: `auto` takes Triton on GPUs where nothing stands against it.
        device: Where the tensors are.
        dtype: Number format of the hidden states.

    Raises:
        ValueError: Triton is demanded and cannot run.
    """
    return _choose(choice, device.type, dtype)


@functools.cache
def _choose(choice: KernelChoice, device_type: str, dtype: torch.dtype) -> Ops:
    if choice is KernelChoice.torch:
        return _told(TORCH_OPS, "torch, as launch.kernels says")
    obstacle = _obstacle(choice, device_type, dtype)
    if obstacle is None:
        place = "its interpreter" if _is_interpreted() else torch.cuda.get_device_name()
        return _told(TRITON_OPS, f"Triton on {place}; torch for the head of DSpark drafters")
    if choice is KernelChoice.triton:
        raise ValueError(f"launch.kernels (=triton): {obstacle}. Set it to auto.")
    return _told(TORCH_OPS, f"torch: {obstacle}")


def _obstacle(choice: KernelChoice, device_type: str, dtype: torch.dtype) -> str | None:
    """Say why Triton's kernels cannot run, if they cannot."""
    is_gpu, is_demanded = device_type == "cuda", choice is KernelChoice.triton  # ROCm's, too
    no_device = f"a {device_type} runs Triton's kernels under TRITON_INTERPRET=1 only, for tests"
    if not is_gpu and not is_demanded:  # said without a look at Triton, which takes a second
        return no_device
    for package, remedy in (("triton", "dflash-train[gpu]"), ("dflash_kernels", "-e .")):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (pip install {remedy!r})"
    if dtype == torch.float64:
        return "the kernels have no float64"
    if _is_interpreted():
        return None if is_demanded else "TRITON_INTERPRET=1 would interpret Triton's kernels"
    if not is_gpu:
        return no_device
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is older than 8.0"
    return None


def _is_interpreted() -> bool:
    from dflash_kernels._launch import is_interpreted

    return is_interpreted()


def _told(ops: Ops, sentence: str) -> Ops:
    _say(sentence)
    return ops


@functools.cache
def _say(sentence: str) -> None:
    """Say it on stderr, once, and from the first process only."""
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if is_first:
        tqdm.write(f"kernels: {sentence}", file=sys.stderr)
