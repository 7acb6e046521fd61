"""A run folder whose evaluation is invented, answers of a tiny target, drafters fitted to them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dflash_inference.live_check import LIVE_CHECK_FILE, LiveCheck, Mismatch, write_checks
from dflash_inference.trace import DecodeTrace, StepTrace, TopTwo, write_traces
from dflash_train.config import RecipeConfig
from dflash_train.drafter.attention import Blocks
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.store import FeatureRow, IndexLine, write_index
from dflash_train.features.target import Target
from dflash_train.records.conversation import Conversation, Turn, write_shard
from dflash_train.records.manifest import Counts, FileEntry, Manifest
from dflash_train.training.blocks import block_labels

AnswerPrompts = Callable[..., list[FeatureRow]]
FitDrafter = Callable[..., Drafter]

BLOCK_SIZE = 8
TENANTS = {"h:9f31c07a55d2": 46, "h:0b7de1843c61": 28, "h:77ac5e20919d": 19, "h:e8042bb6f130": 11}
TARGET = {"name": "invented", "revision": "r1", "target_layer_ids": [1, 8, 14, 20, 27]}


def invent_trace(
    name: str,
    generator: np.random.Generator,
    *,
    group: str,
    rate: float,
    speculative_s: float = 0.0,
) -> DecodeTrace:
    """Invent an answer of about 60 tokens whose drafts are kept at a rate."""
    length = int(generator.integers(30, 65))
    start, end = 100, 100 + length - 1
    steps: list[StepTrace] = []
    while start < end:
        kept = int(min(generator.geometric(1 - rate) - 1, BLOCK_SIZE - 1))
        committed = min(kept + 1, end - start)
        steps.append(
            StepTrace(
                start=start,
                width=BLOCK_SIZE,
                num_accepted=kept,
                committed=committed,
                draft_s=0.2 * speculative_s,
                verify_s=0.75 * speculative_s,
                bookkeeping_s=0.05 * speculative_s,
            )
        )
        start += committed
    return DecodeTrace(
        id=name,
        group=group,
        conversation=f"session-{name}",
        prompt_length=100,
        block_size=BLOCK_SIZE,
        output_ids=list(range(length)),
        steps=steps,
        finish_reason="length",
    )


def as_plain(trace: DecodeTrace, *, seconds: float) -> DecodeTrace:
    """Give the plain decoding of a trace's output."""
    num_steps = len(trace.output_ids) - 1
    return DecodeTrace(
        id=trace.id,
        group=trace.group,
        prompt_length=trace.prompt_length,
        block_size=1,
        output_ids=trace.output_ids,
        steps=[
            StepTrace(start=100 + i, width=1, num_accepted=0, committed=1, verify_s=seconds)
            for i in range(num_steps)
        ],
        finish_reason="length",
        top_two=[TopTwo(ids=(i, i + 1), logits=(2.0, 1.0)) for i in trace.output_ids],
    )


def invent_split(
    folder: Path, split: str, generator: np.random.Generator, tenants: dict[str, int]
) -> list[DecodeTrace]:
    """Invent replay, prompt lookup and negative control of a split."""
    kinds = {"replay": 0.42, "lookup": 0.30}
    if split == "test":
        kinds["foreign"] = 0.10
    written: dict[str, list[DecodeTrace]] = {}
    for kind, rate in kinds.items():
        written[kind] = [
            invent_trace(f"{tenant}-{i}", generator, group=tenant, rate=rate + 0.06 * place - 0.08)
            for place, (tenant, number) in enumerate(tenants.items())
            for i in range(number)
        ]
        write_traces(folder / f"{kind}-{split}.jsonl", written[kind])
    return written["replay"]


def invent_live(folder: Path, generator: np.random.Generator) -> None:
    """Invent 12 live prompts, one of them with a near-tie."""
    live = [
        invent_trace(
            f"live-{i}",
            generator,
            group="humaneval" if i > 7 else "h:9f31c07a55d2",
            rate=0.42,
            speculative_s=0.041,
        )
        for i in range(12)
    ]
    mismatch = Mismatch(
        position=17,
        plain_token=338,
        speculative_token=284,
        plain_logit=17.284313,
        runner_up_logit=17.284309,
        gap=4e-6,
        is_near_tie=True,
    )
    checks = [
        LiveCheck(
            id=trace.id,
            group=trace.group,
            num_output_tokens=len(trace.output_ids),
            num_steps=len(trace.steps),
            num_steps_equal=len(trace.steps),
            equals_replay=True,
            token_match_rate=17 / 48 if trace is live[3] else 1.0,
            mismatch=mismatch if trace is live[3] else None,
            batch_match_rate=0.5 if trace is live[5] else 1.0,
            stored_match_rate=1.0,
        )
        for trace in live
    ]
    write_traces(folder / "live.jsonl", live)
    write_traces(folder / "plain.jsonl", [as_plain(trace, seconds=0.029) for trace in live])
    write_traces(folder / "width1.jsonl", [as_plain(trace, seconds=0.031) for trace in live])
    copied = [as_plain(trace, seconds=0.031 / 1.25) for trace in live]
    write_traces(folder / "live_lookup.jsonl", copied)
    write_checks(folder / LIVE_CHECK_FILE, checks)


def invent_training(run_dir: Path, generator: np.random.Generator) -> None:
    """Invent the lines of metrics.jsonl."""
    lines: list[dict[str, object]] = []
    for step in range(10, 901, 10):
        loss = 3.1 + 6.5 * float(np.exp(-step / 160)) + generator.normal(0, 0.12)
        lines.append({"step": step, "loss": loss, "lr": 1e-3, "tokens_per_second": 900.0})
        if step % 100 == 0:
            pooled = 1.62 - 0.6 * float(np.exp(-step / 260))
            length = {"pooled": pooled, "per_request": pooled + 0.03}
            lines.append({"step": step, "validation": {"acceptance_length": length}})
    (run_dir / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))


def invent_seen(run_dir: Path, tenants: dict[str, int]) -> None:
    """Invent the held-out calls: of each four of a tenant one resembles training."""
    calls = [
        Conversation(
            id=f"{tenant}-{number}", source="set", split="test", seen_in_train=number % 4 == 0,
            messages=[Turn(role="user", content="Hi")],
        )
        for tenant, size in tenants.items()
        for number in range(size)
    ]  # fmt: skip
    write_shard(run_dir / "conversations" / "test-00000.jsonl.gz", calls)


def invent_data(run_dir: Path) -> None:
    """Invent the books of the data stages and the index of two splits."""
    books = {
        "conversations": (
            "ingest",
            Counts(read=640, kept=588, dropped={"malformed": 31, "error": 21}),
        ),
        "regenerated": (
            "regenerate",
            Counts(read=588, kept=587, dropped={"too_long": 1, "empty": 0}),
        ),
    }
    for folder, (stage, counts) in books.items():
        Manifest(stage=stage, recipe_hash="sha256:0", counts=counts).write(run_dir / folder)
    for split, number in (("train", 420), ("test", 104)):
        line = IndexLine(
            id="a",
            tenant=None,
            session=None,
            shard="s",
            row=0,
            num_tokens=350,
            prompt_length=290,
            max_length=400,
            finish_reason="stop",
            weight=1,
        )
        write_index(run_dir / "features" / split, [line] * number)


def invent_run(runs_dir: Path, *, tenants: dict[str, int] = TENANTS) -> RecipeConfig:
    """Write an invented run folder and give its recipe."""
    config = RecipeConfig(name="invented", runs_dir=str(runs_dir))
    config.evaluate.resamples = 500
    generator = np.random.default_rng(0)
    folder = config.run_dir / "traces"
    folder.mkdir(parents=True)
    invent_split(folder, "test", generator, tenants)
    invent_split(folder, "eval-humaneval", generator, {"humaneval": 40})
    invent_live(folder, generator)
    invent_training(config.run_dir, generator)
    invent_data(config.run_dir)
    invent_seen(config.run_dir, tenants)
    manifest = Manifest(
        stage="evaluate",
        recipe_hash="sha256:0",
        target=TARGET,
        command="dflash-train run recipe=invented",
        code={"sha": None, "dirty": None},
        versions={"torch": "2.13.0"},
        outputs=[FileEntry.of(path, folder) for path in sorted(folder.iterdir())],
        details={
            "machine": {
                "processor": "Invented processor",
                "cores": 2,
                "threads": 2,
                "memory_gib": 8,
                "accelerator": "none",
            },
            "drafter": {
                "parameters": 12_400_000,
                "num_hidden_layers": 3,
                "block_size": BLOCK_SIZE,
                "num_drafts": BLOCK_SIZE - 1,
                "target_layer_ids": TARGET["target_layer_ids"],
            },
            "live_max_new_tokens": 48,
            "live_mode": "fast",
            "dtype": "float32",
        },
    )
    manifest.write(folder)
    return config


@pytest.fixture(scope="session")
def invented_run(tmp_path_factory: pytest.TempPathFactory) -> RecipeConfig:
    """An invented run folder, shared: tests only add the report to it."""
    return invent_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def small_run(tmp_path: Path) -> RecipeConfig:
    """An invented run folder of one tenant, for one test."""
    return invent_run(tmp_path, tenants={"h:9f31c07a55d2": 11})


@pytest.fixture(scope="session")
def answer_prompts() -> AnswerPrompts:
    """Let a target answer prompts; rows belong to three tenants, two turns to a session."""

    def answer(target: Target, prompts: list[list[int]], *, budget: int) -> list[FeatureRow]:
        generated = target.generate_batch(prompts, max_new_tokens=budget)
        rows = []
        for number, (prompt, row) in enumerate(zip(prompts, generated, strict=True)):
            ids = torch.tensor([*prompt, *row.output_ids])
            rows.append(
                FeatureRow(
                    id=f"r{number}",
                    tenant=f"h:{number % 3}",
                    session=f"s{number // 2}",
                    input_ids=ids,
                    loss_mask=torch.arange(len(ids)) >= len(prompt),
                    features=row.features,
                    max_length=len(prompt) + budget,
                    finish_reason=row.finish_reason,
                )
            )
        return rows

    return answer


@pytest.fixture(scope="session")
def fit_drafter() -> FitDrafter:
    """Fit a drafter of any kind to answers until it drafts some of them right.

    Every start of every answer is a block, as narrow as the budget makes it at decoding.
    """

    def fit(target: Target, drafter: Drafter, rows: list[FeatureRow], *, num_steps: int) -> Drafter:
        config, head = drafter.config, drafter.output_head(target.head)
        anchors = [torch.arange(row.prompt_length, len(row.input_ids) - 1) for row in rows]
        starts = list(zip(rows, anchors, strict=True))
        tokens = torch.cat(
            [block_labels(row.input_ids, at, config.num_drafts + 1) for row, at in starts]
        )
        room = torch.cat([row.max_length - 1 - at for row, at in starts])
        stored = torch.cat([len(row.input_ids) - 1 - at for row, at in starts])
        blocks = Blocks(
            context_offsets=_offsets([len(row.input_ids) for row in rows]),
            block_offsets=_offsets([len(at) for at in anchors]),
            anchor_positions=torch.cat(anchors),
            widths=room.clamp(max=config.num_drafts) + config.first_slot,
        )
        features = torch.cat([row.features for row in rows])
        embeddings = block_embeddings(
            head, tokens[:, 0], num_slots=config.block_size, config=config
        )
        labels = tokens[:, 1:]
        is_label = torch.arange(config.num_drafts) < torch.minimum(room, stored)[:, None]
        if head.draft_token_ids is not None:
            is_label &= torch.isin(labels, head.draft_token_ids)
            labels = torch.searchsorted(head.draft_token_ids, labels.contiguous())
        optimizer = torch.optim.Adam(drafter.parameters(), lr=8e-3)
        for _ in range(num_steps):
            hidden = drafter(embeddings, features, blocks)[:, config.first_slot :]
            scores = _scores(drafter, hidden[is_label], tokens[:, :-1][is_label], target)
            optimizer.zero_grad()
            cross_entropy(scores, labels[is_label]).backward()
            optimizer.step()
        return drafter.eval()

    return fit


def _scores(drafter: Drafter, hidden_SE: Tensor, previous_S: Tensor, target: Target) -> Tensor:
    """Score every id after the true token before, `[S, Vd]`; all ids are candidates."""
    logits_SV = drafter.logits(hidden_SE, drafter.output_head(target.head))
    if drafter.markov_head is not None:
        return logits_SV + drafter.markov_head(hidden_SE, previous_S)
    if drafter.candidate_selector is not None:
        ids_SV = torch.arange(logits_SV.shape[1]).expand_as(logits_SV)
        return drafter.candidate_selector(hidden_SE, previous_S, logits_SC=logits_SV, ids_SC=ids_SV)
    return logits_SV


def _offsets(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]
