"""Training online: what a target pass costs beside a drafter's step, and what prefetching hides.

    python -m benchmarks.bench_online [--shape smollm2] [--steps 20] [--prefetch 2]

Target and drafter have random weights, since time does not depend on values, and no file is needed.
The same packs are timed four ways by the wall clock:

- target: making micro-batches alone, the target's passes and collation
- drafter: optimiser steps on micro-batches that are there already
- in turns: steps that make their own micro-batch first (`data.online.prefetch=0`)
- ahead: steps while a thread makes the next ones

`hidden` is what prefetching saves of the shorter of the first two: 1 hides it all, 0 nothing, and
below 0 the two get in each other's way. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.bench_measure import describe_machine
from dflash_train.config import (
    DrafterSettings,
    LaunchConfig,
    RecipeConfig,
    TargetConfig,
    TrainingConfig,
)
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.model import Drafter
from dflash_train.features.online_rows import OnlineRows, Reading
from dflash_train.features.store import (
    FeatureRow,
    FeatureStore,
    IndexLine,
    write_index,
    write_token_shard,
)
from dflash_train.features.target import Target
from dflash_train.records.manifest import FileEntry, Manifest
from dflash_train.testing import tiny_tokenizer
from dflash_train.training.accelerator import build_accelerator
from dflash_train.training.batching import Batches, Pack, TrainingBatch
from dflash_train.training.online import ReadAhead
from dflash_train.training.trainer import Trainer

SHARD = "rows.safetensors"
WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shapes of target, drafter and rows."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    drafter_layers: int = 5
    num_taps: int = 5
    block_size: int = 16
    num_anchors: int = 64
    row_tokens: int = 512
    pack_tokens: int = 2048


SIZES = {
    "tiny": Sizes(
        hidden_size=32, intermediate_size=64, num_layers=8, num_heads=4, num_kv_heads=2,
        vocab_size=260, drafter_layers=1, num_taps=2, block_size=4, num_anchors=4, row_tokens=24,
        pack_tokens=96,
    ),
    "smollm2": Sizes(
        hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
        vocab_size=49_152, drafter_layers=3, block_size=8, num_anchors=32, row_tokens=128,
        pack_tokens=512,
    ),
    "8b": Sizes(
        hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32, num_kv_heads=8,
        vocab_size=128_256, row_tokens=1024, pack_tokens=8192, num_anchors=256,
    ),
}  # fmt: skip
"""By name: a smoke test, SmolLM2-135M, Llama-3.1-8B."""


class Prepared:
    """Micro-batches of another source, made before the clock runs; a `Batches`."""

    def __init__(self, source: Batches, packs: list[Pack]) -> None:
        """Make the micro-batches of some packs; `seconds_per_batch` is what that took."""
        self._source = source
        source.load(packs[0])
        began = time.perf_counter()
        self._batches = {(pack.epoch, pack.position): source.load(pack) for pack in packs}
        synchronize()
        self.seconds_per_batch = (time.perf_counter() - began) / len(packs)

    def stream(self, *, epoch: int, position: int) -> Iterator[Pack]:
        """Yield the packs of the other source."""
        return self._source.stream(epoch=epoch, position=position)

    def load(self, pack: Pack) -> TrainingBatch:
        """Give a micro-batch that is there."""
        return self._batches[pack.epoch, pack.position]


def build_trainer(sizes: Sizes, folder: Path, *, num_rows: int) -> Trainer:
    """Build a random target, a drafter and rows of random tokens, which the target reads."""
    accelerator = build_accelerator(LaunchConfig())
    target = random_target(sizes, accelerator.device)
    settings = DrafterSettings(
        mask_token_id=3,
        num_taps=sizes.num_taps,
        block_size=sizes.block_size,
        num_hidden_layers=sizes.drafter_layers,
    )
    shape = DrafterConfig.for_target(settings, target.model.config)
    target = Target(
        target.model, target.tokenizer, shape.target_layer_ids, name="random", revision="0"
    )
    write_rows(folder / "rows", sizes, num_rows=num_rows)
    reading = Reading(
        dtype=target.model.dtype, num_taps=sizes.num_taps, teacher_top_k=0, batch_size=64
    )
    rows = OnlineRows(
        FeatureStore.open(folder / "rows", needs_features=False),
        target,
        reading=reading,
        device=accelerator.device,
    )
    config = RecipeConfig(
        name="bench",
        runs_dir=str(folder),
        target=TargetConfig(name_or_path="random"),
        drafter=settings,
        training=TrainingConfig(
            max_steps=1_000, num_anchors=sizes.num_anchors, pack_tokens=sizes.pack_tokens
        ),
    )
    return Trainer(
        config,
        accelerator=accelerator,
        drafter=Drafter(shape),
        head=replace(
            target.head,
            embedding_weight=target.head.embedding_weight.float(),
            lm_head_weight=target.head.lm_head_weight.float(),
        ),
        train=rows,
        validation=rows,
        run_dir=config.run_dir,
    )


def random_target(sizes: Sizes, device: torch.device) -> Target:
    """Build a target whose weights are drawn from a seed: bf16 on a GPU, float32 on a CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        vocab_size=sizes.vocab_size,
    )
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Target(model, tiny_tokenizer(), [0], name="random", revision="0")


def write_rows(folder: Path, sizes: Sizes, *, num_rows: int) -> None:
    """Write rows of half to all of `row_tokens`, the last three quarters of each an answer."""
    generator = torch.Generator().manual_seed(0)
    rows: list[FeatureRow] = []
    for number in range(num_rows):
        length = sizes.row_tokens * (4 + number % 5) // 8
        ids = torch.randint(4, 260, (length,), generator=generator)
        mask = torch.arange(length) >= length // 4
        rows.append(
            FeatureRow(
                id=f"row-{number}",
                tenant=None,
                session=None,
                input_ids=ids,
                loss_mask=mask,
                features=torch.empty(length, 0),
                max_length=length,
                finish_reason="stop",
            )
        )
    write_token_shard(folder / SHARD, rows)
    write_index(folder, [_line(row, place) for place, row in enumerate(rows)])
    outputs = [FileEntry.of(path, folder) for path in sorted(folder.iterdir())]
    Manifest(stage="collect", recipe_hash="sha256:0", outputs=outputs).write(folder)


def _line(row: FeatureRow, place: int) -> IndexLine:
    return IndexLine(
        id=row.id,
        tenant=None,
        session=None,
        shard=SHARD,
        row=place,
        num_tokens=len(row.input_ids),
        prompt_length=row.prompt_length,
        max_length=row.max_length,
        finish_reason=row.finish_reason,
        weight=1,
    )


def seconds_per_step(trainer: Trainer, source: Batches, *, num_steps: int) -> float:
    """Time steps from the start of the stream, after a warm-up."""
    trainer.source = source
    stream = source.stream(epoch=0, position=0)
    began = 0.0
    for number in range(WARM_UP + num_steps):
        if number == WARM_UP:
            synchronize()
            began = time.perf_counter()
        trainer.train_step(trainer.next_window(stream))
    synchronize()
    return (time.perf_counter() - began) / num_steps


def measure(trainer: Trainer, *, num_steps: int, depth: int) -> dict[str, float]:
    """Give the seconds of the four ways, by name, and what is hidden."""
    plain = trainer.source
    packs = list(islice(plain.stream(epoch=0, position=0), WARM_UP + num_steps))
    prepared = Prepared(plain, packs)
    device = trainer.accelerator.device
    ahead = ReadAhead(plain, depth=depth, num_ranks=1, device=device)
    found = {
        "target_s": prepared.seconds_per_batch,
        "drafter_s": seconds_per_step(trainer, prepared, num_steps=num_steps),
        "in_turns_s": seconds_per_step(trainer, plain, num_steps=num_steps),
        "ahead_s": seconds_per_step(trainer, ahead, num_steps=num_steps),
    }
    shorter = min(found["target_s"], found["drafter_s"])
    found["hidden"] = (found["in_turns_s"] - found["ahead_s"]) / shorter
    return found


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SIZES, default="smollm2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prefetch", type=int, default=2)
    options = parser.parse_args(arguments)
    sizes = SIZES[options.shape]
    num_rows = (WARM_UP + options.steps) * max(2, sizes.pack_tokens // sizes.row_tokens) * 3
    with tempfile.TemporaryDirectory(prefix="bench-online-") as name:
        trainer = build_trainer(sizes, Path(name), num_rows=num_rows)
        found = measure(trainer, num_steps=options.steps, depth=options.prefetch)
    figures = {key: round(value, 4) for key, value in found.items()}
    about = {"bench": "online", "shape": options.shape, "prefetch": options.prefetch}
    device = str(trainer.accelerator.device)
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    about |= {"steps": options.steps, "device": device}
    print(json.dumps(about | figures | describe_machine(torch.get_num_threads())))


if __name__ == "__main__":
    main()
