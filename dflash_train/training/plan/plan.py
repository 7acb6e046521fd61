"""The whole plan of a training run, and the lines that say it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dflash_train.config import FeaturesDtype, FeaturesFrom, Precision, RecipeConfig
from dflash_train.drafter.config import DrafterConfig
from dflash_train.features.store import IndexLine
from dflash_train.training.plan.devices import Device, peak_flops_of
from dflash_train.training.plan.load import Loads, loads_of_features
from dflash_train.training.plan.memory import FLOAT, Memory, Setting, plan_memory
from dflash_train.training.plan.parameters import Parameters, count_parameters
from dflash_train.training.plan.work import (
    Part,
    link_of,
    micro_batch_parts,
    step_parts,
    target_part,
)

GIB = 2**30
_FEATURE_BYTES = {
    FeaturesDtype.float32: 4,
    FeaturesDtype.bfloat16: 2,
    FeaturesDtype.float8_e4m3fn: 1,
}
_SAMPLED_SHARE = 0.25
"""Share of the vocabulary taken for labels where `head_sample` asks for them and no row is there
to count; SmolLM2's demo has 0.2."""
_LOOKED_AT = 256
"""Rows of a run that stand for all where operations of a block are counted."""


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    """What a plan must know of the target beside the drafter's shape."""

    is_tied: bool
    """Its embedding is its head."""
    num_layers_parameters: int = 0
    """Parameters that the training process holds beside embedding and head."""
    num_active_parameters: int = 0
    """Of them, those that one token meets: of a mixture, the experts that it is sent to."""
    num_label_ids: int | None = None
    """Ids that some training row has as a label; None where no row is there to count."""

    @classmethod
    def of(cls, target: PreTrainedConfig, *, num_label_ids: int | None) -> "TargetFacts":
        """Count a target without its weights, on torch's `meta` device.

        Args:
            target: Its text configuration.
            num_label_ids: See the field.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(target)
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        outside = {id(p) for table in tables if table is not None for p in table.parameters()}
        inner = [(name, p.numel()) for name, p in model.named_parameters() if id(p) not in outside]
        experts = sum(size for name, size in inner if ".experts." in name)
        total = sum(size for _, size in inner)
        idle = 1 - _share_of_experts(target)
        return cls(
            is_tied=len(outside) == 1,
            num_layers_parameters=total,
            num_active_parameters=round(total - idle * experts),
            num_label_ids=num_label_ids,
        )


def _share_of_experts(target: PreTrainedConfig) -> float:
    """Give the share of a mixture's experts that a token meets; 1 where there is no mixture."""
    values = target.to_dict()
    count = values.get("num_experts") or values.get("num_local_experts")
    chosen = values.get("num_experts_per_tok")
    return chosen / count if count and chosen else 1.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training run takes on given hardware."""

    name: str
    """Of the run."""
    parameters: Parameters
    loads: Loads
    memory: Memory
    parts: list[Part]
    """Of one optimiser step on one process."""
    device: Device
    ranks: int
    num_steps: int | None
    """Of the run; None where the recipe gives minutes."""
    accumulation_steps: int
    link: float
    """Bytes per second between processes."""
    token_bytes: float
    """Disk that features of one token take."""
    state_bytes: float
    """Disk that train states and checkpoints take."""

    @property
    def step_seconds(self) -> float:
        """Seconds of one optimiser step, validations and saves left out."""
        return sum(part.seconds(self.device, link=self.link) for part in self.parts)

    @property
    def model_flops(self) -> float:
        """Operations of one step on one process, those done twice counted once."""
        return sum(part.flops - part.repeated for part in self.parts)

    @property
    def flops_per_block(self) -> float:
        """The same for one block: what MFU is counted with."""
        return self.model_flops / (self.loads.mean.blocks * self.accumulation_steps)

    @property
    def days(self) -> float | None:
        """Days of all steps; None where the recipe gives minutes."""
        return None if self.num_steps is None else self.num_steps * self.step_seconds / 86_400

    def lines(self) -> Iterator[str]:
        """Yield it as lines to print."""
        yield f"plan of {self.name} for {self.ranks} x {self.device.name}"
        counted = self.parameters
        yield (
            f"parameters: {counted.total:,} (layers {counted.layers:,}"
            f", fc and norms {counted.fusion:,}, heads {counted.heads:,})"
        )
        load = self.loads.mean
        yield f"rows: {self.loads.source}"
        yield (
            f"micro-batch: {load.tokens:,.0f} tokens, {load.blocks:,.0f} blocks, "
            f"{load.labels:,.0f} labels; {self.accumulation_steps} a step and process"
        )
        yield from self._memory_lines()
        yield (
            f"disk: {_gib(self.state_bytes)} of train states and checkpoints; features "
            f"{self.token_bytes:,.0f} bytes a token, {_gib(1e6 * self.token_bytes)} a million"
        )
        yield from self._time_lines()

    def _memory_lines(self) -> Iterator[str]:
        memory = self.memory
        fits = "fits" if memory.peak < self.device.memory_bytes else "DOES NOT FIT"
        yield (
            f"memory: {_gib(memory.peak)} at its peak on each, of "
            f"{_gib(self.device.memory_bytes)}: {fits}; torch's own bytes, so not "
            "what libraries set up (a CPU: compiled products) nor what the allocator keeps free"
        )
        for field in fields(Memory):
            if field.name != "growth" and getattr(memory, field.name):
                yield f"  {field.name:<14}{_gib(getattr(memory, field.name)):>12}"

    def _time_lines(self) -> Iterator[str]:
        total = self.step_seconds
        flops = sum(part.flops for part in self.parts)
        yield f"work of a step on each: {flops / 1e12:,.3f} TFLOP in products"
        for part in self.parts:
            seconds = part.seconds(self.device, link=self.link)
            yield (
                f"  {part.name:<14}{part.flops / 1e12:>12,.3f} TFLOP"
                f" {part.all_moved / 1e9:>10,.2f} GB {seconds:>10.4f} s {seconds / total:>5.0%}"
            )
        peak = self.device.peak_flops
        share = "" if peak is None else f", MFU {self.model_flops / total / peak:.0%}"
        yield f"time: {total:.3f} s a step{share}; validations and saves are not in it"
        if self.days is not None:
            hours = 24 * self.days
            yield f"run: {self.num_steps:,} steps, {hours:,.1f} hours, {self.days:,.2f} days"


def make_plan(
    config: RecipeConfig, drafter: DrafterConfig, *, target: TargetFacts, loads: Loads,
    device: Device, is_cpu: bool,
) -> Plan:  # fmt: skip
    """Make the plan of a recipe.

    Args:
        config: The recipe.
        drafter: The drafter's shape.
        target: The rest of the target.
        loads: Micro-batches, counted or expected.
        device: The hardware.
        is_cpu: It is a processor: float32 throughout.
    """
    parameters = count_parameters(drafter, config.optim)
    setting = Setting.of(config, is_cpu=is_cpu)
    head_rows = rows_of_head(config, drafter, target)
    training = config.training
    parts = step_parts(
        drafter, load=loads.mean, parameters=parameters, setting=setting, head_rows=head_rows,
        accumulation_steps=training.accumulation_steps,
        keeps_average=training.ema_decay is not None,
    )  # fmt: skip
    is_online = config.data.features is FeaturesFrom.online
    if is_online:
        one = target_part(
            target.num_active_parameters,
            load=loads.mean,
            accumulation_steps=training.accumulation_steps,
        )
        parts.insert(1, one)
    states = (training.keep_states + 1) * FLOAT * (parameters.total + parameters.moments)
    bytes_of_feature = _FEATURE_BYTES[config.data.features_dtype]
    return Plan(
        name=config.name,
        parameters=parameters,
        loads=loads,
        memory=plan_memory(
            config, drafter, load=loads.largest, parameters=parameters, setting=setting,
            head_rows=head_rows, is_tied=target.is_tied,
            target_parameters=target.num_layers_parameters if is_online else 0,
        ),
        parts=parts,
        device=device,
        ranks=config.plan.num_gpus,
        num_steps=training.max_steps,
        accumulation_steps=training.accumulation_steps,
        link=link_of(device, ranks=config.plan.num_gpus),
        token_bytes=drafter.num_taps * drafter.hidden_size * bytes_of_feature
        + 8 * config.data.teacher_top_k,
        state_bytes=states + 2 * FLOAT * parameters.total,
    )  # fmt: skip


def run_flops_per_block(
    config: RecipeConfig,
    drafter: DrafterConfig,
    lines: Sequence[IndexLine],
    *,
    head_rows: float,
) -> float:
    """Give the operations of one training block of a run, those done twice counted once.

    Args:
        config: The recipe.
        drafter: The drafter's shape.
        lines: Index of the training split; its first rows stand for all.
        head_rows: Rows of the head that the softmax runs over.
    """
    load = loads_of_features(lines, config, drafter, most_rows=_LOOKED_AT).mean
    setting = Setting.of(config, is_cpu=True)  # formats do not change what is computed
    parts = micro_batch_parts(drafter, load, setting, head_rows=head_rows)
    return sum(part.flops - part.repeated for part in parts) / load.blocks


def peak_flops_of_run(device: torch.device, *, config: RecipeConfig, ranks: int) -> float | None:
    """Give what the GPUs of a run could compute per second, None if that is not known."""
    if device.type != "cuda":
        return None
    one = peak_flops_of(torch.cuda.get_device_name(device), is_bf16=is_bf16(config))
    return None if one is None else one * ranks


def rows_of_head(config: RecipeConfig, drafter: DrafterConfig, target: TargetFacts) -> float:
    """Give the rows of the head that a step's softmax runs over."""
    if config.training.head_sample == 0:
        return drafter.num_output_ids
    labels = target.num_label_ids or _SAMPLED_SHARE * drafter.vocab_size
    return min(drafter.vocab_size, labels + config.training.head_sample)


def is_bf16(config: RecipeConfig) -> bool:
    """Tell whether products on a GPU take bfloat16."""
    return config.launch.mixed_precision is Precision.bf16


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f} GiB"
