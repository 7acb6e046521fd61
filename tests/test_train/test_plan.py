from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_measure import kept_mib
from benchmarks.live_bytes import live_growth
from dflash_kernels.block_cross_entropy_chunks import chunk_slots
from dflash_train.cli import main
from dflash_train.config import (
    DataConfig,
    LaunchConfig,
    LossConfig,
    OptimConfig,
    OptimizerName,
    PlanConfig,
    Precision,
    RecipeConfig,
    Sharding,
    TargetConfig,
    TrainingConfig,
    compose,
)
from dflash_train.drafter.config import DrafterConfig, spread_target_layer_ids
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.store import FeatureRow, IndexLine
from dflash_train.features.target import Target
from dflash_train.features.target_shape import planned_target_config
from dflash_train.testing import VARIANTS, tiny_drafter
from dflash_train.training.batching import BlockSettings, TrainingBatch, collate
from dflash_train.training.drafter_loss import DrafterLoss
from dflash_train.training.head_tiles import KERNEL_LOGIT_BYTES
from dflash_train.training.losses import LossSettings, block_loss, fixed_weights
from dflash_train.training.optim import build_optimizer
from dflash_train.training.plan import (
    Device,
    Load,
    Loads,
    Plan,
    Setting,
    TargetFacts,
    count_parameters,
    device_named,
    loads_of_features,
    loads_of_recipe,
    make_plan,
    measure_machine,
    plan_memory,
)
from dflash_train.training.plan.devices import peak_flops_of
from dflash_train.training.plan.memory import (
    kept_by_fusion,
    kept_by_layer,
    kept_by_loss,
    logits_of_kernels,
)
from dflash_train.training.plan.work import ATTENTION, HEAD, SELECTOR_CHUNK, micro_batch_parts
from dflash_train.training.variant_losses import _CHUNK

CPU = Setting(is_cpu=True, is_autocast=False, head_bytes=4, stored_bytes=4)
ANCHORS = 24
OPTIM = OptimConfig()
SLOW = Device(
    name="slow", matrix_flops=1e9, batched_flops=5e8, bandwidth=1e9, memory_bytes=1e9, link=1e8
)


@pytest.fixture(scope="module")
def rows(target32: Target, answer_rows: Callable[..., list[FeatureRow]]) -> list[FeatureRow]:
    return answer_rows(target32, [9, 14, 20], max_new_tokens=60)


def as_batch(rows: list[FeatureRow], drafter: DrafterConfig) -> TrainingBatch:
    settings = BlockSettings(
        block_size=drafter.block_size,
        num_anchors=ANCHORS,
        seed=0,
        first_slot=drafter.first_slot,
    )
    return collate(rows, settings, epoch=0)


def load_of(batch: TrainingBatch) -> Load:
    return Load(
        rows=len(batch.blocks.context_offsets) - 1,
        tokens=batch.num_tokens,
        context=len(batch.target_features),
        blocks=len(batch.anchor_ids),
        labels=int(batch.label_mask.sum()),
        pairs=int(batch.blocks.anchor_positions.sum()),
    )


def loss_of(drafter: Drafter, batch: TrainingBatch, target: Target) -> Tensor:
    config = drafter.config
    embeddings = block_embeddings(
        target.head, batch.anchor_ids, num_slots=config.block_size, config=config
    )
    hidden = drafter(embeddings, batch.target_features, batch.blocks)
    settings = LossSettings(
        loss=LossConfig(), slot_weights=fixed_weights(LossConfig(), config), chunk=1024
    )
    head = drafter.output_head(target.head)
    return block_loss(hidden, batch, head, drafter=drafter, settings=settings).loss_sum


def plan_of(config: RecipeConfig, *, device: Device = SLOW, is_cpu: bool = False) -> Plan:
    target = planned_target_config(config.target)
    drafter = DrafterConfig.for_target(config.drafter, target)
    return make_plan(
        config,
        drafter,
        target=TargetFacts.of(target, num_label_ids=None),
        loads=loads_of_recipe(config, drafter),
        device=device,
        is_cpu=is_cpu,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_drafter(variant: str, target32: Target):
    drafter = tiny_drafter(target32, **VARIANTS[variant])
    counted = count_parameters(drafter.config, OptimConfig())
    assert counted.total == sum(p.numel() for p in drafter.parameters())
    assert counted.per_layer == sum(p.numel() for p in drafter.layers[0].parameters())
    assert counted.total == counted.fusion + 2 * counted.per_layer + counted.heads
    assert counted.moments == 2 * counted.total


def test_muon_keeps_one_moment_of_a_matrix(target32: Target):
    drafter = tiny_drafter(target32)
    matrices = sum(p.numel() for p in drafter.parameters() if p.ndim == 2)
    counted = count_parameters(drafter.config, OptimConfig(name=OptimizerName.muon))
    assert counted.moments == 2 * counted.total - matrices


@pytest.mark.parametrize(("name", "billions"), [("Qwen/Qwen3-8B", 1.05), ("Qwen/Qwen3-4B", 0.54)])
def test_the_papers_drafters_have_their_published_size(name: str, billions: float):
    plan = plan_of(compose(["recipe=qwen3", f"target.name_or_path={name}"]))
    assert plan.parameters.total / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize(
    "variant", ["plain", "sliding_causal", "biased", "dflash2", "dspark", "reduced"]
)
def test_kept_memory_is_what_autograd_keeps(variant: str, target32: Target, rows: list[FeatureRow]):
    drafter = tiny_drafter(target32, block_size=8, **VARIANTS[variant])
    batch = as_batch(rows, drafter.config)
    load = load_of(batch)
    planned = (
        kept_by_fusion(drafter.config, load, CPU)
        + 2 * kept_by_layer(drafter.config, load, CPU)
        + kept_by_loss(drafter.config, load)
    )
    found = 2**20 * kept_mib(lambda: loss_of(drafter, batch, target32), list(drafter.parameters()))
    # Masks and indices, a few bytes a slot, show at a width of 32.
    assert planned == pytest.approx(found, rel=0.06)


def test_kept_memory_grows_by_the_formula_per_slot(target32: Target, rows: list[FeatureRow]):
    drafter = tiny_drafter(target32)
    found, planned = [], []
    for number in (1, 2, 3):
        batch = as_batch(rows[:number], drafter.config)
        load = load_of(batch)
        kept = kept_mib(lambda batch=batch: drafter_hidden(drafter, batch, target32),
                        list(drafter.parameters()))  # fmt: skip
        found.append(2**20 * kept)
        planned.append(
            kept_by_fusion(drafter.config, load, CPU)
            + 2 * kept_by_layer(drafter.config, load, CPU)
            + load.blocks * drafter.config.block_size * (drafter.config.hidden_size + 1) * 4
        )
    growth = [(b - a, d - c) for a, b, c, d in zip(found, found[1:], planned, planned[1:],
                                                   strict=False)]  # fmt: skip
    for one, other in growth:
        assert other == pytest.approx(one, rel=0.06)


def drafter_hidden(drafter: Drafter, batch: TrainingBatch, target: Target) -> Tensor:
    embeddings = block_embeddings(
        target.head, batch.anchor_ids, num_slots=drafter.config.block_size, config=drafter.config
    )
    return drafter(embeddings, batch.target_features, batch.blocks)


@pytest.mark.parametrize("variant", ["plain", "biased", "dflash2", "reduced"])
def test_products_are_those_that_torch_counts(
    variant: str, target32: Target, rows: list[FeatureRow]
):
    drafter = tiny_drafter(target32, block_size=8, **VARIANTS[variant])
    batch = as_batch(rows, drafter.config)
    with FlopCounterMode(display=False) as counter:
        loss_of(drafter, batch, target32).backward()
    parts = micro_batch_parts(
        drafter.config, load_of(batch), CPU, head_rows=drafter.config.num_output_ids
    )
    planned = sum(part.flops for part in parts)
    # A group of blocks meets the rows of its last anchor, so attention computes a little more.
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.08)


WIDE_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"final_logit_softcapping": 30.0},
    "dflash2": {
        "conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 32, "selector_top_k": 8,
    },
    "dspark": {"markov_rank": 32, "has_confidence_head": True},
}  # fmt: skip


def wide_drafter(variant: str) -> DrafterConfig:
    """Give a shape so wide that masks and indices do not show."""
    return DrafterConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=2000,
        max_position_embeddings=8192,
        block_size=8,
        mask_token_id=1999,
        target_layer_ids=spread_target_layer_ids(30, 5),
        num_target_layers=30,
        **WIDE_VARIANTS[variant],
    )


def wide_rows(shape: DrafterConfig, *, number: int) -> list[FeatureRow]:
    return [
        FeatureRow(
            id=str(place),
            tenant=None,
            session=None,
            input_ids=torch.randint(1990, (100,)),
            loss_mask=torch.arange(100) >= 25,
            features=torch.randn(100, shape.num_taps * shape.hidden_size).bfloat16(),
            max_length=100,
            finish_reason="length",
        )
        for place in range(number)
    ]


def step_growth(
    shape: DrafterConfig, batch: TrainingBatch, launch: LaunchConfig, *, is_autocast: bool
) -> int:
    """Count what a second optimiser step holds at its peak, the batch apart."""
    drafter = Drafter(shape)
    table = torch.randn(shape.vocab_size, shape.hidden_size)
    head = FrozenHead(embedding_weight=table, lm_head_weight=table)
    settings = LossSettings(
        loss=LossConfig(), slot_weights=fixed_weights(LossConfig(), shape), chunk=1024
    )
    model, optimizer = DrafterLoss(drafter, head, launch=launch), build_optimizer(drafter, OPTIM)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if is_autocast else nullcontext():
            loss_sum, _ = model(batch, drafter.output_head(head), settings)
        loss_sum.backward()
        nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    return live_growth(step)


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize(
    ("variant", "number", "recomputes"),
    [
        ("plain", 4, False), ("plain", 1, False), ("plain", 9, False), ("plain", 4, True),
        ("capped", 4, False), ("dflash2", 4, False), ("dspark", 4, False),
    ],
)  # fmt: skip
def test_a_step_grows_by_what_is_planned(
    variant: str, number: int, recomputes: bool, is_autocast: bool
):
    shape, launch = wide_drafter(variant), LaunchConfig(activation_checkpointing=recomputes)
    batch = as_batch(wide_rows(shape, number=number), shape)
    found = step_growth(shape, batch, launch, is_autocast=is_autocast)
    config = RecipeConfig(
        name="wide",
        target=TargetConfig(name_or_path="random"),
        training=TrainingConfig(max_steps=10),
        launch=launch,
    )
    planned = plan_memory(
        config,
        shape,
        load=load_of(batch),
        parameters=count_parameters(shape, OPTIM),
        setting=replace(
            CPU, is_cpu=not is_autocast, is_autocast=is_autocast, recomputes_layers=recomputes
        ),
        head_rows=shape.vocab_size,
        is_tied=True,
        target_parameters=0,
    )
    growth = planned.growth - planned.features
    if is_autocast:  # the bf16 copies are made within the step
        growth += planned.weights
    assert growth == pytest.approx(found, rel=0.08)


def test_a_part_timed_as_a_whole_is_not_counted_by_its_pieces():
    config = compose(["recipe=qwen3"])
    slow, rates = plan_of(config), {ATTENTION: 1e8, HEAD: 1e8}
    whole = plan_of(config, device=replace(SLOW, whole_rates=rates))
    for one, other in zip(slow.parts, whole.parts, strict=True):
        seconds = other.seconds(whole.device, link=1.0)
        if one.name in rates:
            assert seconds == pytest.approx(one.flops / 1e8 + one.moved / SLOW.bandwidth)
        else:
            assert seconds == one.seconds(SLOW, link=1.0)


def test_the_plan_knows_the_chunk_of_the_selector():
    assert SELECTOR_CHUNK == _CHUNK


def test_loads_of_features_are_those_of_the_batches(
    tmp_path: Path, target32: Target, rows: list[FeatureRow], tiny_recipe
):
    drafter = tiny_drafter(target32).config
    config = tiny_recipe(tmp_path, num_anchors=ANCHORS, pack_tokens=1024)
    lines = [
        IndexLine(
            id=row.id, tenant=None, session=None, shard="", row=0,
            num_tokens=len(row.input_ids), prompt_length=row.prompt_length,
            max_length=row.max_length, finish_reason=row.finish_reason, weight=1,
        )
        for row in rows
    ]  # fmt: skip
    expected = loads_of_features(lines, config, drafter)
    found = load_of(as_batch(rows, drafter))
    assert expected.mean == expected.largest
    assert expected.mean.blocks == found.blocks
    assert expected.mean.tokens == found.tokens
    for name in ("context", "labels", "pairs"):
        assert getattr(expected.mean, name) == pytest.approx(getattr(found, name), rel=0.1)


def test_a_recipe_without_features_is_planned_for_its_longest_rows():
    config = compose(["recipe=qwen3"])
    drafter = DrafterConfig.for_target(config.drafter, planned_target_config(config.target))
    longest: Loads = loads_of_recipe(config, drafter)
    assert (longest.mean.rows, longest.mean.blocks) == (1, 512)
    shorter = loads_of_recipe(replace(config, plan=PlanConfig(row_tokens=600)), drafter)
    assert shorter.mean.rows == 5
    assert shorter.mean.blocks > 3 * 512


def test_sharding_divides_what_it_names():
    config = compose(["recipe=qwen3", "plan.num_gpus=8"])
    plans = {
        sharding: plan_of(replace(config, plan=PlanConfig(num_gpus=8, sharding=sharding))).memory
        for sharding in Sharding
    }
    none, zero2, zero3 = (plans[sharding] for sharding in Sharding)
    assert zero2.gradients == none.gradients / 8
    assert zero2.masters == none.masters / 8
    assert zero2.weights == none.weights
    assert zero3.weights == none.weights / 8
    assert zero3.peak < zero2.peak < none.peak


def test_recomputed_layers_take_less_memory_and_more_time():
    config = compose(["recipe=qwen3"])
    kept = plan_of(config)
    launch = LaunchConfig(mixed_precision=Precision.bf16, activation_checkpointing=True)
    recomputed = plan_of(replace(config, launch=launch))
    assert recomputed.memory.activations < 0.5 * kept.memory.activations
    assert recomputed.memory.peak < kept.memory.peak
    assert recomputed.step_seconds > kept.step_seconds
    assert recomputed.model_flops == pytest.approx(kept.model_flops)


def test_time_follows_the_rates_of_the_hardware():
    config = compose(["recipe=qwen3", "plan.num_gpus=1"])  # so nothing is sent
    slow = plan_of(config)
    fast = plan_of(
        config,
        device=replace(SLOW, matrix_flops=2e9, batched_flops=1e9, bandwidth=2e9),
    )
    assert fast.step_seconds == pytest.approx(slow.step_seconds / 2)
    assert slow.days == pytest.approx(10_000 * slow.step_seconds / 86_400)


def test_an_unknown_gpu_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"plan\.gpu \(=z9\).*h100"):
        device_named("z9", is_bf16=True)


def test_a_gpu_is_known_by_its_drivers_name():
    assert peak_flops_of("NVIDIA H100 80GB HBM3", is_bf16=True) == 989e12
    assert peak_flops_of("NVIDIA GeForce RTX 4090", is_bf16=True) == 165.2e12
    assert peak_flops_of("Some Other Card", is_bf16=True) is None


def test_this_machine_is_measured(target32: Target):
    drafter = tiny_drafter(target32).config
    load = Load(rows=1, tokens=64, context=40, blocks=8, labels=20, pairs=160)
    device = measure_machine(drafter, load, LaunchConfig(num_threads=1))
    assert min(device.matrix_flops, device.batched_flops, device.bandwidth) > 0
    assert min(device.whole_rates[name] for name in (ATTENTION, HEAD)) > 0


def test_online_features_add_the_targets_pass():
    config = compose(["recipe=qwen3"])
    online = compose(["recipe=qwen3", "data.features=online"])
    assert isinstance(online.data, DataConfig)
    names = [part.name for part in plan_of(online).parts]
    assert "target" in names
    assert "target" not in [part.name for part in plan_of(config).parts]


def test_a_mixture_computes_with_the_experts_that_a_token_meets():
    config = compose(["recipe=qwen3_coder"])
    facts = TargetFacts.of(planned_target_config(config.target), num_label_ids=None)
    assert facts.num_layers_parameters / 1e9 == pytest.approx(29.9, abs=0.5)
    assert facts.num_active_parameters / 1e9 == pytest.approx(2.7, abs=0.4)


def test_dry_run_of_train_needs_neither_features_nor_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["train", "recipe=qwen3", f"runs_dir={tmp_path}", "plan.gpu=h100", "plan.num_gpus=8"]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    for word in ("8 x h100", "parameters: 1,0", "memory:", "disk:", "TFLOP", "days", "MFU"):
        assert word in said
    assert not list(tmp_path.iterdir())


def test_training_without_features_names_the_stage_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", "recipe=qwen3", f"runs_dir={tmp_path}"]) == 2
    assert "dflash-train collect" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_rows", [32_000, 151_936, 262_144])
def test_the_kernels_chunk_of_logits_is_planned_as_they_cut_it(dtype: torch.dtype, head_rows: int):
    slots = chunk_slots(head_rows, dtype, KERNEL_LOGIT_BYTES)
    number = 4 if dtype == torch.float32 else 4 + 2  # gradients of float32 replace their logits
    given = {"head_rows": head_rows, "head_bytes": dtype.itemsize}
    assert logits_of_kernels(10**6, **given) == slots * head_rows * number
    assert logits_of_kernels(slots // 2, **given) == slots // 2 * head_rows * number


def test_a_gpu_plan_holds_the_kernels_logits_unless_torch_is_chosen():
    recipe = ["recipe=qwen3", "target.name_or_path=Qwen/Qwen3-8B"]
    kernels, torchs = (
        plan_of(compose([*recipe, f"launch.kernels={choice}"])) for choice in ("auto", "torch")
    )
    assert kernels.memory.working > torchs.memory.working
    cpu = [
        plan_of(compose([*recipe, f"launch.kernels={choice}"]), is_cpu=True).memory
        for choice in ("auto", "torch")
    ]
    assert cpu[0] == cpu[1]
