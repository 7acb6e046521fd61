"""Does a plan come true? Memory and time of real training steps beside what `--dry-run` says.

Each size trains on random rows in a process of its own, through the real `Trainer`. Then the same
process times this machine's products and passes, as a plan does, and makes the plan. Memory is what
torch holds, which the plan's formulas count; what the process holds (`resident`) stands beside it:
oneDNN keeps products that it has compiled, one for every new shape, and the C library keeps what
was freed. Run by `make bench-plan` on an idle machine (Linux); the last line is JSON.
"""

import argparse
import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_measure import describe_machine
from benchmarks.live_bytes import live_growth, storages
from dflash_train.config import (
    DrafterSettings,
    LaunchConfig,
    LossConfig,
    Precision,
    RecipeConfig,
    TargetConfig,
    TrainingConfig,
    Weighting,
)
from dflash_train.drafter.config import DrafterConfig, spread_target_layer_ids
from dflash_train.drafter.model import Drafter
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.store import FeatureRow, FeatureStore, write_index, write_shard
from dflash_train.records.manifest import FileEntry, Manifest
from dflash_train.training.accelerator import build_accelerator
from dflash_train.training.plan import (
    Loads,
    Plan,
    TargetFacts,
    loads_of_features,
    make_plan,
    measure_machine,
    resident_bytes,
)
from dflash_train.training.trainer import Trainer

WARM_UP_STEPS, TIMED_STEPS, COUNTED_STEPS = 2, 5, 3
NUM_ROWS = 24
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shapes of one case; one head dim of 64 throughout."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    block_size: int
    num_anchors: int
    row_tokens: int
    pack_tokens: int
    head_sample: int = 0
    is_dflash2: bool = False

    def drafter_config(self) -> DrafterConfig:
        """Give the drafter of a target of 30 layers, with five taps."""
        extra: dict[str, Any] = {
            "conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 128,
            "selector_top_k": 16,
        }  # fmt: skip
        return DrafterConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=64,
            vocab_size=self.vocab_size,
            max_position_embeddings=8192,
            block_size=self.block_size,
            mask_token_id=self.vocab_size - 1,
            target_layer_ids=spread_target_layer_ids(30, 5),
            num_target_layers=30,
            **(extra if self.is_dflash2 else {}),
        )

    def recipe(self, runs_dir: Path) -> RecipeConfig:
        """Give the recipe that trains it."""
        return RecipeConfig(
            name="plan",
            runs_dir=str(runs_dir),
            target=TargetConfig(name_or_path="random"),
            drafter=DrafterSettings(mask_token_id=self.vocab_size - 1),
            training=TrainingConfig(
                max_steps=1_000,
                num_anchors=self.num_anchors,
                pack_tokens=self.pack_tokens,
                head_sample=self.head_sample,
            ),
            loss=LossConfig(weighting=Weighting.dpace),
            launch=LaunchConfig(mixed_precision=Precision.bf16),
        )


SIZES = {
    "small": Size(
        hidden_size=384, intermediate_size=1024, num_layers=2, num_heads=6, num_kv_heads=2,
        vocab_size=16_384, block_size=8, num_anchors=64, row_tokens=256, pack_tokens=1024,
    ),
    "smollm2": Size(
        hidden_size=576, intermediate_size=1536, num_layers=3, num_heads=9, num_kv_heads=3,
        vocab_size=49_152, block_size=8, num_anchors=64, row_tokens=512, pack_tokens=1024,
    ),
    "large": Size(
        hidden_size=768, intermediate_size=2048, num_layers=5, num_heads=12, num_kv_heads=4,
        vocab_size=32_768, block_size=16, num_anchors=64, row_tokens=512, pack_tokens=1024,
    ),
    "demo": Size(
        hidden_size=576, intermediate_size=1536, num_layers=3, num_heads=9, num_kv_heads=3,
        vocab_size=49_152, block_size=8, num_anchors=32, row_tokens=170, pack_tokens=512,
        head_sample=1024, is_dflash2=True,
    ),
}  # fmt: skip
"""The first three are plain drafters; `demo` is like the recipe smollm2: DFlash 2, a sampled
head."""


WARM_UP = replace(
    SIZES["demo"], hidden_size=128, num_heads=2, num_kv_heads=1, vocab_size=2048, head_sample=16
)
"""Small enough not to be seen, and of a kind that calls everything."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A plan and what came of it."""

    size: str
    planned_mib: float
    measured_mib: float
    """Peak of torch's bytes during steps, above those before drafter and head were there."""
    resident_mib: float
    """The same of the process."""
    planned_s: float
    measured_s: float
    """Median of the timed steps."""

    def ratios(self) -> dict[str, float]:
        """Give planned over measured."""
        return {
            "memory": round(self.planned_mib / self.measured_mib, 3),
            "resident": round(self.planned_mib / self.resident_mib, 3),
            "time": round(self.planned_s / self.measured_s, 3),
        }


def measure(name: str, *, verbose: bool) -> Found:
    """Train one size in this process, then plan it."""
    size = SIZES[name]
    with tempfile.TemporaryDirectory(prefix="dflash-plan-") as folder:
        tiny = _write_split(Path(folder) / "tiny" / "features" / "train", WARM_UP, NUM_ROWS)
        _run_steps(_trainer(WARM_UP, tiny))  # pays for what the libraries set up once
        config, shape = size.recipe(Path(folder)), size.drafter_config()
        train = _write_split(config.run_dir / "features" / "train", size, NUM_ROWS)
        before, other = _settle(train), storages()
        trainer = _trainer(size, train)
        seconds, peak = _run_steps(trainer)
        held = sum(size for address, size in storages().items() if address not in other)
        growth = live_growth(lambda: _take_steps(trainer, COUNTED_STEPS))
        labels = None if (is_label := trainer.head_rows.is_label) is None else int(is_label.sum())
        loads = loads_of_features(train.lines, config, shape)
        plan = _plan(config, shape, loads=loads, labels=labels)
    if verbose:
        print("\n".join(plan.lines()), file=sys.stderr)
        print(trainer.timers.seconds(), file=sys.stderr)
    return Found(
        size=name,
        planned_mib=plan.memory.peak / MIB,
        measured_mib=(held + growth) / MIB,
        resident_mib=(peak - before) / MIB,
        planned_s=plan.step_seconds,
        measured_s=seconds,
    )


def _trainer(size: Size, train: FeatureStore) -> Trainer:
    """Build the trainer of a size; nothing of it is written."""
    config = size.recipe(train.folder.parents[2])
    table = torch.empty(size.vocab_size, size.hidden_size).normal_(std=0.02)
    return Trainer(
        config,
        accelerator=build_accelerator(config.launch),
        drafter=Drafter(size.drafter_config()),
        head=FrozenHead(embedding_weight=table, lm_head_weight=table),
        train=train,
        validation=train,
        run_dir=config.run_dir,
    )


def _settle(store: FeatureStore) -> int:
    """Touch the mapped features, hand freed memory back, and give resident bytes."""
    for position in range(len(store)):
        store[position].features.sum()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident_bytes()


def _plan(config: RecipeConfig, shape: DrafterConfig, *, loads: Loads, labels: int | None) -> Plan:
    device = measure_machine(shape, loads.mean, config.launch)
    facts = TargetFacts(is_tied=True, num_label_ids=labels)
    return make_plan(config, shape, target=facts, loads=loads, device=device, is_cpu=True)


def _run_steps(trainer: Trainer) -> tuple[float, int]:
    """Give the median seconds of a step, and the peak of resident bytes during the timed ones."""
    _take_steps(trainer, WARM_UP_STEPS)
    trainer.timers.new_window()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    seconds = statistics.median(_take_steps(trainer, TIMED_STEPS))
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return seconds, int(found[1]) * 1024


def _take_steps(trainer: Trainer, number: int) -> list[float]:
    """Take the next steps of an epoch and give the seconds of each."""
    stream = trainer.source.stream(epoch=0, position=trainer.state.step)
    seconds = []
    for _ in range(number):
        started = time.perf_counter()
        with trainer.timers.step():
            trainer.train_step(trainer.next_window(stream))
        trainer.state.step += 1
        seconds.append(time.perf_counter() - started)
    return seconds


def _write_split(folder: Path, size: Size, num_rows: int) -> FeatureStore:
    """Write random rows, a quarter of each a prompt."""
    generator = torch.Generator().manual_seed(0)
    width, prompt = 5 * size.hidden_size, size.row_tokens // 4
    used_ids = size.vocab_size // 5
    rows = [
        FeatureRow(
            id=f"row-{number}",
            tenant=None,
            session=None,
            input_ids=torch.randint(used_ids, (size.row_tokens,), generator=generator),
            loss_mask=torch.arange(size.row_tokens) >= prompt,
            features=torch.randn(size.row_tokens, width, generator=generator),
            max_length=size.row_tokens,
            finish_reason="length",
        )
        for number in range(num_rows)
    ]
    lines = write_shard(folder / "00000.safetensors", rows, dtype=torch.bfloat16)
    write_index(folder, lines)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    outputs = [FileEntry.of(path, folder) for path in files]
    Manifest(stage="collect", recipe_hash="sha256:0", outputs=outputs).write(folder)
    return FeatureStore.open(folder)


def main() -> None:
    """Measure every size in a process of its own and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--only", choices=list(SIZES), help="measure one size in this process")
    arguments = parser.parse_args()
    if arguments.only is not None:
        print(json.dumps(asdict(measure(arguments.only, verbose=True))))
        return
    found = []
    for size in arguments.sizes:
        command = [sys.executable, "-m", "benchmarks.bench_plan", "--only", size]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(Found(**json.loads(done.stdout.splitlines()[-1])))
        print(f"  {size}: planned over measured {found[-1].ratios()}", file=sys.stderr, flush=True)
    summary = {
        "bench": "plan",
        "planned_over_measured": {each.size: each.ratios() for each in found},
        "sizes": [asdict(each) for each in found],
    }
    print(json.dumps(summary | describe_machine(len(os.sched_getaffinity(0)))))


if __name__ == "__main__":
    main()
